# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices that somebody else set up: seen, followed, and nobody's to touch without a yes."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import loops
from tests.harness.caller import Caller
from tests.harness.polkit import rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import World, make_world

NOBODY = 0xFFFFFFFF


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    rules = rules_allowing("org.example.loop1.manage-others", users=("games",))
    with make_world(authority=rules) as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


@pytest.fixture
def foreign(world: World) -> Iterator[loops.BoundLoop]:
    """A device made by losetup, and what it is."""
    node = losetup("-f", "--show", str(world.image()))
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
    node = losetup("-f", "--show", str(world.image()))
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
        "PropertiesChanged", lambda each: each.args[1].get("Size") == 2 * told["Size"]
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
