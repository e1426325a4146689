# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who asks about a device hears how it is now: losetup and others change it and tell nobody."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loopd.loop import kernel
from tests.harness import loops
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, PROPERTIES, Attached, Caller
from tests.harness.deadline import Deadline
from tests.harness.images import MIB
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.raw import RawClient
from tests.harness.world import World, make_world


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with make_world(authority=RULES_ALLOW_ALL) as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def rename(node: str, file: Path) -> None:
    file.rename(f"{file}.renamed")


def delete(node: str, file: Path) -> None:
    file.unlink()


# Name: what is done, and what is told of it then.
CHANGES: dict[str, tuple[Callable[[str, Path], object], str, object]] = {
    "sector size": (
        lambda node, _: run("losetup", "--sector-size", "4096", node),
        "SectorSize",
        4096,
    ),
    "direct I/O": (lambda node, _: run("losetup", "--direct-io=on", node), "DirectIO", True),
    "read-only": (lambda node, _: run("blockdev", "--setro", node), "ReadOnly", True),
    "renamed": (rename, "BackingFile", b".renamed\0"),
    "deleted": (delete, "BackingFile", b" (deleted)\0"),
}


def get(caller: Caller, path: str, name: str) -> object:
    return caller.get(path, name)


def get_all(caller: Caller, path: str, name: str) -> object:
    return caller.get_all(path)[name]


def get_objects(caller: Caller, path: str, name: str) -> object:
    return caller.managed_objects()[path][DEVICE][name]


def list_devices(caller: Caller, path: str, name: str) -> object:
    assert name == "BackingFile"
    (row,) = (row for row in caller.manager("ListDevices")[0] if row[0] == path)
    return row[3]


# ListDevices tells nothing else that changes without a word.
ASKS = [(what, ask) for what in CHANGES for ask in (get, get_all, get_objects)]
ASKS += [(what, list_devices) for what in ("renamed", "deleted")]


@pytest.fixture(params=["managed", "foreign"])
def device(request: pytest.FixtureRequest, world: World) -> Iterator[tuple[Caller, Attached, Path]]:
    """A device of loopd's or of losetup's, and its file."""
    image = world.image(MIB)
    caller = world.caller()
    if request.param == "managed":
        yield caller, caller.attach(image, direct_io=False), image
        return
    node = loops.losetup(image)
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    path = f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"
    try:
        if path not in caller.managed_objects():
            caller.wait_signal("InterfacesAdded", lambda each: each.args[0] == path)
        yield caller, Attached(path, node, loop.diskseq), image
    finally:
        loops.detach_leaked(loop)
        loops.wait_unbound(loop.number, loop.diskseq)


@pytest.mark.parametrize(("what", "ask"), ASKS)
def test_what_is_told_is_how_it_is_now(
    device: tuple[Caller, Attached, Path],
    what: str,
    ask: Callable[[Caller, str, str], object],
) -> None:
    caller, attached, image = device
    change, name, expected = CHANGES[what]
    before = ask(caller, attached.path, name)
    assert before != expected
    try:
        change(attached.node, image)
        told = ask(caller, attached.path, name)
    finally:
        run("blockdev", "--setrw", attached.node)  # which would outlive the binding
    if isinstance(told, bytes):
        assert isinstance(expected, bytes)
        assert told == os.fsencode(image) + expected
    else:
        assert told == expected
    # Those who follow the device hear of it before the one who asked.
    caller.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1].get(name) == told,
        timeout=0,
    )


def test_a_flood_of_questions_is_answered_and_what_comes_after_it_is_true(world: World) -> None:
    """Within the limits: a device that many ask about is looked at once a second."""
    caller = world.caller()
    attached = caller.attach(world.image(), direct_io=False)
    with world.bus.connect("games") as client:
        ask = (attached.path, PROPERTIES, "Get", "ss", [DEVICE, "ReadOnly"])
        for _ in range(100):
            client.call(*ask)
        with loops.set_read_only(attached.node):
            deadline = Deadline()
            while not client.call(*ask).body[0].value:
                assert deadline.remaining


def autoclear(number: int) -> bool:
    return kernel.loop_attribute(number, "loop/autoclear") == b"1"


def wait_autoclear(client: RawClient, attached: Attached, *, wanted: bool) -> None:
    """Wait until the kernel and loopd say so, each look being paced by an answer."""
    deadline = Deadline()
    while True:
        ask = (attached.path, PROPERTIES, "Get", "ss", [DEVICE, "Autoclear"])
        (told,) = client.call(*ask).body
        if told.value == autoclear(attached.number) == wanted:
            return
        assert deadline.remaining, (told.value, autoclear(attached.number))


@pytest.mark.parametrize("asked", [True, False])
def test_a_device_that_is_to_stay_does_so_after_losetup_d(asked: bool) -> None:
    """Autoclear that others set: the last close is loopd's, at its end."""
    with make_world() as world:
        loop = None
        try:
            with world.test():
                root = world.caller(None)
                attached = root.attach(world.image(owner=None), lifetime="system")
                loop = loops.look_at(attached.number)
                run("losetup", "-d", attached.node)
                assert autoclear(attached.number)
                if asked:
                    with world.bus.connect() as client:
                        wait_autoclear(client, attached, wanted=False)
                    assert "autoclear was set by others" in world.daemon.log
                assert world.daemon.terminate() == 0
                assert loops.loop_is_bound(attached.number, attached.diskseq)
                assert not autoclear(attached.number)
        finally:
            if loop:
                loops.detach_leaked(loop)


def test_a_device_that_may_go_is_not_kept(world: World) -> None:
    """SetAutoclear says what its lifetime `system` is to mean."""
    root = world.caller(None)
    attached = root.attach(world.image(owner=None), lifetime="system")
    root.device(attached.path, "SetAutoclear", "ba{sv}", True, {})
    assert root.get(attached.path, "Autoclear") is True
    root.device(attached.path, "SetReference", "sa{sv}", "name", {})
    assert autoclear(attached.number)
    assert root.get(attached.path, "Autoclear") is True
    assert root.detach(attached.path) is True


def test_who_names_a_device_that_has_just_gone_is_told_so(world: World) -> None:
    caller = world.caller()
    node = loops.losetup(world.image())
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    path = f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"
    if path not in caller.managed_objects():
        caller.wait_signal("InterfacesAdded", lambda each: each.args[0] == path)
    assert caller.call(MANAGER_PATH, MANAGER, "GetDeviceByNode", "s", node) == (path,)
    loops.detach_leaked(loop)
    loops.wait_unbound(loop.number, loop.diskseq)
    assert path not in caller.managed_objects()
