# SPDX-License-Identifier: LGPL-2.1-or-later
"""What loopd lives from fails: polkit, the bus, room for open files.  Nothing is bound by that.

That everything but a clear yes is a no is in test_authorization, the end of an idle bus in
test_leases, and fds that find no room when they come in test_fds.
"""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from tests.harness import loops, wire
from tests.harness.bus import LOOPD, POLKIT, PrivateBus
from tests.harness.caller import DEVICE, Attached, Call, Caller, options
from tests.harness.images import MIB, make_gpt, memfd
from tests.harness.polkit import Answer
from tests.harness.raw import BUS, DisconnectedError, RawClient
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

# What fails here does so above the reading and writing of messages.
pytestmark = pytest.mark.one_library

DENIED = f"{BUS}.Error.AccessDenied"
LIMITS = f"{BUS}.Error.LimitsExceeded"
FULL = "System.Error.EMFILE"

SHORT = "[deadlines]\nauthorization = 1\n"
ALLOW_REPLACEMENT, REPLACE, DO_NOT_QUEUE = 1, 2, 4

YES: tuple[str, list[Any]] = ("(bba{ss})", [(True, False, {})])


def answer(polkit: RawClient, question: wire.Message, signature: str, body: list[Any]) -> None:
    """Answer a question, whether somebody still waits for that or not."""
    polkit.send(
        None,
        None,
        None,
        signature,
        body,
        type=wire.METHOD_RETURN,
        reply_serial=question.serial,
        destination=question.sender,
    )


def next_question(polkit: RawClient, member: str = "CheckAuthorization") -> wire.Message:
    return polkit.receive_where(lambda message: message.member == member, member)


def error_of(call: Call) -> str:
    with pytest.raises(CallError) as failure:
        call.end()
    return failure.value.name


def bound_files(world: World) -> list[str]:
    found = [loop.backing_file for loop in loops.bound_loops().values()]
    return [each for each in found if each.startswith(f"{world.files}/")]


# polkit

OPERATIONS: dict[str, tuple[str, str, list[Any]]] = {
    "Detach": ("Detach", "a{sv}", [options(lazy=True)]),
    "Resize": ("Resize", "a{sv}", [options(force=True, size_limit=512)]),
    "Open": ("Open", "sa{sv}", ["rw", {}]),
    "SetReference": ("SetReference", "sa{sv}", ["changed", {}]),
}


def test_a_yes_after_the_deadline_changes_no_device(new_world: Callable[..., World]) -> None:
    world = new_world(authority=None, config=SHORT)
    owner, other = world.caller(None), world.caller(OTHER)
    attached = owner.attach(world.image())
    with world.bus.connect() as polkit:
        polkit.call_bus("RequestName", "su", [POLKIT, DO_NOT_QUEUE])
        # As many as one user may have open.
        calls = [
            other.call_begin(attached.path, DEVICE, member, signature, *args)
            for member, signature, args in OPERATIONS.values()
        ]
        questions = [next_question(polkit) for _ in calls]
        before = owner.get_all(attached.path)
        assert [error_of(call) for call in calls] == [DENIED] * len(calls)
        with world.daemon.same_fds():
            for question in questions:
                answer(polkit, question, *YES)
            polkit.call_bus("GetId")  # the answers are on their way before this
            assert owner.get_all(attached.path) == before
        assert before["State"] == "attached"
    assert owner.detach(attached.path) is True


def test_another_polkit_that_takes_over_is_asked_next(new_world: Callable[..., World]) -> None:
    """The one before keeps its connection, and says nothing more."""
    world = new_world(authority=None, config=SHORT)
    caller = world.caller()
    with world.bus.connect() as former, world.bus.connect() as latter:
        former.call_bus("RequestName", "su", [POLKIT, ALLOW_REPLACEMENT | DO_NOT_QUEUE])
        call = caller.attach_begin(world.image())
        next_question(former)
        assert latter.call_bus("RequestName", "su", [POLKIT, REPLACE | DO_NOT_QUEUE])[0] == 1
        again = caller.attach_begin(world.image())
        answer(latter, next_question(latter), *YES)
        attached = Attached(*again.end())
        loops.used_numbers.add(attached.number)
        assert error_of(call) == DENIED
        assert bound_files(world) == [
            os.fsdecode(caller.get(attached.path, "BackingFile").rstrip(b"\0"))
        ]
    assert caller.detach(attached.path) is True


def test_a_polkit_that_stops_for_a_while_denies_and_then_serves(
    new_world: Callable[..., World],
) -> None:
    """Its answers come in the end, all at once, to questions that are over and to a new one."""
    world = new_world(authority=None, config=SHORT)
    caller = world.caller()
    with world.bus.connect() as polkit:
        polkit.call_bus("RequestName", "su", [POLKIT, DO_NOT_QUEUE])
        calls = [caller.attach_begin(world.image()) for _ in range(3)]
        assert [error_of(call) for call in calls] == [DENIED] * 3
        call = caller.attach_begin(world.image())
        for _ in range(4):
            answer(polkit, next_question(polkit), *YES)
        attached = Attached(*call.end())
        loops.used_numbers.add(attached.number)
        assert world.device_count() == len(bound_files(world)) == 1
    assert caller.detach(attached.path) is True


# The bus


@pytest.mark.parametrize("end", [PrivateBus.stop, PrivateBus.kill], ids=["stop", "kill"])
def test_the_end_of_the_bus_ends_calls_under_way_and_binds_nothing(
    new_world: Callable[..., World], end: Callable[[PrivateBus], Any]
) -> None:
    """Transport rule 12 (losing the bus): also a device that nobody works at ends."""
    world = new_world(authority=Answer.HANG)
    with world.bus.connect(None) as root, world.bus.connect(USER) as client:
        path = world.image()
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            attach = ("/org/example/Loop1", LOOPD, "Attach", "ha{sv}", [0, {}])
            with memfd() as other:
                devices = [Attached(*root.call(*attach, fds=[each]).body) for each in (fd, other)]
            loops.used_numbers.update(each.number for each in devices)
            client.send(*attach, fds=[fd])
            world.polkit.wait_question()
            root.send(devices[0].path, DEVICE, "Resize", "a{sv}", [{}])
            # The polkit double notices by itself.
            end(world.bus)
            assert world.daemon.wait() > 0
            for each in devices:
                loops.wait_unbound(each.number, each.diskseq)
            with pytest.raises(DisconnectedError):
                root.call_bus("GetId")
        finally:
            os.close(fd)
    assert bound_files(world) == []


# The table of open files

LEVELS = range(20)
"""So many fds more; each call needs fewer."""


@contextmanager
def room_for(world: World, more: int) -> Iterator[None]:
    """Let the daemon have so many fds more than it has now."""
    pid = world.daemon.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    now = sorted(world.daemon.fds())
    # Those that are not in use are used first.
    free = [fd for fd in range(now[-1] + more + 2) if fd not in now]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[more], limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error that says what is missing."""
    try:
        return call()
    except CallError as exc:
        if exc.name not in (FULL, LIMITS):
            raise
        return exc


def serves(world: World, caller: Caller) -> None:
    attached = caller.attach(world.image())
    assert caller.detach(attached.path) is True


@pytest.mark.parametrize("partitions", [False, True], ids=["plain", "with partitions"])
def test_an_attach_that_finds_no_room_for_fds_binds_nothing(world: World, partitions: bool) -> None:
    caller = world.caller()
    path = make_gpt(world.new_path(), owner=USER)
    results = []
    for more in LEVELS:
        world.wait_idle_fds()
        with room_for(world, more):
            result = outcome(lambda: caller.attach(path, partition_scan=partitions))
            results.append(result)
        if not isinstance(result, CallError):
            assert caller.detach(result.path) is True
            break
        # udev may have what was bound open for a glance.
        with loops.Uevents() as events:
            events.wait_until(lambda: not bound_files(world), "nothing to be bound")
        world.wait_devices(0)
    assert 1 < len(results) < len(LEVELS)
    serves(world, caller)


@pytest.mark.parametrize("member", ["Detach", "Resize", "Open"])
def test_what_finds_no_room_for_fds_leaves_a_device_as_it_is(world: World, member: str) -> None:
    caller = world.caller()
    calls: dict[str, Callable[[Attached], Any]] = {
        "Detach": lambda attached: caller.detach(attached.path),
        "Resize": lambda attached: caller.resize(attached.path, size_limit=MIB // 2),
        "Open": lambda attached: caller.open_device(attached.path, "r"),
    }
    results = []
    for more in LEVELS:
        attached = caller.attach(world.image())
        with room_for(world, more):
            result = outcome(partial(calls[member], attached))
        results.append(result)
        if isinstance(result, CallError):
            assert loops.loop_is_bound(attached.number, attached.diskseq)
            assert caller.get(attached.path, "State") == "attached"
            assert caller.get(attached.path, "Size") == MIB
        elif member == "Open":
            result.close()
        if member != "Detach" or isinstance(result, CallError):
            assert caller.detach(attached.path) is True
        world.wait_devices(0)
        world.wait_idle_fds()
        if not isinstance(result, CallError):
            break
    assert 1 < len(results) < len(LEVELS)
    serves(world, caller)


def test_a_client_that_ends_while_there_is_no_room_for_fds_leaves_nothing(world: World) -> None:
    watcher = world.caller()
    for more in (0, 2):
        caller = world.caller()
        attached = caller.attach(world.image())
        with room_for(world, more):
            caller.kill()
            loops.wait_unbound(attached.number, attached.diskseq)
        world.wait_devices(0)
    serves(world, watcher)
