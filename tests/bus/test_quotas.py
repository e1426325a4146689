# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits: devices, calls under way and open questions, of one user and of all together."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import broker, loops
from tests.harness.area import area
from tests.harness.broker import PrivateBroker
from tests.harness.bus import PrivateBus
from tests.harness.caller import MANAGER, MANAGER_PATH, Attached, Call, Caller
from tests.harness.images import make_gpt
from tests.harness.polkit import Answer
from tests.harness.raw import BUS
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

# Calls and devices are counted above the reading and writing of messages.
pytestmark = pytest.mark.one_library

ATTACH = "org.example.loop1.attach"
SIZE = 4096
THIRD = "daemon"
PER_USER = 3
IN_ALL = 5

LIMITS = f"""
[limits]
devices_per_user = {PER_USER}
devices = {IN_ALL}
questions_per_user = 100
"""
CALLS = """
[limits]
calls_per_user = 20
calls = 48
questions_per_user = 100
"""


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    return {"config": LIMITS}


def attach(world: World, caller: Caller, **options: Any) -> Attached:
    return caller.attach(world.image(SIZE, mode=0o666), **options)


def refused(call: Callable[..., Any], *args: Any, **named: Any) -> str:
    """Return the text of LimitsExceeded."""
    with pytest.raises(CallError) as caught:
        call(*args, **named)
    assert caught.value.name == f"{BUS}.Error.LimitsExceeded"
    return caught.value.message


def ended(call: Call) -> str:
    """Wait for an Attach; return the name of its error, empty if it has none."""
    try:
        loops.used_numbers.add(Attached(*call.end()).number)
    except CallError as exc:
        return exc.name
    return ""


def prove(world: World, caller: Caller) -> None:
    """Have a call of a user's authorized, which has as much as one connection before."""
    world.polkit.on(ATTACH, Answer.ALLOW)
    caller.detach(attach(world, caller).path)


# Devices


def test_a_user_has_so_many_devices_by_all_connections(world: World) -> None:
    """Quota dodges."""
    first, second = world.caller(), world.caller()
    devices = [attach(world, caller) for caller in (first, second, first)]
    for caller in (first, second):
        text = refused(attach, world, caller)
        assert f" {PER_USER} loop devices" in text
        assert "limit" in text
    assert world.device_count() == PER_USER
    first.detach(devices[1].path)
    attach(world, first)
    refused(attach, world, second)


def test_one_users_devices_are_not_anothers(world: World) -> None:
    user, other = world.caller(), world.caller(OTHER)
    for _ in range(PER_USER):
        attach(world, user)
    refused(attach, world, user)
    attach(world, other)


def test_the_end_of_a_client_gives_its_places_back(world: World) -> None:
    leaving, staying = world.caller(), world.caller()
    for _ in range(PER_USER):
        attach(world, leaving)
    refused(attach, world, staying)
    leaving.kill()
    world.wait_devices(0)
    for _ in range(PER_USER):
        attach(world, staying)
    refused(attach, world, staying)


def test_root_is_bound_by_the_limit_in_all_alone(world: World) -> None:
    root = world.caller(None)
    devices = [attach(world, root) for _ in range(IN_ALL)]
    text = refused(attach, world, root)
    assert f"{IN_ALL} loop devices in use" in text
    root.detach(devices[0].path)
    attach(world, root)


def test_all_users_together_have_so_many_devices(world: World) -> None:
    user, other, root = world.caller(), world.caller(OTHER), world.caller(None)
    for _ in range(PER_USER):
        attach(world, user)
    devices = [attach(world, other) for _ in range(IN_ALL - PER_USER)]
    for caller in (other, root):
        assert f"{IN_ALL} loop devices in use" in refused(attach, world, caller)
    other.detach(devices[0].path)
    attach(world, root)
    refused(attach, world, other)


def test_users_who_take_all_devices_they_get_leave_some_to_the_next_and_to_root(
    new_world: Callable[..., World],
) -> None:
    """Limits in all."""
    world = new_world(config="[limits]\ndevices = 24\n")
    user, other, third, root = (world.caller(each) for each in (USER, OTHER, THIRD, None))
    for caller, count in ((user, 10), (other, 5), (third, 4)):
        for _ in range(count):
            attach(world, caller)
        assert "the rest is kept for others" in refused(attach, world, caller)
    for _ in range(24 - 10 - 5 - 4):
        attach(world, root)
    assert "24 loop devices in use" in refused(attach, world, root)


def test_a_device_counts_until_its_last_user_has_closed_it(world: World) -> None:
    """Quota dodges."""
    caller = world.caller()
    devices = [attach(world, caller) for _ in range(PER_USER)]
    fd = caller.open_device(devices[0].path, "r")
    assert caller.detach(devices[0].path) is False
    assert caller.get(devices[0].path, "State") == "detaching"
    assert world.device_count() == PER_USER
    refused(attach, world, caller)
    fd.close()
    caller.wait_signal("InterfacesRemoved", lambda it: it.args[0] == devices[0].path)
    attach(world, caller)


def test_a_device_in_use_by_a_client_that_died_counts_for_its_user(world: World) -> None:
    """Quota dodges."""
    leaving, staying = world.caller(), world.caller()
    devices = [attach(world, leaving) for _ in range(PER_USER)]
    fd = staying.open_device(devices[0].path, "r")
    leaving.kill()
    world.wait_devices(1)
    for _ in range(PER_USER - 1):
        attach(world, staying)
    refused(attach, world, staying)
    fd.close()
    staying.wait_signal("InterfacesRemoved", lambda it: it.args[0] == devices[0].path)
    attach(world, staying)


def test_calls_at_the_same_time_get_no_more_than_there_is(world: World) -> None:
    """Quota dodges."""
    callers = [world.caller(), world.caller()]
    for _ in range(3):
        world.polkit.reset(Answer.HANG)
        calls = [
            caller.attach_begin(world.image(SIZE)) for caller in callers for _ in range(PER_USER)
        ]
        world.polkit.wait_question(ATTACH, count=len(calls))
        # They all hear yes in the same moment.
        world.polkit.release(Answer.ALLOW)
        names = sorted(map(ended, calls))
        assert names == [""] * PER_USER + [f"{BUS}.Error.LimitsExceeded"] * PER_USER
        assert world.device_count() == PER_USER
        for caller in callers:
            for path, interfaces in caller.managed_objects().items():
                if interfaces[f"{MANAGER}.Device"]["Holder"] == caller.unique_name:
                    caller.detach(path)


def test_what_fails_takes_no_place(world: World) -> None:
    """libblockdev #1171."""
    caller = world.caller()
    # A sector of 128 KiB is more than a kernel takes, which shows when it is asked.
    image = world.image(256 * 1024)
    for _ in range(2 * PER_USER):
        with pytest.raises(CallError, match="sector-size"):
            caller.attach(image, sector_size=128 * 1024)
    world.polkit.on(ATTACH, Answer.DENY)
    for _ in range(2 * PER_USER):
        with pytest.raises(CallError, match="AccessDenied"):
            caller.attach(image)
    world.polkit.on(ATTACH, Answer.ALLOW)
    for _ in range(PER_USER):
        attach(world, caller)
    refused(attach, world, caller)


def test_the_properties_tell_the_limits(world: World) -> None:
    caller = world.caller()
    assert caller.get(MANAGER_PATH, "MaxDevicesPerUser", MANAGER) == PER_USER
    assert caller.get(MANAGER_PATH, "MaxDevices", MANAGER) == IN_ALL


# Calls under way


def hang(world: World, caller: Caller, count: int) -> list[Call]:
    """Begin calls that last until polkit answers; the questions come in the order of the calls."""
    world.polkit.on(ATTACH, Answer.HANG)
    calls = []
    for _ in range(count):
        asked = len(world.polkit.questions)
        calls.append(caller.attach_begin(world.image(SIZE, mode=0o666)))
        world.polkit.wait_question(ATTACH, count=asked + 1)
    return calls


def test_a_connection_has_16_calls_under_way(new_world: Callable[..., World]) -> None:
    """Transport rule 6 (handlers)."""
    world = new_world(config=CALLS)
    caller, same_user, root = world.caller(), world.caller(), world.caller(None)
    prove(world, same_user)
    world.polkit.questions.clear()
    calls = hang(world, caller, 16)
    for call in (
        lambda: caller.manager("ListDevices"),
        lambda: caller.get_all(MANAGER_PATH, MANAGER),
        lambda: caller.attach(world.image(SIZE)),
    ):
        text = refused(call)
        assert "16 calls" in text
        assert "connection" in text
    for each in (same_user, root):
        each.manager("ListDevices")
    world.polkit.release(Answer.DENY, world.polkit.questions[0])
    assert ended(calls[0]) == f"{BUS}.Error.AccessDenied"
    caller.manager("ListDevices")
    world.polkit.release(Answer.ALLOW)
    assert set(map(ended, calls[1:])) == {""}
    caller.manager("ListDevices")


def test_a_user_has_so_many_calls_under_way_by_all_connections(
    new_world: Callable[..., World],
) -> None:
    """Quota dodges."""
    world = new_world(config=CALLS)
    first, second, other = world.caller(), world.caller(), world.caller(OTHER)
    prove(world, first)
    calls = hang(world, first, 12) + hang(world, second, 8)
    for caller in (first, second):
        assert "calls of this user" in refused(caller.manager, "ListDevices")
    third = world.caller()
    refused(third.manager, "ListDevices")
    other.manager("ListDevices")
    first.kill()
    # The news of its end, and of its calls', is before what is asked later.
    world.bus.wait_released(first.unique_name)
    world.device_count()
    for caller in (second, third):
        caller.manager("ListDevices")
    world.polkit.release(Answer.DENY)
    assert set(map(ended, calls[12:])) == {f"{BUS}.Error.AccessDenied"}


@pytest.mark.parametrize("bus_type", [PrivateBus, PrivateBroker])
def test_users_who_have_all_calls_they_get_leave_some_to_the_next_and_to_root(
    new_world: Callable[..., World], bus_type: type[PrivateBus]
) -> None:
    """Limits in all, Transport rule 6 (handlers)."""
    if bus_type is PrivateBroker and not broker.installed():
        pytest.skip("dbus-broker is not installed")
    world = new_world(config=CALLS, bus_type=bus_type)
    user, same_user, other, root = map(world.caller, (USER, USER, OTHER, None))
    for caller in (user, other):
        prove(world, caller)
    calls = hang(world, user, 12) + hang(world, same_user, 8) + hang(world, other, 11)
    assert "calls of this user" in refused(user.manager, "ListDevices")
    # Less than a user may have, and half of what the first one has left.
    assert "too many calls are under way" in refused(other.manager, "ListDevices")
    for caller in (root, world.caller(THIRD)):
        caller.manager("ListDevices")
    world.polkit.release(Answer.DENY)
    assert set(map(ended, calls)) == {f"{BUS}.Error.AccessDenied"}
    other.manager("ListDevices")


def test_a_user_of_whom_no_call_was_authorized_has_as_much_as_one_connection(
    new_world: Callable[..., World],
) -> None:
    """Limits in all."""
    world = new_world(config=CALLS)
    first, second = world.caller(), world.caller()
    calls = hang(world, first, 10) + hang(world, second, 6)
    assert "calls of this user" in refused(second.manager, "ListDevices")
    world.polkit.release(Answer.DENY)
    assert set(map(ended, calls)) == {f"{BUS}.Error.AccessDenied"}
    prove(world, first)
    calls = hang(world, first, 10) + hang(world, second, 7)
    world.polkit.release(Answer.DENY)
    assert set(map(ended, calls)) == {f"{BUS}.Error.AccessDenied"}


def test_a_refused_call_leaves_no_fd_and_takes_no_place(new_world: Callable[..., World]) -> None:
    """CVE-2014-3532, CVE-2020-12049."""
    world = new_world(config=CALLS)
    caller = world.caller()
    calls = hang(world, caller, 16)
    with world.daemon.same_fds():
        for _ in range(40):
            refused(caller.attach, world.image(SIZE))
    world.polkit.release(Answer.DENY)
    assert set(map(ended, calls)) == {f"{BUS}.Error.AccessDenied"}
    caller.manager("ListDevices")


GATED_FSYNC = """
import fcntl
from loopd.loop import kernel
fsync = kernel.fsync
def gated(fd):
    with open({gate!r}) as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
    fsync(fd)
kernel.fsync = gated
"""


@contextmanager
def closed(gate: Path) -> Iterator[None]:
    """Keep loopd's fsync waiting until the block ends."""
    fd = os.open(gate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def test_roots_calls_are_bound_by_the_limit_in_all_alone(new_world: Callable[..., World]) -> None:
    with area("gate") as directory:
        gate = directory / "gate"
        gate.touch()
        world = new_world(config=CALLS, prelude=GATED_FSYNC.format(gate=str(gate)))
        callers = [world.caller(None) for _ in range(3)]
        attached = attach(world, callers[0])
        with closed(gate):
            calls = [
                caller.call_begin(attached.path, f"{MANAGER}.Device", "Sync", "a{sv}", {})
                for caller in callers
                for _ in range(16)
            ]
            user = world.caller(USER)
            assert "too many calls" in refused(user.manager, "ListDevices")
        for call in calls:
            assert call.end() == ()
        user.manager("ListDevices")
        for caller in callers:
            caller.close()
        world.wait_devices(0)


# Questions


def test_a_user_has_4_open_questions_to_polkit(new_world: Callable[..., World]) -> None:
    """Quota dodges."""
    world = new_world(config="")
    first, second = world.caller(), world.caller()
    other, root = world.caller(OTHER), world.caller(None)
    calls = hang(world, first, 3) + hang(world, second, 1)
    for caller in (first, second):
        text = refused(attach, world, caller)
        assert "4 open questions to polkit" in text
    assert len(world.polkit.questions) == 4
    attach(world, root)
    calls += hang(world, other, 4)
    refused(attach, world, other)
    # What needs no question is free.
    first.manager("ListDevices")

    world.polkit.release(Answer.ALLOW, world.polkit.questions[0])
    assert ended(calls[0]) == ""
    calls += hang(world, second, 1)
    refused(attach, world, first)
    world.polkit.release(Answer.DENY)
    assert set(map(ended, calls[1:])) == {f"{BUS}.Error.AccessDenied"}
    world.polkit.on(ATTACH, Answer.ALLOW)
    attach(world, first)


def test_the_questions_of_a_client_that_died_do_not_count(new_world: Callable[..., World]) -> None:
    world = new_world(config="")
    leaving, staying = world.caller(), world.caller()
    hang(world, leaving, 4)
    refused(attach, world, staying)
    questions = world.polkit.open_questions()
    leaving.kill()
    for question in questions:
        world.polkit.wait_cancelled(question)
    world.polkit.on(ATTACH, Answer.ALLOW)
    attach(world, staying)


# Uevents

EVENTS = """
from loopd.daemon.host import uevent_budget as uevents
uevents._BURST, uevents._RATE = 30, 1
"""


def test_who_makes_and_removes_partitions_too_often_waits_and_nobody_else_does(
    new_world: Callable[..., World],
) -> None:
    """Within the limits."""
    world = new_world(config="[deadlines]\noperation = 2\n", prelude=EVENTS)
    parts = [(2048 + 8 * number, 8) for number in range(40)]
    image = make_gpt(world.new_path(), parts, owner=USER, mode=0o666)
    caller, same_user = world.caller(), world.caller()
    other, root = world.caller(OTHER), world.caller(None)
    device = caller.attach(image, partition_scan=True)
    rescan = f"{MANAGER}.Device", "RescanPartitions", "a{sv}", {}
    for call in (
        lambda: same_user.attach(image, partition_scan=True, allow_overlap=True),
        lambda: attach(world, same_user),
        lambda: caller.call(device.path, *rescan),
    ):
        with pytest.raises(CallError, match=r"TimedOut.*too often for udev"):
            call()
    # It is not kept from letting go, nor from what udev does not hear of.
    caller.manager("ListDevices")
    caller.detach(device.path)
    for each in (other, root):
        attach(world, each)
    # Its own scans count as well.
    mine = other.attach(image, partition_scan=True)
    with pytest.raises(CallError, match=r"TimedOut.*too often for udev"):
        other.call(mine.path, *rescan)
    for _ in range(3):
        again = root.attach(image, partition_scan=True, allow_overlap=True)
        root.call(again.path, *rescan)
        root.detach(again.path)
