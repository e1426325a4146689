# SPDX-License-Identifier: LGPL-2.1-or-later
"""Detach: the device is gone, on its way or kept, and it is named by what a caller has open."""

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import area
from tests.harness.caller import DEVICE, MANAGER_PATH, Attached, Call, Caller, File, options
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_ext4, make_plain, memfd, pattern
from tests.harness.polkit import rules_allowing
from tests.harness.process import Process
from tests.harness.udev import Udev
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, World

ERROR = "org.example.Loop1.Error."
INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
UNKNOWN_OBJECT = "org.freedesktop.DBus.Error.UnknownObject"

BLKPG = 0x1269
ADD_PARTITION = 1


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    rules = rules_allowing("org.example.loop1.attach", "org.example.loop1.open-device")
    return {"authority": rules}


def is_bound(attached: Attached) -> bool:
    return loops.loop_is_bound(attached.number, attached.diskseq)


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> CallError:
    """Return the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value


def answer_of(call: Call) -> tuple[Any, ...] | str:
    """Return what a call is answered with, or the name of the error."""
    try:
        return call.end()
    except CallError as exc:
        return exc.name


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file as root."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mounted(node: str) -> Iterator[Process]:
    """Mount a device read-only where only the mounting process sees it."""
    with area("mount") as directory:
        reading, writing = os.pipe()
        mount = f"mount -t ext4 -o ro {node} {directory}; echo > /proc/self/fd/{writing}"
        try:
            with Process(
                [
                    *("unshare", "--mount", "--propagation", "private"),
                    *("sh", "-euc", f"{mount}; exec sleep infinity"),
                ],
                name="mounter",
                pass_fds=[writing],
            ) as mounter:
                Deadline().wait_readable([reading, mounter.pidfd], "the mount")
                assert mounter.status is None, mounter.log.text
                yield mounter
        finally:
            os.close(reading)
            os.close(writing)


def add_partition(loop_fd: int, number: int, start: int, length: int) -> None:
    """Make a partition device, whatever any table says."""
    form = struct.Struct("qqi64s64s4x")
    described = ctypes.create_string_buffer(form.pack(start, length, number, b"", b""))
    argument = struct.pack("iiiP", ADD_PARTITION, 0, form.size, ctypes.addressof(described))
    fcntl.ioctl(loop_fd, BLKPG, argument)


def detach_by_fd(caller: Caller, fd: Any, **named: Any) -> bool:
    return bool(caller.manager("Detach", "ha{sv}", 0, options(**named), fds=[fd])[0])


def get_device(caller: Caller, fd: Any) -> str:
    return str(caller.manager("GetDevice", "h", 0, fds=[fd])[0])


# Gone


def test_true_means_gone_and_told(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    assert caller.detach(attached.path) is True
    assert not is_bound(attached)
    removed = [each for each in caller.signals if each.args[0] == attached.path]
    assert [(each.member, each.path, each.args[1]) for each in removed][-1:] == [
        ("InterfacesRemoved", MANAGER_PATH, [DEVICE])
    ]
    assert attached.path not in caller.managed_objects()
    assert error_of(caller.detach, attached.path).name == UNKNOWN_OBJECT
    world.wait_devices(0)


def test_a_path_never_comes_to_mean_another_device(world: World) -> None:
    caller = world.caller()
    path = world.image()
    former = caller.attach(path)
    caller.detach(former.path)
    for _ in range(20):
        attached = caller.attach(path)
        assert attached.path != former.path
        assert error_of(caller.get_all, former.path).name == UNKNOWN_OBJECT
        assert error_of(caller.detach, former.path).name == UNKNOWN_OBJECT
        assert is_bound(attached)
        caller.detach(attached.path)
        former = attached


def test_the_probe_of_udev_is_waited_for(world: World) -> None:
    caller = world.caller()
    path = make_ext4(world.new_path(), owner="nobody")
    with Udev():
        for _ in range(20):
            attached = caller.attach(path)
            assert caller.detach(attached.path) is True
            assert not is_bound(attached)


def test_what_was_written_is_in_the_file(world: World) -> None:
    caller = world.caller()
    path = world.image()
    attached = caller.attach(path, direct_io=False)
    fd = caller.open_device(attached.path, "rw")
    fd.write(b"written by the device".ljust(4096, b"."), 8192)
    fd.close()
    assert caller.detach(attached.path) is True
    assert path.read_bytes()[8192:12288] == b"written by the device".ljust(4096, b".")
    assert path.read_bytes()[:8192] == pattern(0, 8192)


def test_two_who_ask_at_once_are_both_answered(world: World) -> None:
    first, second = world.caller(), world.caller()
    for _ in range(10):
        attached = first.attach(world.image())
        calls = [
            caller.call_begin(attached.path, DEVICE, "Detach", "a{sv}", {})
            for caller in (first, second)
        ]
        answers = [answer_of(call) for call in calls]
        assert (True,) in answers
        assert {*answers} <= {(True,), UNKNOWN_OBJECT, f"{ERROR}NoSuchDevice"}
        assert not is_bound(attached)


def test_the_others_of_a_connection_stay(world: World) -> None:
    caller = world.caller()
    devices = [caller.attach(world.image()) for _ in range(3)]
    caller.detach(devices[1].path)
    assert [is_bound(attached) for attached in devices] == [True, False, True]
    assert caller.get(devices[0].path, "State") == caller.get(devices[2].path, "State")
    assert world.device_count() == 2


# Under way


def test_false_means_that_the_last_close_will_end_it(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    fd = caller.open_device(attached.path, "rw")
    assert caller.detach(attached.path) is False
    changes = [each for each in caller.signals if each.member == "PropertiesChanged"]
    changed = {}
    for each in changes:
        if each.path == attached.path:
            assert each.args[0] == DEVICE
            changed |= each.args[1]
    assert changed["State"] == "detaching"
    assert (changed["Holder"], changed["Lifetime"]) == ("", "")
    assert caller.get(attached.path, "State") == "detaching"
    assert world.device_count() == 1
    # It is no less a device for who has it open.
    assert fd.write(b"x" * 512) == 512
    assert caller.detach(attached.path) is False
    for member, signature, args in (
        ("Resize", "a{sv}", [{}]),
        ("Open", "sa{sv}", ["r", {}]),
        ("Sync", "a{sv}", [{}]),
    ):
        error = error_of(caller.device, attached.path, member, signature, *args)
        assert error.name == f"{ERROR}NoSuchDevice", member
    fd.close()
    caller.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)
    assert not is_bound(attached)


def test_a_close_within_the_second_makes_it_true(world: World) -> None:
    caller, other = world.caller(), world.caller()
    attached = caller.attach(world.image())
    fd = other.open_device(attached.path, "r")
    call = caller.call_begin(attached.path, DEVICE, "Detach", "a{sv}", {})
    other.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1].get("State") == "detaching",
    )
    fd.close()
    assert call.end() == (True,)


def test_a_client_that_locks_its_device_for_ever_is_in_nobodys_way(world: World) -> None:
    """Locked for ever."""
    holder, other = world.caller(), world.caller(OTHER)
    attached = holder.attach(world.image())
    fd = holder.open_device(attached.path, "r")
    fd.evaluate("fcntl.flock(fd, fcntl.LOCK_EX)")
    assert holder.detach(attached.path) is False
    for _ in range(5):
        another = other.attach(world.image(owner=OTHER))
        assert other.detach(another.path) is True
    holder.kill()
    loops.wait_unbound(attached.number, attached.diskseq)


# Refused


def test_a_mounted_device_is_busy_and_stays_as_it_is(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(make_ext4(world.new_path(), owner="nobody"), "r")
    before = caller.get_all(attached.path)
    with mounted(attached.node):
        error = error_of(caller.detach, attached.path)
        assert error.name == f"{ERROR}DeviceBusy"
        assert "lazy" in error.message
        assert error_of(caller.detach, attached.path, lazy=False).name == f"{ERROR}DeviceBusy"
        with opened(attached.node) as fd:
            assert error_of(detach_by_fd, caller, fd).name == f"{ERROR}DeviceBusy"
        assert caller.get_all(attached.path) == before
        assert is_bound(attached)
    assert caller.detach(attached.path) is True


def test_lazy_detaches_a_mounted_device_at_its_umount(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(make_ext4(world.new_path(), owner="nobody"), "r")
    with mounted(attached.node):
        assert caller.detach(attached.path, lazy=True) is False
        assert caller.get(attached.path, "State") == "detaching"
        assert is_bound(attached)
        assert world.device_count() == 1
    loops.wait_unbound(attached.number, attached.diskseq)
    world.wait_devices(0)


def test_an_exclusive_opener_makes_a_device_busy_and_an_ordinary_one_does_not(
    world: World,
) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    with opened(attached.node, os.O_RDONLY | os.O_EXCL):
        assert error_of(caller.detach, attached.path).name == f"{ERROR}DeviceBusy"
        assert caller.get(attached.path, "State") == "attached"
    with opened(attached.node):
        assert caller.detach(attached.path) is False
    loops.wait_unbound(attached.number, attached.diskseq)


def test_an_exclusive_opener_of_a_partition_makes_the_device_busy(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(world.image(4 * MIB))
    with partition(attached) as part:
        with opened(part, os.O_RDONLY | os.O_EXCL):
            assert error_of(caller.detach, attached.path).name == f"{ERROR}DeviceBusy"
        assert caller.detach(attached.path) is True
    assert loops.strays(attached.number) == ()


@contextmanager
def partition(attached: Attached) -> Iterator[str]:
    """Make a partition device and wait for its node."""
    with opened(attached.node) as fd:
        add_partition(fd, 1, 512, MIB)
    node = f"{attached.node}p1"
    with loops.Uevents() as events:
        events.wait_until(lambda: os.path.exists(node), node)
    yield node


WRONG = [
    ({"lazy": Variant("s", "yes")}, "lazy"),
    ({"lazy": Variant("u", 1)}, "lazy"),
    ({"force": Variant("b", True)}, "force"),
    ({"": Variant("b", True)}, ""),
    ({"lazy": Variant("b", True), "Lazy": Variant("b", True)}, "Lazy"),
]


def test_a_wrong_option_is_named_and_nothing_happens(world: World) -> None:
    caller = world.caller()
    path = world.image()
    attached = caller.attach(path)
    for wrong, key in WRONG:
        for error in (
            error_of(caller.device, attached.path, "Detach", "a{sv}", wrong),
            error_of(caller.manager, "Detach", "ha{sv}", 0, wrong, fds=[File(path)]),
        ):
            assert error.name == INVALID
            assert key in error.message
        assert caller.get(attached.path, "State") == "attached"
        assert is_bound(attached)


# By an fd

FILE_MODES = [os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_PATH]


@pytest.mark.parametrize("flags", FILE_MODES)
def test_a_device_is_named_by_its_file_open_in_any_mode(world: World, flags: int) -> None:
    caller = world.caller()
    path = world.image()
    attached = caller.attach(path)
    assert get_device(caller, File(path, flags)) == attached.path
    assert detach_by_fd(caller, File(path, flags)) is True
    assert not is_bound(attached)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_PATH])
def test_a_device_is_named_by_its_node_open_in_any_mode(world: World, flags: int) -> None:
    root, caller = world.caller(None), world.caller()
    attached = caller.attach(world.image())
    assert get_device(root, File(attached.node, flags)) == attached.path
    # The passed fd is an opener until loopd closes it, and is none when it asks the kernel.
    assert detach_by_fd(root, File(attached.node, flags)) is True
    assert not is_bound(attached)


def test_a_device_is_named_by_the_fd_that_open_gave(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    fd = caller.open_device(attached.path, "r")
    assert get_device(caller, fd) == attached.path
    assert detach_by_fd(caller, fd) is False
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_partition_names_its_device_and_is_not_detached(world: World) -> None:
    root, caller = world.caller(None), world.caller()
    attached = caller.attach(world.image(4 * MIB))
    with partition(attached) as part:
        assert get_device(root, File(part, os.O_RDONLY)) == attached.path
        assert get_device(root, File(part, os.O_PATH)) == attached.path
        error = error_of(detach_by_fd, root, File(part, os.O_RDONLY))
        assert (error.name, attached.node in error.message) == (
            "org.freedesktop.DBus.Error.InvalidArgs",
            True,
        )
        assert is_bound(attached)
    assert caller.detach(attached.path) is True


def test_a_file_is_itself_by_whatever_path_it_was_opened(world: World) -> None:
    caller = world.caller()
    path = world.image()
    attached = caller.attach(path)
    hard_link = world.new_path()
    os.link(path, hard_link)
    renamed = path.with_suffix(".renamed")
    path.rename(renamed)
    assert get_device(caller, File(hard_link)) == attached.path
    # Another file at the old path is another file.
    make_plain(path)
    assert error_of(get_device, caller, File(path, os.O_RDONLY)).name == f"{ERROR}NoSuchDevice"
    renamed.unlink()
    assert get_device(caller, File(hard_link)) == attached.path


def test_an_attached_memfd_names_its_device(world: World) -> None:
    caller = world.caller()
    with memfd() as fd, memfd() as other:
        attached = caller.attach(fd)
        assert get_device(caller, fd) == attached.path
        assert error_of(get_device, caller, other).name == f"{ERROR}NoSuchDevice"
        assert detach_by_fd(caller, fd) is True


def test_a_file_attached_twice_is_ambiguous_until_one_is_left(world: World) -> None:
    caller = world.caller()
    path = world.image()
    devices = [caller.attach(path, allow_overlap=True) for _ in range(3)]
    for call in (
        lambda: get_device(caller, File(path)),
        lambda: detach_by_fd(caller, File(path)),
        lambda: detach_by_fd(caller, File(path), lazy=True),
        lambda: caller.manager("Resize", "ha{sv}", 0, {}, fds=[File(path)]),
    ):
        error = error_of(call)
        assert error.name == f"{ERROR}Ambiguous"
        assert all(attached.node in error.message for attached in devices)
    assert all(map(is_bound, devices))
    caller.detach(devices[0].path)
    assert error_of(get_device, caller, File(path)).name == f"{ERROR}Ambiguous"
    caller.detach(devices[2].path)
    assert detach_by_fd(caller, File(path)) is True
    assert not is_bound(devices[1])


def test_ones_own_device_comes_first(world: World) -> None:
    caller, other, root = world.caller(), world.caller(OTHER), world.caller(None)
    path = world.image()
    mine = caller.attach(path, "r")
    # Another user's is never found.
    error = error_of(get_device, other, File(path, os.O_RDONLY))
    assert error.name == f"{ERROR}NoSuchDevice"
    assert mine.node in error.message
    theirs = other.attach(path, "r")
    assert get_device(caller, File(path, os.O_RDONLY)) == mine.path
    assert get_device(other, File(path, os.O_RDONLY)) == theirs.path
    error = error_of(detach_by_fd, root, File(path, os.O_RDONLY))
    assert error.name == f"{ERROR}NoSuchDevice"
    assert f"{min(mine.node, theirs.node)}, {max(mine.node, theirs.node)}" in error.message
    assert detach_by_fd(other, File(path, os.O_RDONLY)) is True
    assert (is_bound(mine), is_bound(theirs)) == (True, False)
    assert error_of(detach_by_fd, other, File(path, os.O_RDONLY)).name == f"{ERROR}NoSuchDevice"


def test_what_is_attached_nowhere_names_no_device(world: World) -> None:
    caller, root = world.caller(), world.caller(None)
    caller.attach(world.image())
    with ExitStack() as stack:
        ends = os.pipe()
        for end in ends:
            stack.callback(os.close, end)
        flags = os.O_RDONLY | os.O_CLOEXEC
        fds = [
            *ends,
            os.open(world.image(), flags),
            os.open("/tmp", flags),
            os.open("/tmp", os.O_PATH | os.O_CLOEXEC),
            os.open("/dev/null", flags),
            os.open("/dev/loop-control", flags),
            os.open("/proc/self/mounts", flags),
        ]
        for fd in fds[2:]:
            stack.callback(os.close, fd)
        for user in (caller, root):
            for fd in fds:
                error = error_of(get_device, user, fd)
                assert error.name == f"{ERROR}NoSuchDevice", os.readlink(f"/proc/self/fd/{fd}")
                assert error_of(detach_by_fd, user, fd).name == f"{ERROR}NoSuchDevice"


@pytest.mark.alone  # root would detach it from whoever has it by then
def test_an_unbound_loop_device_is_no_device(world: World) -> None:
    caller, root = world.caller(), world.caller(None)
    attached = caller.attach(world.image())
    fd = root.open(attached.node, os.O_PATH)
    caller.detach(attached.path)
    for call in (
        lambda: get_device(root, fd),
        lambda: detach_by_fd(root, fd),
        lambda: root.manager("GetDeviceByNode", "s", attached.node),
    ):
        assert error_of(call).name == f"{ERROR}NoSuchDevice"
