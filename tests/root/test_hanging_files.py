# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that answer nothing, or stop half-way: whoever passes one has only itself to wait for.

They are on a FUSE filesystem that is told which requests to keep without an answer.  dbus-daemon
closes what it has passed on, and would hang itself on a flush; so that is kept only when loopd
alone has the fds.
"""

import fcntl
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.harness import loops, wire
from tests.harness.bus import LOOPD
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached, Call, Caller, RemoteFd
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.hanging import (
    CROWD,
    MAX_SLOW,
    SLOW_AT_A_TIME,
    fuse_fds,
    hang_fds,
    opened,
    send_fds,
    serve_newcomer,
    stopping,
    wait_hanging,
    wait_passed_on,
)
from tests.harness.images import memfd
from tests.harness.polkit import Answer
from tests.harness.raw import RawClient
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER, World, make_world

UNTRUSTED = "org.example.loop1.attach-untrusted-filesystem"
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
UNTRUSTED_FILESYSTEM = f"{LOOPD}.Error.UntrustedFilesystem"
NO_SUCH_DEVICE = f"{LOOPD}.Error.NoSuchDevice"
TIMED_OUT = f"{LOOPD}.Error.TimedOut"
AT_ONCE = 5.0
"""Seconds that a busy machine may take for what takes some milliseconds."""
SHORT = "[deadlines]\noperation = 2\n"
TRUSTING = f'trusted_filesystems = ["fuse"]\n{SHORT}'
# What waits for hanging calls at the end of a stop, which takes as many seconds for each.
STOPS_SOON = "from loopd.daemon import lifecycle; lifecycle.STOP_TIMEOUT = 1.0"


@contextmanager
def new_world(**options: Any) -> Iterator[World]:
    """A world of the test's own, which may be left with threads that hang."""
    with make_world(**options) as made, made.test() as testing:
        yield testing


@contextmanager
def new_fuse() -> Iterator[Fuse]:
    """A filesystem that answers; what it keeps goes on at the end, whatever becomes of the test."""
    with Fuse() as running:
        try:
            yield running
        finally:
            running.release()


@pytest.fixture
def fuse() -> Iterator[Fuse]:
    with new_fuse() as running:
        yield running


def serves(world: World, victim: Caller) -> None:
    """Fail unless another user is served at once, from attach to detach."""
    attached = Attached(*victim.attach_begin(world.image(owner=OTHER)).end(AT_ONCE))
    loops.used_numbers.add(attached.number)
    for member, signature, *args in (
        ("SetReference", "sa{sv}", "name", {}),
        ("Resize", "a{sv}", {}),
        ("Sync", "a{sv}", {}),
    ):
        victim.call_begin(attached.path, DEVICE, member, signature, *args).end(AT_ONCE)
    assert victim.call_begin(attached.path, DEVICE, "Detach", "a{sv}", {}).end(AT_ONCE) == (True,)


def refusal(client: RawClient, serial: int) -> str | None:
    """Return the error that answers a call at once."""
    return client.reply(serial, AT_ONCE).error_name


# Refused by default


def test_a_file_is_refused_without_a_request_to_its_filesystem() -> None:
    # Where nothing is flushed, so that its server can be stopped altogether.
    """Hanging files."""
    with new_world() as world, Fuse(flushes=False) as fuse, ExitStack() as stack:
        world.polkit.on(UNTRUSTED, Answer.DENY)
        client, victim = world.raw(), world.caller(OTHER)
        fd = stack.enter_context(opened(fuse))
        fuse.seen()
        with stopping(fuse.process.pid):
            for member, signature, args, error in (
                ("Attach", "ha{sv}", [0, {}], UNTRUSTED_FILESYSTEM),
                ("Attach", "ha{sv}", [0, {"sector-size": Variant("u", 0)}], UNTRUSTED_FILESYSTEM),
                ("GetDevice", "h", [0], NO_SUCH_DEVICE),
                ("Detach", "ha{sv}", [0, {}], NO_SUCH_DEVICE),
                ("Resize", "ha{sv}", [0, {}], NO_SUCH_DEVICE),
            ):
                serial = client.send(MANAGER_PATH, MANAGER, member, signature, args, fds=[fd])
                assert refusal(client, serial) == error, member
            serves(world, victim)
            # Whatever thread hung would have its fd still.
            world.wait_idle_fds()
        assert fuse.seen() == []


# Closed off the event loop

AT_ONCE_ALL = "from loopd.daemon import closes; closes._SLOW_AT_A_TIME = 64"
"""As many closes of one user as are tried hang at a time, so that each is seen."""


def test_what_hangs_when_it_is_closed_holds_nobody_up(fuse: Fuse) -> None:
    """Hanging files, Transport rule 3 (ownership): in calls that are refused for every kind of
    reason, in signals, in messages too long.
    """
    world_options: dict[str, Any] = {
        "policies": [],
        "authority": Answer.DENY,
        "prelude": AT_ONCE_ALL,
    }
    with new_world(**world_options) as world, opened(fuse) as fd:
        client, victim = world.raw(), world.caller(OTHER)
        world.polkit.on("org.example.loop1.attach", Answer.ALLOW)
        long = {"reference": Variant("s", "x" * 200_000)}
        calls: list[tuple[str, str, list[Any], int]] = [
            ("Attach", "ha{sv}", [0, {}], 1),
            ("Attach", "ha{sv}", [0, {"x": Variant("b", True)}], 1),
            ("Attach", "ha{sv}", [1, {}], 2),
            ("Attach", "ha{sv}", [0, long], 1),
            ("GetDevice", "h", [0], 1),
            ("GetDevice", "u", [0], 1),
            ("NoSuchMember", "h", [0], 3),
            ("ListDevices", "", [], 1),
        ]
        # One fd each, or so many, is to be closed in the end: by whoever gets the message.
        with stopping(world.daemon.pid):
            serials = [
                client.send(MANAGER_PATH, MANAGER, member, signature, args, fds=[fd] * count)
                for member, signature, args, count in calls
            ]
            for flags, kind in ((wire.NO_REPLY_EXPECTED, wire.METHOD_CALL), (0, wire.SIGNAL)):
                client.send(
                    *(MANAGER_PATH, MANAGER, "NoSuch", "h", [0]), fds=[fd], flags=flags, type=kind
                )
            wait_passed_on(world, fuse)
            fuse.hang("FLUSH")
        for serial in serials:
            assert refusal(client, serial) is not None
        # All of them, one after the other's end or beside each other.
        count = sum(each[3] for each in calls) + 2
        for _ in range(count):
            assert fuse.wait_kept() == "FLUSH"
        serves(world, victim)
        fuse.release()
        world.wait_idle_fds()


def test_of_a_user_whose_fds_do_not_close_no_more_are_taken() -> None:
    """Hanging files, Transport rule 3 (ownership): else they would fill the table of fds, and there
    would be no room for anybody's.
    """
    kept = 60  # dbus-daemon has 64 fds under way for loopd at most, and hangs with the rest
    with new_world(policies=[]) as world, ExitStack() as stack:
        client, same_user, victim = world.raw(), world.raw(), world.caller(OTHER)
        serves(world, victim)
        own = world.caller(USER)  # whose calls are allowed, or the user may have few
        own.detach(own.attach(world.image(owner=USER)).path)
        for each in (client, same_user):
            each.call(MANAGER_PATH, MANAGER, "ListDevices")
        before = world.daemon.threads()
        first, second = (stack.enter_context(Fuse()) for _ in range(2))
        hanging, fine = (stack.enter_context(opened(each)) for each in (first, second))
        with stopping(world.daemon.pid):
            for each in (client, same_user):
                send_fds(each, hanging, kept // 2)  # so few that it is heard on
            wait_passed_on(world, first)
            first.hang("FLUSH")
        wait_hanging(world, first, MAX_SLOW + 1, users=1)
        # Not even those that would close, of whichever connection.
        for each in (client, same_user, world.raw()):
            send_fds(each, fine, 10)
            serial = each.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fine])
            assert refusal(each, serial) == LIMITS_EXCEEDED
        assert fuse_fds(world.daemon.pid, second) == 0
        serves(world, victim)
        assert world.daemon.threads() < before + 2 * SLOW_AT_A_TIME
        first.release()
        world.wait_idle_fds()
        # And then they are taken again.
        serial = client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fine])
        assert refusal(client, serial) == NO_SUCH_DEVICE
        world.wait_idle_fds()


def test_users_whose_fds_do_not_close_cost_newcomers_nothing() -> None:
    """Hanging files, Transport rule 16 (whose fds): one with more than are taken of one, and then
    sixteen with as many as are.
    """
    with (
        new_world(policies=[], accounts=CROWD, config="[limits]\ndevices = 4\n") as world,
        ExitStack() as stack,
    ):
        # No process starts while they hang, since it would close what it has of the test's.
        fuses = [stack.enter_context(Fuse()) for _ in range(1 + len(CROWD) // 2)]
        fds = [stack.enter_context(opened(fuse)) for fuse in fuses]
        images = [world.image() for _ in range(6)]
        before = world.daemon.threads()
        hang_fds(world, fuses[0], fds[0], USER, USER)
        for user in (None, OTHER, "mail"):
            serve_newcomer(world, user, images.pop(), AT_ONCE)
        with world.bus.connect(USER) as client, memfd() as fd:
            serial = client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd])
            assert refusal(client, serial) == LIMITS_EXCEEDED
        for number, fuse in enumerate(fuses[1:]):
            hang_fds(world, fuse, fds[1 + number], *CROWD[2 * number : 2 * number + 2])
        for user in (None, OTHER, "mail"):
            serve_newcomer(world, user, images.pop(), AT_ONCE)
        hanging = SLOW_AT_A_TIME * (1 + len(CROWD))
        assert hanging <= world.daemon.threads() < before + hanging + 32
        for fuse in fuses:
            fuse.release()
        world.wait_idle_fds()


# Allowed by an administrator


@pytest.fixture(scope="module", params=[SHORT, TRUSTING], ids=["by polkit", "by configuration"])
def _either(request: pytest.FixtureRequest) -> Iterator[World]:
    with make_world(config=request.param) as made:
        yield made


@pytest.fixture
def either(_either: World) -> Iterator[World]:
    """A world where the file may be attached, for either reason."""
    with _either.test() as world:
        yield world


@pytest.fixture(scope="module")
def _allowing() -> Iterator[World]:
    with make_world(config=SHORT) as made:
        yield made


@pytest.fixture
def allowing(_allowing: World) -> Iterator[World]:
    """A world where polkit lets the file be attached."""
    with _allowing.test() as world:
        yield world


def passed(world: World, fuse: Fuse) -> tuple[Caller, RemoteFd]:
    """A caller that has the file open, for what is to hang later."""
    caller = world.caller()
    return caller, caller.open(fuse.file)


def timed_out(call: Call) -> None:
    """Fail unless a call ends with the error of that name."""
    with pytest.raises(CallError) as failure:
        call.end()
    assert failure.value.name == TIMED_OUT


def test_attaches_that_hang_hang_alone_and_leave_nothing(either: World) -> None:
    """Hanging files."""
    hanging: list[tuple[Fuse, RemoteFd, dict[str, Any], Call]] = []
    victim, caller = either.caller(OTHER), either.caller()
    with ExitStack() as stack:
        for request, options in (
            ("READ", {"sector_size": 0}),
            ("READ", {"partition_scan": True}),
            ("GETATTR", {}),
        ):
            fuse = stack.enter_context(new_fuse())
            file = caller.open(fuse.file)
            fuse.hang(request)
            hanging.append((fuse, file, options, caller.attach_begin(file, **options)))
            assert fuse.wait_kept() == request
            serves(either, victim)
        for *_, call in hanging:
            timed_out(call)
        serves(either, victim)
        for fuse, *_ in hanging:
            fuse.release()
        either.wait_idle_fds()
        # Nothing stands in the way of the next one.
        for _, file, options, _ in hanging:
            assert caller.detach(caller.attach(file, **options).path) is True
            file.close()


def test_operations_that_hang_hang_alone_and_work_afterwards(allowing: World) -> None:
    """Hanging files."""
    operations: list[tuple[str, str, str, list[Any]]] = [
        ("FSYNC", "Sync", "a{sv}", [{}]),
        ("GETATTR", "Resize", "a{sv}", [{}]),
        ("READ", "RescanPartitions", "a{sv}", [{}]),
        ("READ", "SetSectorSize", "ua{sv}", [0, {}]),
    ]
    victim, caller = allowing.caller(OTHER), allowing.caller()
    with ExitStack() as stack:
        hanging: list[tuple[Fuse, Attached, Call]] = []
        for request, member, signature, args in operations:
            fuse = stack.enter_context(new_fuse())
            attached = caller.attach(fuse.file)
            fuse.hang(request)
            call = caller.call_begin(attached.path, DEVICE, member, signature, *args)
            if member != "SetSectorSize":
                # One user's scans wait for each other.
                assert fuse.wait_kept() == request
            hanging.append((fuse, attached, call))
            serves(allowing, victim)
        listed = {each[0] for each in caller.manager("ListDevices")[0]}
        assert {attached.path for _, attached, _ in hanging} <= listed
        for *_, call in hanging:
            timed_out(call)
        for fuse, *_ in hanging:
            fuse.release()
        for (_, attached, _), operation in zip(hanging, operations, strict=True):
            _, member, signature, args = operation
            caller.device(attached.path, member, signature, *args)
            assert caller.detach(attached.path) is True


@pytest.mark.parametrize("leaves", ["Detach", "the end of its connection"])
def test_a_detach_whose_flush_hangs_hangs_alone_and_ends(
    allowing: World, fuse: Fuse, leaves: str
) -> None:
    """Hanging files."""
    victim = allowing.caller(OTHER)
    caller, file = passed(allowing, fuse)
    attached = caller.attach(file)
    fuse.hang("FLUSH")
    if leaves == "Detach":
        call = caller.call_begin(attached.path, DEVICE, "Detach", "a{sv}", {})
    else:
        caller.disconnect()
    assert fuse.wait_kept() == "FLUSH"
    serves(allowing, victim)
    fuse.release()
    if leaves == "Detach":
        call.end()
    loops.wait_unbound(attached.number, attached.diskseq)
    file.close()


def test_wherever_it_stops_half_way_nothing_is_left_of_it(either: World, fuse: Fuse) -> None:
    """Hanging files: after each number of requests, its client leaving while it hangs."""
    with opened(fuse) as fd:
        options = {"sector-size": Variant("u", 0), "partition-scan": Variant("b", True)}
        answered = 0
        while True:
            with either.bus.connect() as client:
                fuse.hang("GETATTR", "READ", "FSYNC", "STATFS", "WRITE", after=answered)
                serial = client.send(
                    MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, options], fds=[fd]
                )
                answer = answer_unless_kept(client, serial, fuse)
                require_free_allocation(either)
            fuse.release()
            either.wait_idle_fds()
            if answer:
                break
            answered += 1
        assert answer.type == wire.METHOD_RETURN
    # Its size, the header, its size again to bind it, the table.
    assert answered >= 4


def require_free_allocation(world: World) -> None:
    """Fail if anybody keeps the lock that every program takes to get a loop device."""
    deadline = Deadline(AT_ONCE)
    with open("/dev/loop-control", "rb") as control, world.bus.connect() as client:
        while True:
            try:
                fcntl.flock(control, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert deadline.remaining, "the lock of /dev/loop-control is kept"
                client.call_bus("GetId")  # others take it for a moment
            else:
                return


def answer_unless_kept(client: RawClient, serial: int, fuse: Fuse) -> wire.Message | None:
    """Wait for the answer to a call, or until it hangs."""
    deadline = Deadline()
    while True:
        for message in client.drain():
            if message.reply_serial == serial:
                return message
        watched = [client.fileno(), fuse.orders.fileno()]
        if fuse.orders.fileno() in deadline.wait_readable(watched, "an answer or a hang"):
            fuse.wait_kept()
            return None
        client.received.append(client.receive())


# Stopped


@pytest.fixture
def stopping_world() -> Iterator[World]:
    with make_world(prelude=STOPS_SOON) as made, made.test() as testing:
        yield testing


def wait_said(world: World, text: str) -> None:
    """Wait until the daemon has said so; each look is paced by a call to the bus."""
    deadline = Deadline()
    with world.bus.connect() as client:
        while text not in world.daemon.log:
            assert deadline.remaining, f"loopd does not say {text!r}:\n{world.daemon.log}"
            client.call_bus("GetId")


def hang_in(request: str, world: World, fuse: Fuse) -> tuple[Caller, RemoteFd]:
    """Have a call of loopd hang on a request."""
    caller, file = passed(world, fuse)
    if request == "READ":
        fuse.hang("READ")
        caller.attach_begin(file, sector_size=0)
    else:
        attached = caller.attach(file)
        fuse.hang(request)
        member = {"FSYNC": "Sync", "FLUSH": "Detach", "GETATTR": "Resize"}[request]
        caller.call_begin(attached.path, DEVICE, member, "a{sv}", {})
    assert fuse.wait_kept() == request
    return caller, file


@pytest.mark.alone  # a device of others' that hangs would be counted, too
@pytest.mark.parametrize("request_", ["READ", "FLUSH"])
def test_a_stop_says_what_it_leaves_hanging_and_ends_with_that(
    stopping_world: World, fuse: Fuse, request_: str
) -> None:
    """Hanging files: the kernel lets no process go before that."""
    world = stopping_world
    _, file = hang_in(request_, world, fuse)
    world.daemon.process.signal(signal.SIGTERM)
    world.bus.wait_released(LOOPD)
    wait_said(world, "leaving with 1 calls under way on files or devices that hang")
    assert world.daemon.process.status is None
    fuse.release()
    assert world.daemon.wait() == 0
    file.close()


def test_a_read_that_nobody_takes_up_does_not_keep_it_from_ending(
    stopping_world: World,
) -> None:
    """Hanging files: a request that the filesystem has not read yet ends with the process that
    waits for it.
    """
    world = stopping_world
    with Fuse(flushes=False) as fuse:
        caller, file = passed(world, fuse)
        with stopping(fuse.process.pid):
            call = caller.attach_begin(file, sector_size=0)
            world.wait_fds(
                lambda fds: list(fds.values()).count(str(fuse.file)) == 1,
                "loopd to have the file in the thread that asks it, and nowhere else",
            )
            world.daemon.process.signal(signal.SIGTERM)
            assert world.daemon.wait() == 0
        with pytest.raises(CallError):
            call.end()
        file.close()
