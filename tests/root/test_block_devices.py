# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach of block devices: whole ones need no loop device, and are their owner's alone to see.

The block devices here are loop devices that losetup made, which for loopd are somebody else's.
"""

import ctypes
import fcntl
import os
import pwd
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.fd import OwnedFd
from loopd.loop import attach as loop_attach
from loopd.loop import backing_file, loop_device
from loopd.loop.request import AttachRequest
from tests.harness import loops
from tests.harness.caller import (
    DEVICE,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    PROPERTIES,
    Attached,
    Caller,
    File,
    Signal,
)
from tests.harness.images import MIB, make_gpt, pattern
from tests.harness.polkit import RULES_ALLOW_ALL, rules_allowing
from tests.harness.raw import BUS
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER, World, make_world

ERROR = f"{MANAGER}.Error."
INVALID_ARGS = f"{BUS}.Error.InvalidArgs"
UNKNOWN_OBJECT = f"{BUS}.Error.UnknownObject"
ATTACHER = "mail"
"""A user who may attach files only."""
NO_NUMBER = 0xFFFFFFFF

BLKPG, ADD_PARTITION, DELETE_PARTITION = 0x1269, 1, 2
LOOP_CHANGE_FD = 0x4C06


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    block_device = "org.example.loop1.attach-block-device"
    manage_others = "org.example.loop1.manage-others"
    rules = rules_allowing("org.example.loop1.attach", "org.example.loop1.open-device")
    rules += rules_allowing(block_device, users=(USER, OTHER))
    # The other one may do whatever anybody may do to what is somebody else's.
    rules += rules_allowing(manage_others, users=(OTHER,))
    return {"authority": rules}


@pytest.fixture
def disk(world: World) -> Iterator[loops.BoundLoop]:
    """A block device of 1 MiB, patterned."""
    with bound(world.image()) as loop:
        yield loop


@contextmanager
def bound(file: str | Path, *arguments: str) -> Iterator[loops.BoundLoop]:
    """Have a file attached by losetup."""
    node = loops.losetup(file, *arguments)
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    loops.used_numbers.add(loop.number)
    try:
        yield loop
    finally:
        # It goes when loopd lets go of it, at the latest with the callers of the test.
        loops.detach_leaked(loop)


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Open a file as root."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def partitions(disk: loops.BoundLoop, *extents: tuple[int, int]) -> Iterator[list[str]]:
    """Have partition devices on a disk, of a start and a length in bytes; their nodes."""
    with opened(disk.node, os.O_RDONLY) as fd:
        # Else a running udevd, whom losetup's close has woken, would drop all partitions.
        lock(fd, "shared")
        try:
            for number, (start, length) in enumerate(extents, 1):
                blkpg(fd, ADD_PARTITION, number, start, length)
            yield [f"{disk.node}p{number}" for number in range(1, len(extents) + 1)]
        finally:
            lock(fd, "exclusive")  # nobody probes one
            for number in range(1, len(loops.partitions(disk.number)) + 1):
                blkpg(fd, DELETE_PARTITION, number)


def lock(fd: int, kind: str) -> None:
    subprocess.run(["flock", f"--{kind}", "--timeout", "20", str(fd)], check=True, pass_fds=[fd])


def blkpg(fd: int, operation: int, number: int, start: int = 0, length: int = 0) -> None:
    form = struct.Struct("qqi64s64s4x")
    described = ctypes.create_string_buffer(form.pack(start, length, number, b"", b""))
    fcntl.ioctl(
        fd, BLKPG, struct.pack("iiiP", operation, 0, form.size, ctypes.addressof(described))
    )


def attach(caller: Caller, node: str, flags: int = os.O_RDWR, **options: Any) -> Attached:
    """Attach a block device, which the test opens for the caller."""
    with opened(node, flags) as fd:
        return Attached(*caller.attach_begin(fd, **options).end())


def above(node: str) -> list[loops.BoundLoop]:
    """Return the loop devices over a block device."""
    return [loop for loop in loops.bound_loops().values() if loop.backing_file == node]


def is_bound(loop: loops.BoundLoop) -> bool:
    return loops.loop_is_bound(loop.number, loop.diskseq)


def path_of(loop: loops.BoundLoop) -> str:
    return f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"


def wait_known(caller: Caller, loop: loops.BoundLoop) -> None:
    """Wait until loopd knows a device of somebody else's."""
    if path_of(loop) not in caller.managed_objects():
        caller.wait_signal("InterfacesAdded", lambda it: it.args[0] == path_of(loop))


def about(signals: list[Signal], path: str) -> list[Signal]:
    return [it for it in signals if path in (it.path, it.args[0])]


def content(node: str, offset: int, length: int) -> bytes:
    with opened(node, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


def queue(loop: int, name: str) -> Path:
    return Path(f"/sys/block/loop{loop}/queue/{name}")


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> CallError:
    """Return the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value


# Who may


@pytest.mark.parametrize("options", [{}, {"offset": 4096}])
def test_it_takes_a_yes_of_its_own(
    world: World, disk: loops.BoundLoop, options: dict[str, Any]
) -> None:
    # Its node is on a filesystem that nobody trusts, which does not matter.
    caller = world.caller(ATTACHER)
    for flags in (os.O_RDONLY, os.O_RDWR):
        error = error_of(attach, caller, disk.node, flags, **options)
        assert error.name == f"{BUS}.Error.InteractiveAuthorizationRequired"
        assert "attach-block-device" in error.message
    assert above(disk.node) == []
    assert world.device_count() == 0
    caller.attach(world.image(owner=ATTACHER))
    for user in (USER, None):
        attach(world.caller(user), disk.node, os.O_RDONLY, **options)


def test_nobody_is_asked_for_what_cannot_be(world: World, disk: loops.BoundLoop) -> None:
    caller = world.caller(ATTACHER)
    for options, key in (({"offset": MIB}, "offset"), ({"size_limit": 2 * MIB}, "size-limit")):
        error = error_of(attach, caller, disk.node, **options)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, key)


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_PATH, os.O_WRONLY | os.O_APPEND]
)
def test_a_mode_that_would_launder_rights_is_refused(
    owner: Caller, disk: loops.BoundLoop, flags: int
) -> None:
    """Rights of an fd."""
    assert error_of(attach, owner, disk.node, flags).name == f"{ERROR}UnsupportedFile"


def test_a_read_only_fd_makes_nothing_writable(owner: Caller, disk: loops.BoundLoop) -> None:
    """Rights of an fd."""
    for options in ({}, {"offset": 4096}, {"reference": "disk"}):
        error = error_of(attach, owner, disk.node, os.O_RDONLY, read_only=False, **options)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "read-only")
    attached = attach(owner, disk.node, os.O_RDONLY, offset=4096)
    assert owner.get(attached.path, "ReadOnly") is True
    assert error_of(owner.open_device, attached.path, "rw").name == INVALID_ARGS


# The shortcut


def test_a_whole_block_device_needs_no_loop_device(owner: Caller, disk: loops.BoundLoop) -> None:
    """Proves A12."""
    attached = attach(owner, disk.node)
    assert above(disk.node) == []
    assert (attached.node, attached.diskseq) == (disk.node, disk.diskseq)
    prefix = f"{MANAGER_PATH}/device/loop{disk.number}_{disk.diskseq}_"
    assert re.fullmatch(re.escape(prefix) + r"\d+", attached.path)
    properties = owner.get_all(attached.path)
    assert properties.pop("AttachedAt") > 0
    node = os.stat(disk.node)
    assert properties == {
        "Node": disk.node,
        "Number": NO_NUMBER,
        "DeviceNumber": node.st_rdev,
        "Diskseq": disk.diskseq,
        "BackingFile": disk.node.encode() + b"\0",
        "BackingDevice": node.st_dev,
        "BackingInode": node.st_ino,
        "Offset": 0,
        "SizeLimit": 0,
        "Size": MIB,
        "SectorSize": 512,
        "ReadOnly": False,
        "DirectIO": False,
        "Autoclear": False,
        "PartitionScan": False,
        "Partitions": [],
        "MissingPartitions": [],
        "Reference": "",
        "Owner": pwd.getpwnam(USER).pw_uid,
        "Holder": owner.unique_name,
        "Lifetime": "connection",
        "Holds": 0,
        "Locked": "none",
        "Managed": True,
        "State": "attached",
    }
    added = owner.wait_signal("InterfacesAdded", lambda it: it.args[0] == attached.path)
    assert added.args[1][DEVICE]["Node"] == disk.node


@pytest.mark.parametrize(
    "options",
    [
        {"read_only": False},
        {"offset": 0, "size_limit": 0},
        {"sector_size": 0},
        {"sector_size": 512},
        {"partition_scan": False},
        {"direct_io": True},
        {"direct_io": False},
        {"reference": ""},
        {"lock": "none"},
        {"lifetime": "connection"},
        {"allow_overlap": True},
    ],
)
def test_options_that_ask_for_nothing_more_make_no_loop_device(
    owner: Caller, disk: loops.BoundLoop, options: dict[str, Any]
) -> None:
    attached = attach(owner, disk.node, **options)
    assert (attached.node, above(disk.node)) == (disk.node, [])


def test_a_read_only_fd_makes_a_read_only_object(owner: Caller, disk: loops.BoundLoop) -> None:
    for options in ({}, {"read_only": True}):
        attached = attach(owner, disk.node, os.O_RDONLY, **options)
        assert owner.get(attached.path, "ReadOnly") is True
    assert above(disk.node) == []


def test_a_disk_with_big_sectors_says_so(world: World, owner: Caller) -> None:
    with bound(world.image(), "--sector-size", "4096") as disk:
        for options in ({}, {"sector_size": 0}, {"sector_size": 4096}):
            attached = attach(owner, disk.node, **options)
            assert (attached.node, above(disk.node)) == (disk.node, [])
            assert owner.get(attached.path, "SectorSize") == 4096
            assert owner.detach(attached.path) is True


def test_a_disk_whose_partitions_are_scanned_already_needs_none_either(
    world: World, owner: Caller
) -> None:
    with bound(world.image(), "--partscan") as disk, partitions(disk, (4096, 8192)) as (node,):
        attached = attach(owner, disk.node, partition_scan=True)
        assert (attached.node, above(disk.node)) == (disk.node, [])
        properties = owner.get_all(attached.path)
        assert properties["PartitionScan"] is True
        assert [tuple(row) for row in properties["Partitions"]] == [(1, node, 4096, 8192)]


def test_a_whole_partition_is_a_block_device_of_its_own(
    owner: Caller, disk: loops.BoundLoop
) -> None:
    with partitions(disk, (64 * 1024, 4096)) as (node,):
        attached = attach(owner, node)
        assert attached.node == node
        assert attached.path.startswith(f"{MANAGER_PATH}/device/loop{disk.number}p1_")
        properties = owner.get_all(attached.path)
        assert (properties["Size"], properties["SectorSize"]) == (4096, 512)
        assert above(node) == []
        # For as long as it is attached it stays.
        with opened(disk.node, os.O_RDONLY) as fd:
            with pytest.raises(OSError, match="busy"):
                blkpg(fd, DELETE_PARTITION, 1)
        assert owner.detach(attached.path) is True


def test_each_attach_has_an_object_of_its_own(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    first, second = attach(owner, disk.node), attach(owner, disk.node, os.O_RDONLY)
    third = attach(world.caller(USER), disk.node)
    assert len({first.path, second.path, third.path}) == 3
    assert owner.detach(first.path) is True
    assert owner.get(second.path, "ReadOnly") is True
    assert error_of(owner.get_all, first.path).name == UNKNOWN_OBJECT
    assert attach(owner, disk.node).path not in (first.path, second.path, third.path)


# Who sees it


def test_nobody_else_sees_it(world: World, owner: Caller, disk: loops.BoundLoop) -> None:
    strangers = [world.caller(OTHER), world.caller(None), world.caller(ATTACHER)]
    for stranger in strangers:
        wait_known(stranger, disk)
        stranger.sync_signals()
        stranger.signals.clear()
    attached = attach(owner, disk.node)
    name = attached.path.rpartition("/")[2]
    nodes, name_set = f"{MANAGER_PATH}/device", Variant("s", "/dev/sda")
    for stranger in strangers:
        assert attached.path not in stranger.managed_objects()
        (rows,) = stranger.manager("ListDevices")
        assert attached.path not in [row[0] for row in rows]
        assert path_of(disk) in [row[0] for row in rows]
        (xml,) = stranger.call(nodes, f"{BUS}.Introspectable", "Introspect")
        assert name not in xml
        with opened(disk.node, os.O_RDONLY) as fd:
            assert stranger.manager("GetDevice", "h", 0, fds=[fd]) == (path_of(disk),)
        for call in (
            lambda it: it.get_all(attached.path),
            lambda it: it.get(attached.path, "Node"),
            lambda it: it.call(attached.path, PROPERTIES, "Set", "ssv", DEVICE, "Node", name_set),
            lambda it: it.call(attached.path, f"{BUS}.Introspectable", "Introspect"),
            lambda it: it.call(attached.path, f"{BUS}.Peer", "Ping"),
            lambda it: it.detach(attached.path),
            lambda it: it.detach(attached.path, lazy=True),
            lambda it: it.resize(attached.path),
            lambda it: it.open_device(attached.path, "r"),
            lambda it: it.device(attached.path, "Sync", "a{sv}", {}),
            lambda it: it.device(attached.path, "Lock", "sa{sv}", "none", {}),
        ):
            assert error_of(call, stranger).name == UNKNOWN_OBJECT
    assert owner.get(attached.path, "State") == "attached"
    assert owner.detach(attached.path) is True
    for stranger in strangers:
        assert about(stranger.sync_signals(), attached.path) == []


def test_nobody_else_learns_whether_it_is_there(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    stranger = world.caller(OTHER)
    attached = attach(owner, disk.node)
    for call in (
        (DEVICE, "Nonsense"),
        ("org.example.Nonsense", "Detach"),
        (DEVICE, "Detach", "s", "a wrong argument"),
        (MANAGER, "ListDevices"),
        (OBJECT_MANAGER, "GetManagedObjects"),
    ):
        # As for an object that never was.
        for path in (f"{attached.path}0", attached.path):
            assert error_of(stranger.call, path, *call).name == UNKNOWN_OBJECT, (path, call)


def test_its_owner_sees_it_on_every_connection(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    second = world.caller(USER)
    before = second.managed_objects()
    attached = attach(owner, disk.node)
    added = second.wait_signal("InterfacesAdded", lambda it: it.args[0] == attached.path)
    assert added.args[1][DEVICE]["Holder"] == owner.unique_name
    # Others may have got devices meanwhile.
    assert attached.path in second.managed_objects().keys() - before.keys()
    (rows,) = second.manager("ListDevices")
    (row,) = [row for row in rows if row[0] == attached.path]
    assert row[1:] == (
        *(disk.node, disk.diskseq, disk.node.encode() + b"\0"),
        *(pwd.getpwnam(USER).pw_uid, "connection"),
    )
    (xml,) = second.call(f"{MANAGER_PATH}/device", f"{BUS}.Introspectable", "Introspect")
    assert f'name="{attached.path.rpartition("/")[2]}"' in xml
    assert second.get(attached.path, "Node") == disk.node
    assert second.detach(attached.path) is True
    for caller in (owner, second):
        removed = caller.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)
        assert removed.args[1] == [DEVICE]
        assert error_of(caller.get_all, attached.path).name == UNKNOWN_OBJECT


# What can be done to it


def test_detach_drops_it_and_clears_nothing(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    attached = attach(owner, disk.node)
    assert owner.detach(attached.path) is True
    assert error_of(owner.detach, attached.path).name == UNKNOWN_OBJECT
    assert is_bound(disk)
    assert Path(f"/sys/block/loop{disk.number}/loop/autoclear").read_text() == "0\n"
    assert world.device_count() == 0
    world.wait_idle_fds()


def test_it_is_dropped_in_use_too(owner: Caller, disk: loops.BoundLoop) -> None:
    attached = attach(owner, disk.node)
    with opened(disk.node, os.O_RDONLY | os.O_EXCL):
        assert owner.detach(attached.path) is True
    assert is_bound(disk)


def test_it_ends_with_its_client(world: World, owner: Caller, disk: loops.BoundLoop) -> None:
    second = world.caller(USER)
    second.managed_objects()
    attached = attach(owner, disk.node)
    kept = attach(second, disk.node)
    owner.kill()
    second.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)
    assert second.get(kept.path, "State") == "attached"
    assert error_of(second.get_all, attached.path).name == UNKNOWN_OBJECT
    assert is_bound(disk)


def test_sync_writes_back(world: World, owner: Caller) -> None:
    image = world.image()
    with bound(image) as disk, opened(disk.node) as fd:
        attached = Attached(*owner.attach_begin(fd).end())
        os.pwrite(fd, b"dirty".ljust(4096, b"."), 8192)
        assert owner.device(attached.path, "Sync", "a{sv}", {}) == ()
        assert image.read_bytes()[8192:12288] == b"dirty".ljust(4096, b".")
        assert owner.detach(attached.path) is True


@pytest.mark.parametrize(
    ("member", "signature", "args"),
    [
        ("Resize", "a{sv}", [{}]),
        ("Open", "sa{sv}", ["r", {}]),
        ("SetAutoclear", "ba{sv}", [True, {}]),
        ("SetDirectIO", "ba{sv}", [True, {}]),
        ("SetReference", "sa{sv}", ["name", {}]),
        ("SetSectorSize", "ua{sv}", [4096, {}]),
        ("Lock", "sa{sv}", ["shared", {}]),
        ("Lock", "sa{sv}", ["none", {}]),
        ("RescanPartitions", "a{sv}", [{}]),
    ],
)
def test_nothing_else_is_supported(
    world: World, owner: Caller, disk: loops.BoundLoop, member: str, signature: str, args: list[Any]
) -> None:
    attached = attach(owner, disk.node)
    before = owner.get_all(attached.path)
    for caller in (owner, world.caller(USER)):
        error = error_of(caller.device, attached.path, member, signature, *args)
        assert error.name == f"{ERROR}NotSupported"
    assert owner.get_all(attached.path) == before
    assert is_bound(disk)


def test_it_counts_in_the_quota(disk: loops.BoundLoop) -> None:
    """Quota dodges."""
    rules = rules_allowing("org.example.loop1.attach-block-device")
    with make_world(authority=rules, config="[limits]\ndevices_per_user = 2\n") as limited:
        with limited.test() as world:
            owner, other = world.caller(USER), world.caller(OTHER)
            owner.attach(world.image())
            held = attach(owner, disk.node)
            for options in ({}, {"offset": 4096}):
                error = error_of(attach, owner, disk.node, **options)
                assert error.name == f"{BUS}.Error.LimitsExceeded"
            assert error_of(owner.attach, world.image()).name == f"{BUS}.Error.LimitsExceeded"
            attach(other, disk.node)
            assert owner.detach(held.path) is True
            attach(owner, disk.node)
            assert error_of(attach, owner, disk.node).name == f"{BUS}.Error.LimitsExceeded"


def test_it_follows_the_size_of_its_block_device(world: World, owner: Caller) -> None:
    image = world.image()
    stranger = world.caller(None)
    stranger.managed_objects()
    with bound(image) as disk:
        attached = attach(owner, disk.node)
        os.truncate(image, 3 * MIB)
        subprocess.run(["losetup", "--set-capacity", disk.node], check=True)
        changed = owner.wait_signal("PropertiesChanged", lambda it: it.path == attached.path)
        assert changed.args[1] == {"Size": 3 * MIB}
        assert owner.get(attached.path, "Size") == 3 * MIB
        assert about(stranger.sync_signals(), attached.path) == []
        assert owner.detach(attached.path) is True


def test_it_goes_when_another_medium_is_in_the_drive(world: World, owner: Caller) -> None:
    with bound(world.image(), "--read-only") as disk:
        attached = attach(owner, disk.node, os.O_RDONLY)
        with opened(disk.node, os.O_RDONLY) as device, opened(world.image(), os.O_RDONLY) as file:
            fcntl.ioctl(device, LOOP_CHANGE_FD, file)
        owner.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)
        assert error_of(owner.detach, attached.path).name == UNKNOWN_OBJECT
        world.wait_devices(0)
        world.wait_idle_fds()
        changed = loops.look_at(disk.number)
        assert changed
        # Whoever attaches it now has what is in it now.
        again = attach(owner, disk.node, os.O_RDONLY)
        assert again.diskseq == changed.diskseq > attached.diskseq
        assert owner.detach(again.path) is True
        loops.detach_leaked(changed)
    loops.wait_unbound(disk.number, changed.diskseq)


def test_its_hold_keeps_the_block_device_that_its_owner_lets_go_of(
    world: World, owner: Caller
) -> None:
    with bound(world.image()) as disk:
        attached = attach(owner, disk.node)
        subprocess.run(["losetup", "--detach", disk.node], check=True)
        assert is_bound(disk)
        assert owner.get(attached.path, "State") == "attached"
        owner.kill()
        loops.wait_unbound(disk.number, disk.diskseq)


# One's own loop device is a block device too


def test_ones_own_loop_device_can_be_attached_and_goes_last(world: World, owner: Caller) -> None:
    lower = owner.attach(world.image())
    fd = owner.open_device(lower.path, "rw")
    held = Attached(*owner.attach_begin(fd).end())
    assert held.node == lower.node
    upper = Attached(*owner.attach_begin(fd, offset=4096).end())
    loops.used_numbers.add(upper.number)
    assert content(upper.node, 0, 4096) == pattern(4096, 4096)
    fd.close()
    assert owner.detach(lower.path) is False
    assert owner.detach(upper.path) is True
    assert loops.loop_is_bound(lower.number, lower.diskseq)
    assert owner.detach(held.path) is True
    loops.wait_unbound(lower.number, lower.diskseq)


def test_a_tower_of_loop_devices_goes_with_its_client(world: World, owner: Caller) -> None:
    lower = owner.attach(world.image())
    fd = owner.open_device(lower.path, "rw")
    Attached(*owner.attach_begin(fd).end())
    upper = Attached(*owner.attach_begin(fd, size_limit=4096).end())
    loops.used_numbers.add(upper.number)
    owner.kill()
    loops.wait_unbound(upper.number, upper.diskseq)
    loops.wait_unbound(lower.number, lower.diskseq)
    world.wait_devices(0)


def test_a_tower_on_ones_own_partition_goes_with_its_client(world: World, owner: Caller) -> None:
    image = make_gpt(world.new_path(), ((128, 64), (512, 1024)), MIB, owner=USER)
    lower = owner.attach(image, partition_scan=True)
    fd = owner.open_device(lower.path, "rw", partition=2)
    (path, node, _) = owner.attach_begin(fd).end()
    assert (node, owner.get(path, "Size")) == (f"{lower.node}p2", 1024 * 512)
    upper = Attached(*owner.attach_begin(fd, offset=4096).end())
    loops.used_numbers.add(upper.number)
    assert content(upper.node, 0, 4096) == pattern(512 * 512 + 4096, 4096)
    owner.kill()
    loops.wait_unbound(upper.number, upper.diskseq)
    loops.wait_unbound(lower.number, lower.diskseq)
    with loops.Uevents() as events:
        events.wait_until(lambda: loops.strays(lower.number) == (), "the partitions to go")


@pytest.mark.parametrize("ends", ["terminated", "killed"])
def test_the_end_of_loopd_leaves_the_block_device_alone(disk: loops.BoundLoop, ends: str) -> None:
    with make_world(authority=RULES_ALLOW_ALL) as ending, ending.test():
        owner = ending.caller(USER)
        attach(owner, disk.node)
        upper = attach(owner, disk.node, offset=4096)
        loops.used_numbers.add(upper.number)
        if ends == "killed":
            ending.daemon.kill()
        else:
            assert ending.daemon.terminate() == 0
        loops.wait_unbound(upper.number, upper.diskseq)
    assert is_bound(disk)


# Where a loop device is needed


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"offset": 4096}, {"Offset": 4096, "Size": MIB - 4096}),
        ({"size_limit": 4096}, {"SizeLimit": 4096, "Size": 4096}),
        ({"size_limit": MIB}, {"SizeLimit": MIB}),
        ({"offset": 512, "size_limit": 1024}, {"Offset": 512, "SizeLimit": 1024, "Size": 1024}),
        ({"sector_size": 4096}, {"SectorSize": 4096}),
        ({"partition_scan": True}, {"PartitionScan": True}),
        ({"read_only": True}, {"ReadOnly": True}),
        ({"reference": "over a disk"}, {"Reference": "over a disk"}),
        ({"lock": "shared"}, {"Locked": "shared"}),
        ({"lock": "exclusive"}, {"Locked": "exclusive"}),
    ],
)
def test_what_a_block_device_does_not_offer_makes_a_loop_device_over_it(
    world: World,
    owner: Caller,
    disk: loops.BoundLoop,
    options: dict[str, Any],
    changed: dict[str, Any],
) -> None:
    attached = attach(owner, disk.node, **options)
    loops.used_numbers.add(attached.number)
    (loop,) = above(disk.node)
    assert (attached.node, attached.path) == (loop.node, path_of(loop))
    properties = owner.get_all(attached.path)
    node = os.stat(disk.node)
    expected = {
        "Number": loop.number,
        "BackingFile": disk.node.encode() + b"\0",
        "BackingDevice": node.st_dev,
        "BackingInode": node.st_ino,
        "Offset": 0,
        "SizeLimit": 0,
        "Size": MIB,
        "SectorSize": 512,
        "ReadOnly": False,
        "Autoclear": True,
        "PartitionScan": False,
        "Reference": "",
        "Owner": pwd.getpwnam(USER).pw_uid,
        "Lifetime": "connection",
        "Locked": "none",
        "Managed": True,
    } | changed
    assert {name: properties[name] for name in expected} == expected
    start, size = properties["Offset"], properties["Size"]
    assert content(attached.node, 0, 2 * MIB) == pattern(start, size)
    # Everybody sees it, as any loop device.
    assert attached.path in world.caller(ATTACHER).managed_objects()
    assert owner.detach(attached.path) is True
    assert (above(disk.node), is_bound(disk)) == ([], True)


@pytest.mark.alone
def test_who_may_manage_others_has_one_of_a_number_over_it(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    number = 4747
    loops.used_numbers.add(number)
    error = error_of(attach, owner, disk.node, number=number)
    assert error.name == f"{BUS}.Error.InteractiveAuthorizationRequired"
    assert above(disk.node) == []
    attached = attach(world.caller(OTHER), disk.node, number=number)
    assert (attached.node, above(disk.node)[0].number) == (f"/dev/loop{number}", number)


def test_partitions_of_a_block_device_are_made_on_the_loop_device(
    world: World, owner: Caller
) -> None:
    image = make_gpt(world.new_path(), ((128, 64), (512, 1024)), MIB)
    with bound(image) as disk:
        attached = attach(owner, disk.node, partition_scan=True)
        loops.used_numbers.add(attached.number)
        assert [tuple(row) for row in owner.get(attached.path, "Partitions")] == [
            (1, f"{attached.node}p1", 128 * 512, 64 * 512),
            (2, f"{attached.node}p2", 512 * 512, 1024 * 512),
        ]
        assert content(f"{attached.node}p2", 0, MIB) == pattern(512 * 512, 1024 * 512)
        assert loops.partitions(disk.number) == ()
        assert owner.detach(attached.path) is True
        assert loops.strays(attached.number) == ()


@pytest.mark.parametrize("mapping", [{}, {"sector-size": 0}, {"sector-size": 4096}])
def test_its_sector_size_is_that_of_the_block_device(
    world: World, owner: Caller, mapping: dict[str, int]
) -> None:
    """Proves A16: a block device's own, whatever a table on it says."""
    image = make_gpt(world.new_path(), ((128, 64),), MIB)
    with bound(image, "--sector-size", "4096") as disk:
        attached = attach(owner, disk.node, mapping=mapping, offset=4096)
        loops.used_numbers.add(attached.number)
        assert owner.get(attached.path, "SectorSize") == 4096
        assert queue(attached.number, "logical_block_size").read_text() == "4096\n"
        error = error_of(attach, owner, disk.node, size_limit=512, mapping=mapping)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "size-limit")
        assert owner.detach(attached.path) is True


def test_smaller_sectors_than_those_of_the_block_device_work(world: World, owner: Caller) -> None:
    image = world.image()
    with bound(image, "--sector-size", "4096") as disk:
        attached = attach(owner, disk.node, sector_size=512)
        loops.used_numbers.add(attached.number)
        properties = owner.get_all(attached.path)
        assert (properties["SectorSize"], properties["DirectIO"]) == (512, False)
        fd = owner.open_device(attached.path, "rw")
        assert fd.write(b"x" * 512, 512) == 512
        fd.close()
        owner.device(attached.path, "Sync", "a{sv}", {})
        assert image.read_bytes()[:2048] == pattern(0, 512) + b"x" * 512 + pattern(1024, 1024)
        assert owner.detach(attached.path) is True


def test_what_is_written_reaches_the_block_device(world: World, owner: Caller) -> None:
    image = world.image()
    with bound(image) as disk:
        attached = attach(owner, disk.node, offset=8192, size_limit=4096)
        loops.used_numbers.add(attached.number)
        fd = owner.open_device(attached.path, "rw")
        assert fd.write(b"x" * 8192) == 4096
        fd.close()
        owner.device(attached.path, "Sync", "a{sv}", {})
        data = image.read_bytes()
        assert data == pattern(0, 8192) + b"x" * 4096 + pattern(12288, MIB - 12288)
        assert owner.detach(attached.path) is True


def test_it_is_resized_within_the_block_device(world: World, owner: Caller) -> None:
    image = world.image()
    with bound(image) as disk:
        attached = attach(owner, disk.node, offset=4096)
        loops.used_numbers.add(attached.number)
        error = error_of(owner.resize, attached.path, size_limit=MIB)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "size-limit")
        assert owner.resize(attached.path, size_limit=8192) == 8192
        assert owner.resize(attached.path, size_limit=0) == MIB - 4096
        os.truncate(image, 2 * MIB)
        assert owner.resize(attached.path) == MIB - 4096
        subprocess.run(["losetup", "--set-capacity", disk.node], check=True)
        assert owner.resize(attached.path) == 2 * MIB - 4096
        assert owner.detach(attached.path) is True


def test_no_more_is_discarded_than_the_block_device_can(
    owner: Caller, disk: loops.BoundLoop
) -> None:
    limit = queue(disk.number, "discard_max_bytes")
    limit.write_text("65536")
    try:
        with partitions(disk, (4096, 65536)) as (part,):
            for node in (disk.node, part):
                attached = attach(owner, node, reference="discards")
                loops.used_numbers.add(attached.number)
                assert queue(attached.number, "discard_max_bytes").read_text() == "65536\n"
                assert owner.detach(attached.path) is True
    finally:
        # The kernel keeps it for whatever this number has next.
        limit.write_text(str(0xFFFFFFFF // 4096 * 4096))


@pytest.mark.alone  # anybody may be given the number in between
def test_a_limit_of_discards_is_not_left_to_the_next_user_of_the_number(
    disk: loops.BoundLoop, world: World
) -> None:
    limit = queue(disk.number, "discard_max_bytes")
    limit.write_text("65536")
    try:
        # Without a daemon, which removes the device in a moment if nobody probes it.
        with opened(disk.node) as fd:
            upper = loop_attach.attach(
                OwnedFd(os.dup(fd)), backing_file.examine(fd), AttachRequest(reference=b"limited")
            )
        assert queue(upper.number, "discard_max_bytes").read_text() == "65536\n"
        assert loop_device.detach(upper) is True
        with opened(world.image()) as fd:
            following = loop_attach.attach(
                OwnedFd(os.dup(fd)), backing_file.examine(fd), AttachRequest(number=upper.number)
            )
        found, possible = (
            int(queue(following.number, name).read_text())
            for name in ("discard_max_bytes", "discard_max_hw_bytes")
        )
        assert loop_device.detach(following) is True
        loop_device.remove(upper.number)
        # The kernel rounds the two in its own ways.
        assert found >= possible > 65536
    finally:
        limit.write_text(str(0xFFFFFFFF // 4096 * 4096))


# Overlap


def test_two_writable_devices_do_not_share_a_block_device(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    half = MIB // 2
    first = attach(owner, disk.node, size_limit=half)
    loops.used_numbers.add(first.number)
    other = world.caller(OTHER)
    for caller in (owner, other):
        for options in ({"offset": 4096}, {"reference": "x"}, {"read_only": True}):
            if caller is other and options == {"read_only": True}:
                continue  # it is in nobody's way
            error = error_of(attach, caller, disk.node, **options)
            assert error.name == f"{ERROR}Overlap"
            assert first.node in error.message
    second = attach(owner, disk.node, offset=half)
    loops.used_numbers.add(second.number)
    assert error_of(owner.resize, first.path, size_limit=half + 512).name == f"{ERROR}Overlap"
    third = attach(owner, disk.node, reference="x", allow_overlap=True)
    loops.used_numbers.add(third.number)
    assert len(above(disk.node)) == 3


def test_readers_share_a_block_device(owner: Caller, disk: loops.BoundLoop) -> None:
    for flags in (os.O_RDONLY, os.O_RDWR):
        attached = attach(owner, disk.node, flags, read_only=True, reference="reader")
        loops.used_numbers.add(attached.number)
    assert len(above(disk.node)) == 2
    assert error_of(attach, owner, disk.node, reference="writer").name == f"{ERROR}Overlap"


def test_a_partition_is_a_part_of_its_disk(owner: Caller, disk: loops.BoundLoop) -> None:
    quarter = MIB // 4
    with partitions(disk, (quarter, quarter), (2 * quarter, quarter)) as (first, second):
        over = attach(owner, first, reference="first")
        assert content(over.node, 0, MIB) == pattern(quarter, quarter)
        for node, options in (
            (disk.node, {"reference": "disk"}),
            (disk.node, {"size_limit": quarter + 512}),
            (disk.node, {"offset": 2 * quarter - 512, "size_limit": 1024}),
            (first, {"offset": quarter - 512}),
        ):
            error = error_of(attach, owner, node, **options)
            assert error.name == f"{ERROR}Overlap"
            assert over.node in error.message
        before = attach(owner, disk.node, size_limit=quarter)
        behind = attach(owner, second, reference="second")
        end = attach(owner, disk.node, offset=3 * quarter)
        assert error_of(attach, owner, disk.node, offset=2 * quarter).name == f"{ERROR}Overlap"
        assert error_of(owner.resize, before.path, size_limit=quarter + 512).name == (
            f"{ERROR}Overlap"
        )
        for attached in (over, before, behind, end):
            loops.used_numbers.add(attached.number)
            assert owner.detach(attached.path) is True


def test_a_device_of_somebody_elses_over_the_same_block_device_counts(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    quarter = MIB // 4
    with partitions(disk, (quarter, quarter)) as (node,):
        with bound(node) as foreign:
            wait_known(owner, foreign)
            for options in ({"reference": "x"}, {"offset": quarter}):
                error = error_of(attach, owner, disk.node, **options)
                assert error.name == f"{ERROR}Overlap"
                assert foreign.node in error.message
            assert error_of(attach, owner, node, reference="x").name == f"{ERROR}Overlap"
            attached = attach(owner, disk.node, offset=2 * quarter)
            loops.used_numbers.add(attached.number)
            assert owner.detach(attached.path) is True
        with bound(disk.node, "--offset", str(quarter)) as foreign:
            wait_known(owner, foreign)
            assert error_of(attach, owner, node, reference="x").name == f"{ERROR}Overlap"
            attached = attach(owner, disk.node, size_limit=quarter)
            loops.used_numbers.add(attached.number)
            assert owner.detach(attached.path) is True


# Which one an fd names


def test_a_loop_device_is_itself_before_it_is_the_file_of_another(
    world: World, owner: Caller, disk: loops.BoundLoop
) -> None:
    root = world.caller(None)
    wait_known(root, disk)
    upper = attach(owner, disk.node, offset=4096)
    loops.used_numbers.add(upper.number)
    attach(owner, disk.node)
    for caller in (owner, root):
        for node, path in ((disk.node, path_of(disk)), (upper.node, upper.path)):
            with opened(node, os.O_RDONLY) as fd:
                assert caller.manager("GetDevice", "h", 0, fds=[fd]) == (path,)
    with opened(disk.node, os.O_RDONLY) as fd:
        error = error_of(owner.manager, "Detach", "ha{sv}", 0, {}, fds=[fd])
        assert error.name == f"{BUS}.Error.InteractiveAuthorizationRequired"
    with opened(upper.node, os.O_RDONLY) as fd:
        # This fd is an opener.
        assert owner.manager("Detach", "ha{sv}", 0, {}, fds=[fd]) == (False,)
    loops.wait_unbound(upper.number, upper.diskseq)
    assert is_bound(disk)


@pytest.fixture
def drive() -> Iterator[str]:
    """A block device that is no loop device; its node."""
    control = Path("/sys/class/zram-control")
    if not control.exists():
        pytest.skip("the kernel has no zram: no block device to make but loop devices")
    name = f"zram{(control / 'hot_add').read_text().strip()}"
    try:
        Path(f"/sys/block/{name}/disksize").write_text(str(MIB))
        yield f"/dev/{name}"
    finally:
        try:
            Path(f"/sys/block/{name}/reset").write_text("1")
        finally:
            (control / "hot_remove").write_text(name.removeprefix("zram"))


def test_an_fd_of_another_block_device_names_the_object_of_its_owner(
    drive: str, world: World, owner: Caller
) -> None:
    root = world.caller(None)
    first = attach(owner, drive)
    assert first.path.startswith(f"{MANAGER_PATH}/device/{drive.removeprefix('/dev/')}_")
    part = File(drive, os.O_RDONLY)
    with opened(drive, os.O_RDONLY) as fd:
        assert owner.manager("GetDevice", "h", 0, fds=[fd]) == (first.path,)
        assert error_of(owner.manager, "Resize", "ha{sv}", 0, {}, fds=[fd]).name == (
            f"{ERROR}NotSupported"
        )
        second = attach(owner, drive)
        error = error_of(owner.manager, "GetDevice", "h", 0, fds=[fd])
        assert error.name == f"{ERROR}Ambiguous"
        assert owner.detach(second.path) is True
        # A loop device over it is one more.
        upper = attach(owner, drive, offset=4096, read_only=True)
        loops.used_numbers.add(upper.number)
        assert error_of(root.manager, "GetDeviceByNode", "s", drive).name == INVALID_ARGS
        # A user's is told of, and not taken.
        error = error_of(root.manager, "GetDevice", "h", 0, fds=[part])
        assert error.name == f"{ERROR}NoSuchDevice"
        assert upper.node in error.message
        assert error_of(owner.manager, "GetDevice", "h", 0, fds=[fd]).name == f"{ERROR}Ambiguous"
        assert owner.detach(upper.path) is True
        assert owner.manager("Detach", "ha{sv}", 0, {}, fds=[fd]) == (True,)
        assert error_of(root.manager, "GetDevice", "h", 0, fds=[fd]).name == f"{ERROR}NoSuchDevice"
