# SPDX-License-Identifier: LGPL-2.1-or-later
"""While loopd works, udevd dies, a disk is full, a file goes, and somebody else meddles.

Whatever it is, a device goes when it should, and the next client is served.
"""

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from loopd.loop import kernel
from loopd.loop.uapi import LO_FLAGS_AUTOCLEAR
from tests.harness import loops
from tests.harness.area import area
from tests.harness.caller import DEVICE, Attached, Caller
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_gpt, make_plain, make_sparse
from tests.harness.udev import private_udevd
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

NO_SUCH_DEVICE = "org.example.Loop1.Error.NoSuchDevice"


def is_bound(attached: Attached) -> bool:
    return loops.loop_is_bound(attached.number, attached.diskseq)


def serves(world: World) -> None:
    """Fail unless the next client is served, from attach to detach."""
    caller = world.caller(OTHER)
    attached = caller.attach(world.image(owner=OTHER))
    assert caller.detach(attached.path) is True
    assert not is_bound(attached)


# udevd


@pytest.mark.alone  # this udevd has no rules of others', and makes links to their devices
def test_devices_come_and_go_whatever_becomes_of_udevd(world: World) -> None:
    """The kernel's own events serve: they are told with it, without it, and when it is killed."""
    caller, watcher = world.caller(), world.caller(OTHER)
    with private_udevd() as udevd:
        devices = [
            caller.attach(make_gpt(world.new_path(), owner=USER), partition_scan=True)
            for _ in range(4)
        ]
        # It looks at them just now.
        udevd.kill()
        assert caller.detach(devices[0].path) is True
        devices.append(caller.attach(world.image()))
        assert len(caller.get(devices[1].path, "Partitions")) == 2
        # Nobody asks loopd: it hears of it.
        os.truncate(world.files / caller_file(caller, devices[-1]), 2 * MIB)
        subprocess.run(["losetup", "-c", devices[-1].node], check=True)
        watcher.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == devices[-1].path and it.args[1].get("Size") == 2 * MIB,
        )
        caller.kill()
        for attached in devices:
            wait_removed(watcher, attached.path)
            assert not is_bound(attached)
    serves(world)


def wait_removed(watcher: Caller, path: str) -> None:
    watcher.wait_signal("InterfacesRemoved", lambda it: it.args[0] == path)


def caller_file(caller: Caller, attached: Attached) -> Path:
    """Return the path of a device's file, as it is shown."""
    return Path(os.fsdecode(caller.get(attached.path, "BackingFile").rstrip(b"\0")))


# The disk


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """Mount a filesystem that has room for so many bytes."""
    with area("disk") as directory:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0777", "none", directory], check=True
        )
        try:
            yield directory
        finally:
            # The kernel may let go of the last file a moment later.
            subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_full_disk_is_told_to_who_writes_and_to_who_syncs_and_to_nobody_else(
    world: World,
) -> None:
    caller, other = world.caller(), world.caller(OTHER)
    with small_disk(MIB) as directory:
        attached = caller.attach(make_sparse(directory / "image", 4 * MIB, owner=USER))
        device = caller.open_device(attached.path, "rw")
        others = other.attach(world.image(owner=OTHER))
        with pytest.raises(Exception, match=r"No space left|Input/output error"):
            # The cache takes it; the disk does not.
            device.evaluate("[os.pwrite(fd, bytes(data), 0), os.fsync(fd)]", data=b"x" * 3 * MIB)
        with pytest.raises(CallError, match=r"System\.Error\.(ENOSPC|EIO)"):
            caller.device(attached.path, "Sync", "a{sv}", {})
        other.device(others.path, "Sync", "a{sv}", {})
        assert caller.resize(attached.path, size_limit=2 * MIB) == 2 * MIB
        device.close()
        assert caller.detach(attached.path) is True
        assert not is_bound(attached)
        assert other.detach(others.path) is True
    serves(world)


# The file


def by_fd(caller: Caller, member: str, fd: int) -> object:
    if member == "GetDevice":
        return caller.manager(member, "h", 0, fds=[fd])[0]
    return caller.manager(member, "ha{sv}", 0, {}, fds=[fd])[0]


@pytest.fixture
def attached_file(world: World) -> Iterator[tuple[Caller, Attached, Path, int]]:
    """A device, its owner, its file's path, and an fd of that."""
    caller, path = world.caller(), world.image()
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield caller, caller.attach(path), path, fd
    finally:
        os.close(fd)


def test_a_file_that_is_deleted_is_still_the_devices(
    world: World, attached_file: tuple[Caller, Attached, Path, int]
) -> None:
    """CVE-2021-3996."""
    caller, attached, path, fd = attached_file
    path.unlink()
    assert by_fd(caller, "GetDevice", fd) == attached.path
    ((shown,),) = [row[3:4] for row in caller.manager("ListDevices")[0] if row[0] == attached.path]
    assert shown.startswith(os.fsencode(path))
    os.truncate(fd, 2 * MIB)
    assert by_fd(caller, "Resize", fd) == 2 * MIB
    assert by_fd(caller, "Detach", fd) is True
    assert not is_bound(attached)
    serves(world)


def test_a_file_that_takes_anothers_place_is_another(
    world: World, attached_file: tuple[Caller, Attached, Path, int]
) -> None:
    """CVE-2021-3996: its name, which sysfs shows as the backing file's, says nothing."""
    caller, attached, path, fd = attached_file
    make_plain(world.new_path(), 2 * MIB, owner=USER).rename(path)
    new = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for member in ("GetDevice", "Resize", "Detach"):
            with pytest.raises(CallError) as failure:
                by_fd(caller, member, new)
            assert failure.value.name == NO_SUCH_DEVICE
        assert caller.get(attached.path, "Size") == MIB
        second = caller.attach(path)  # no overlap
        assert by_fd(caller, "GetDevice", new) == second.path
        assert by_fd(caller, "GetDevice", fd) == attached.path
        assert by_fd(caller, "Resize", fd) == MIB
        assert by_fd(caller, "Detach", fd) is True
        assert (is_bound(attached), is_bound(second)) == (False, True)
        assert by_fd(caller, "Detach", new) is True
    finally:
        os.close(new)
    serves(world)


def test_a_file_that_is_emptied_can_be_named_synced_and_detached(
    world: World, attached_file: tuple[Caller, Attached, Path, int]
) -> None:
    caller, attached, path, fd = attached_file
    os.truncate(path, 0)
    assert by_fd(caller, "GetDevice", fd) == attached.path
    with pytest.raises(CallError, match=r"InvalidArgs.*0 bytes"):
        by_fd(caller, "Resize", fd)
    device = caller.open_device(attached.path, "r")
    with suppress(Exception):  # what is read of it is the kernel's business
        device.read(4096)
    device.close()
    caller.device(attached.path, "Sync", "a{sv}", {})
    assert caller.get(attached.path, "State") == "attached"
    assert by_fd(caller, "Detach", fd) is True
    assert not is_bound(attached)
    serves(world)


# Somebody who is root, too


def clear(number: int, fd: int) -> None:
    kernel.loop_clr_fd(fd)


def turn_autoclear_off(number: int, fd: int) -> None:
    info = kernel.loop_get_status64(fd)
    info.lo_flags &= ~LO_FLAGS_AUTOCLEAR
    kernel.loop_set_status64(fd, info)


def move(number: int, fd: int) -> None:
    info = kernel.loop_get_status64(fd)
    info.lo_offset ^= 4096
    info.lo_file_name = b"moved"
    kernel.loop_set_status64(fd, info)


def remove(number: int, fd: int) -> None:
    control = kernel.open_loop_control()
    try:
        kernel.loop_ctl_remove(control, number)
    finally:
        os.close(control)


Meddle = Callable[[int, int], None]
MEDDLING = (clear, turn_autoclear_off, move, remove)


@contextmanager
def opened(world: World, number: int) -> Iterator[int]:
    """Open a device of this world's, which is no other's for as long as it is open."""
    fd = kernel.open_loop(number, os.O_RDONLY)
    try:
        loop = loops.look_at(number)
        if loop is None or not loop.backing_file.startswith(f"{world.files}/"):
            raise OSError(errno.ENXIO, "somebody else's")
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("meddle", MEDDLING, ids=lambda it: it.__name__)
def test_a_device_that_root_meddles_with_goes_with_its_client(world: World, meddle: Meddle) -> None:
    for leave in (False, True):
        caller = world.caller()
        attached = caller.attach(world.image())
        with suppress(OSError), opened(world, attached.number) as fd:
            meddle(attached.number, fd)
        if leave:
            caller.kill()
            loops.wait_unbound(attached.number, attached.diskseq)
        else:
            assert caller.detach(attached.path) is True
        assert not is_bound(attached)
        world.wait_devices(0)
    serves(world)


@pytest.mark.parametrize("meddle", MEDDLING, ids=lambda it: it.__name__)
def test_a_device_that_root_meddles_with_while_it_goes_is_gone_at_the_last_close(
    world: World, meddle: Meddle
) -> None:
    caller, watcher = world.caller(), world.caller(OTHER)
    attached = caller.attach(world.image())
    if meddle is turn_autoclear_off:
        # Else loopd lets go of it, and root would keep it.
        caller.open_device(attached.path, "r").close()
    with opened(world, attached.number) as fd:
        call = caller.call_begin(attached.path, DEVICE, "Detach", "a{sv}", {})
        watcher.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == attached.path and it.args[1].get("State") == "detaching",
        )
        if meddle is turn_autoclear_off:
            # Before, loopd's first attempt would turn it on again.
            assert call.end() == (False,)
        for _ in range(3):
            with suppress(OSError):
                meddle(attached.number, fd)
        assert is_bound(attached)
        assert world.device_count() == 1
    loops.wait_unbound(attached.number, attached.diskseq)
    wait_removed(watcher, attached.path)
    world.wait_devices(0)
    serves(world)


@contextmanager
def meddling(world: World) -> Iterator[list[str]]:
    """Have somebody do everything to every device of this world, as fast as it can."""
    end, done = threading.Event(), list[str]()

    def meddle() -> None:
        turn = 0
        while not end.is_set():
            for loop in loops.bound_loops().values():
                if not loop.backing_file.startswith(f"{world.files}/"):
                    continue
                turn += 1
                chosen = MEDDLING[turn % len(MEDDLING)]
                with suppress(OSError), opened(world, loop.number) as fd:
                    chosen(loop.number, fd)
                    done.append(chosen.__name__)

    thread = threading.Thread(target=meddle, name="meddler")
    thread.start()
    try:
        yield done
    finally:
        end.set()
        thread.join()


ROUNDS = 20
# What an honest caller may be told for it.
ANSWERS = ("NoSuchDevice", "DeviceBusy", "UnknownObject", "InvalidArgs", "System.Error.")


@pytest.mark.alone
def test_somebody_who_races_loopd_for_its_devices_costs_nobody_but_an_error(world: World) -> None:
    callers = [world.caller(), world.caller()]
    images = [make_gpt(world.new_path(), owner=USER) for _ in callers]
    before = [image.read_bytes() for image in images]
    attached, served, deadline = [], 0, Deadline()
    with meddling(world) as done:
        while served < ROUNDS or not {"clear", "turn_autoclear_off", "move"} <= {*done}:
            assert deadline.remaining, (served, {*done})
            calls = [
                caller.attach_begin(image, partition_scan=bool(index), allow_overlap=True)
                for index, (caller, image) in enumerate(zip(callers, images, strict=True))
            ]
            for caller, call in zip(callers, calls, strict=True):
                try:
                    device = Attached(*call.end())
                    loops.used_numbers.add(device.number)
                    attached.append(device)
                    caller.resize(device.path, size_limit=MIB)
                    caller.detach(device.path)
                    served += 1
                except CallError as exc:
                    if not any(name in exc.name for name in ANSWERS):
                        raise
    for caller in callers:
        caller.kill()
    for device in attached:
        loops.wait_unbound(device.number, device.diskseq)
    world.wait_devices(0)
    assert [image.read_bytes() for image in images] == before
    serves(world)
