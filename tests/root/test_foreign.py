# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices that somebody else set up: seen, followed, and nobody's to touch without a yes."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.loop import kernel
from tests.harness import loops
from tests.harness.caller import Caller
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_plain
from tests.harness.polkit import rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import World, make_world

NOBODY = 0xFFFFFFFF


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    rules = rules_allowing(
        *("org.example.loop1.manage-others", "org.example.loop1.open-others-device"),
        users=("games",),
    )
    rules += rules_allowing("org.example.loop1.attach", users=("nobody",))
    return {"authority": rules}


@pytest.fixture
def foreign(world: World) -> Iterator[loops.BoundLoop]:
    """A device made by losetup, and what it is."""
    node = loops.losetup(world.image())
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    yield loop
    loops.detach_leaked(loop)


def losetup(*arguments: str) -> str:
    done = subprocess.run(["losetup", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def path_of(loop: loops.BoundLoop) -> str:
    return f"/org/example/Loop1/device/loop{loop.number}_{loop.diskseq}"


def wait_added(caller: Caller, loop: loops.BoundLoop) -> None:
    """Wait until loopd knows it, by the signal or because it knew before the caller listened."""
    if path_of(loop) not in caller.managed_objects():
        caller.wait_signal("InterfacesAdded", lambda each: each.args[0] == path_of(loop))


def test_it_comes_and_goes_with_signals(world: World) -> None:
    caller = world.caller()
    node = loops.losetup(world.image())
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    wait_added(caller, loop)
    losetup("-d", node)
    caller.wait_signal("InterfacesRemoved", lambda each: each.args[0] == path_of(loop))
    with pytest.raises(CallError, match="UnknownObject"):
        caller.get_all(path_of(loop))


def test_its_properties_say_whose_it_is_not(world: World, foreign: loops.BoundLoop) -> None:
    caller = world.caller()
    wait_added(caller, foreign)
    told = caller.get_all(path_of(foreign))
    assert told["Node"] == foreign.node
    assert (told["Managed"], told["Owner"], told["Holder"], told["Lifetime"]) == (
        False,
        NOBODY,
        "",
        "",
    )
    assert told["AttachedAt"] == 0
    assert told["Autoclear"] is False
    image = Path(told["BackingFile"].rstrip(b"\0").decode()).stat()
    assert (told["BackingDevice"], told["BackingInode"]) == (image.st_dev, image.st_ino)
    assert caller.get("/org/example/Loop1", "DeviceCount", "org.example.Loop1") == 0


def test_it_is_found_by_node_and_by_file(world: World, foreign: loops.BoundLoop) -> None:
    caller = world.caller()
    wait_added(caller, foreign)
    assert caller.manager("GetDeviceByNode", "s", foreign.node) == (path_of(foreign),)
    file = caller.get_all(path_of(foreign))["BackingFile"].rstrip(b"\0").decode()
    assert caller.manager("GetDevice", "h", 0, fds=[file]) == (path_of(foreign),)


def test_a_devices_size_is_followed(world: World, foreign: loops.BoundLoop) -> None:
    caller = world.caller()
    wait_added(caller, foreign)
    told = caller.get_all(path_of(foreign))
    file = Path(told["BackingFile"].rstrip(b"\0").decode())
    with file.open("r+b") as opened:
        opened.truncate(2 * told["Size"])
    losetup("-c", foreign.node)
    caller.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == path_of(foreign) and it.args[1].get("Size") == 2 * told["Size"],
    )


@pytest.mark.parametrize("member", ["Detach", "Resize", "Sync"])
def test_an_ordinary_user_may_do_nothing_to_it(
    world: World, foreign: loops.BoundLoop, member: str
) -> None:
    caller = world.caller()
    wait_added(caller, foreign)
    with pytest.raises(CallError, match="InteractiveAuthorizationRequired"):
        caller.device(path_of(foreign), member, "a{sv}", {})
    with pytest.raises(CallError, match="InteractiveAuthorizationRequired"):
        caller.open_device(path_of(foreign), "r")
    assert loops.loop_is_bound(foreign.number, foreign.diskseq)


def test_who_may_manage_others_can_read_resize_and_detach_it(
    world: World, foreign: loops.BoundLoop
) -> None:
    manager = world.caller("games")
    wait_added(manager, foreign)
    fd = manager.open_device(path_of(foreign), "r")
    assert len(fd.read(4096)) == 4096
    fd.close()
    size = manager.get(path_of(foreign), "Size")
    assert manager.resize(path_of(foreign), size_limit=size // 2) == size // 2
    with pytest.raises(CallError, match=r"InvalidArgs.*not inside the file"):
        manager.resize(path_of(foreign), size_limit=2 * size)
    assert manager.get(path_of(foreign), "Size") == size // 2
    assert manager.detach(path_of(foreign)) is True
    assert not loops.loop_is_bound(foreign.number, foreign.diskseq)


def test_the_end_of_loopd_leaves_it_alone(world: World, foreign: loops.BoundLoop) -> None:
    with make_world() as other, other.test():
        wait_added(other.caller(), foreign)
        assert other.daemon.terminate() == 0
    assert loops.loop_is_bound(foreign.number, foreign.diskseq)


def test_attaching_its_file_again_is_an_overlap(world: World, foreign: loops.BoundLoop) -> None:
    manager = world.caller("games")
    wait_added(manager, foreign)
    file = manager.get(path_of(foreign), "BackingFile").rstrip(b"\0").decode()
    root = world.caller(None)
    with pytest.raises(CallError, match="Overlap"):
        root.attach(file)


# Names


def rename(loop: loops.BoundLoop, name: bytes) -> None:
    """Set lo_file_name to any bytes; the kernel tells nobody."""
    fd = os.open(loop.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = kernel.loop_get_status64(fd)
        info.lo_file_name = name
        kernel.loop_set_status64(fd, info)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (b"caf\xc3", "caf\ufffd"),
        (b"\xff\xfe\xfd", "\ufffd\ufffd\ufffd"),
        (b"two\nlines", "two\nlines"),
        (b"x" * 63, "x" * 63),
    ],
)
def test_a_name_that_is_no_text_costs_nobody_the_bus(
    world: World, foreign: loops.BoundLoop, name: bytes, told: str
) -> None:
    """Invalid UTF-8: losetup cuts a long path anywhere, within a character too."""
    rename(foreign, name)
    # A loopd that starts now is the one to see it.
    with make_world() as other, other.test():
        caller = other.caller()
        wait_added(caller, foreign)
        assert caller.get(path_of(foreign), "Reference") == told
        assert path_of(foreign) in caller.managed_objects()
        assert other.daemon.process.status is None


@pytest.mark.parametrize("name", [b"new\nline", b"caf\xc3", b"x (deleted)", b"x" * 255])
def test_a_file_of_any_name_is_shown_as_it_is(world: World, name: bytes) -> None:
    """CVE-2014-0004."""
    caller = world.caller()
    path = os.fsencode(world.files) + b"/" + name
    make_plain(Path(os.fsdecode(path)))
    node = loops.losetup(os.fsdecode(path))
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    try:
        wait_added(caller, loop)
        shown = caller.get(path_of(loop), "BackingFile")
        # sysfs writes a newline as it is, and ends with one.
        assert shown == path + b"\0"
        rows = caller.manager("ListDevices")[0]
        assert [row[3] for row in rows if row[0] == path_of(loop)] == [shown]
    finally:
        loops.detach_leaked(loop)
        caller.wait_signal("InterfacesRemoved", lambda each: each.args[0] == path_of(loop))


# Hanging


@contextmanager
def stopped(fuse: Fuse) -> Iterator[None]:
    """Whoever asks its filesystem for anything waits until the end of the block."""
    fuse.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        fuse.process.signal(signal.SIGCONT)


def test_one_that_hangs_is_described_without_it_and_stops_nobody(world: World) -> None:
    """Foreign devices that hang."""
    with Fuse() as fuse:
        node = loops.losetup(fuse.file)
        loop = loops.look_at(int(node.removeprefix("/dev/loop")))
        assert loop
        try:
            # One that is there already when loopd starts.
            with stopped(fuse), make_world() as late, late.test():
                caller = late.caller()
                told = caller.get_all(path_of(loop))
                assert told["BackingFile"] == os.fsencode(fuse.file) + b"\0"
                assert (told["Size"], told["BackingInode"]) == (MIB, 0)
                attached = late.caller(None).attach(late.image())
                assert path_of(loop) in caller.managed_objects()
                assert caller.manager("GetDeviceByNode", "s", node) == (path_of(loop),)
                assert late.caller(None).detach(attached.path) is True
                # It need not be stopped while it waits for the file.
                fuse.process.signal(signal.SIGCONT)
        finally:
            loops.detach_leaked(loop)
            loops.wait_unbound(loop.number, loop.diskseq)


# Events that are lost


SMALL_BUFFER = "from loopd.daemon.host import uevents as monitor; monitor._ROOM = 4096"


@pytest.fixture
def forgetful(world: World) -> Iterator[World]:
    """A loopd that soon loses events, and the files of `world`."""
    rules = rules_allowing("org.example.loop1.attach", users=("nobody",))
    with make_world(authority=rules, prelude=SMALL_BUFFER) as made, made.test() as testing:
        yield testing


def overflow(number: int) -> None:
    """Have the kernel tell of a device more often than a socket has room for."""
    for _ in range(300):
        Path(f"/sys/block/loop{number}/uevent").write_text("change")


def test_after_lost_events_all_devices_are_looked_at_again(
    forgetful: World, foreign: loops.BoundLoop
) -> None:
    world = forgetful
    caller = world.caller()
    wait_added(caller, foreign)
    daemon = world.daemon
    image = world.image()
    daemon.process.signal(signal.SIGSTOP)
    try:
        overflow(foreign.number)
        # What happens now nobody will tell.
        loops.detach_leaked(foreign)
        loops.wait_unbound(foreign.number, foreign.diskseq)
        node = loops.losetup(image)
        loop = loops.look_at(int(node.removeprefix("/dev/loop")))
        assert loop
    finally:
        daemon.process.signal(signal.SIGCONT)
    try:
        wait_added(caller, loop)
        caller.wait_signal("InterfacesRemoved", lambda each: each.args[0] == path_of(foreign))
        # And the ones that come after them are heard.
        image.open("r+b").truncate(2 * MIB)
        losetup("-c", node)
        caller.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == path_of(loop) and it.args[1].get("Size") == 2 * MIB,
        )
        # Not before: loopd also looks at devices that somebody asks about.
        assert "events of the kernel were lost" in daemon.log
    finally:
        loops.detach_leaked(loop)
        caller.wait_signal("InterfacesRemoved", lambda each: each.args[0] == path_of(loop))


# What others do to a device of loopd's


def test_a_device_of_ours_that_root_resizes_is_followed(world: World) -> None:
    caller = world.caller()
    image = world.image()
    attached = caller.attach(image)
    os.truncate(image, 2 * MIB)
    losetup("-c", attached.node)
    caller.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1].get("Size") == 2 * MIB,
    )
    assert caller.get(attached.path, "Size") == 2 * MIB
    assert caller.detach(attached.path)


def test_a_device_of_ours_that_root_detaches_stays_until_its_lease_ends(world: World) -> None:
    """While loopd has it open the kernel only remembers; then everything goes at once."""
    caller = world.caller()
    attached = caller.attach(world.image())
    losetup("-d", attached.node)
    assert caller.get(attached.path, "State") == "attached"
    assert caller.resize(attached.path, size_limit=4096) == 4096
    assert loops.loop_is_bound(attached.number, attached.diskseq)
    assert world.device_count() == 1
    caller.kill()
    loops.wait_unbound(attached.number, attached.diskseq)
    world.wait_devices(0)


def test_partitions_that_root_makes_and_removes_are_followed(world: World) -> None:
    caller = world.caller()
    attached = caller.attach(world.image(4 * MIB))
    fd = os.open(attached.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.blkpg_add_partition(fd, 5, MIB, MIB)
        caller.wait_signal(
            "PropertiesChanged",
            lambda it: it.args[1].get("Partitions") == [(5, f"{attached.node}p5", MIB, MIB)],
        )
        kernel.blkpg_del_partition(fd, 5)
        caller.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == attached.path and it.args[1].get("Partitions") == [],
        )
    finally:
        os.close(fd)
    assert caller.detach(attached.path)
