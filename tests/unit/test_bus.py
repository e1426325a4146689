# SPDX-License-Identifier: LGPL-2.1-or-later
"""The serving end without a bus: what is told to whom, and whom nobody hears, call by call."""

import asyncio
import os
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from loopd.bus import codec, frame
from loopd.daemon import closes
from loopd.daemon.config import Limits
from loopd.daemon.server import caller_state as session_module
from loopd.daemon.server import dispatcher as bus_module
from loopd.daemon.server.call import Authorization, Method
from loopd.daemon.server.caller_state import Session
from loopd.daemon.server.dispatcher import Bus
from loopd.daemon.threads import Threads
from loopd.errors import BusError

ROOT = 0
USER = 1000


class FakeConnection:
    """Answers who a connection is, and keeps what is sent."""

    sent = 0

    def __init__(self, **given: Any) -> None:
        self.on_call: Callable[[frame.Frame], None] = given["on_call"]
        self.on_signal: Callable[[frame.Frame], None] = given["on_signal"]
        self.muted: Collection[bytes] = given["muted"]
        self.trusts: Callable[[str], bool | asyncio.Future[None]] = given["trusts"]
        self.is_wary: Callable[[], bool] = given["is_wary"]
        self.replies: list[int] = []
        self.errors: list[tuple[int, str]] = []

    def reply(self, to: frame.Header, *_: Any) -> "asyncio.Future[None]":
        self.replies.append(to.serial)
        written = asyncio.get_running_loop().create_future()
        written.set_result(None)
        return written

    def reply_error(self, to: frame.Header, name: str, text: str) -> asyncio.Future[None]:
        self.errors.append((to.serial, name.rpartition(".")[2]))
        written = asyncio.get_running_loop().create_future()
        written.set_result(None)
        return written


class Stand:
    """A Bus whose only method waits until it is let go."""

    def __init__(self, limits: Limits) -> None:
        self.release = asyncio.Event()
        self.left: list[str] = []
        self.threads = Threads()
        method = Method(
            name="Wait",
            in_signature="",
            out_signature="",
            authorization=Authorization.FREE,
            handler=self._wait,
        )
        self.bus = Bus(
            FakeConnection,
            limits,
            self.threads,
            who_is=self._who_is,
            find=lambda *_: (method, None),
            before_reply=lambda: None,
            client_left=lambda client: self.left.append(client.name),
            on_quiet=lambda: None,
            on_lost=lambda why: None,
        )
        self.connection: Any = self.bus.connection
        self.uids: dict[str, int] = {}
        self.asked: list[str] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.nobody = False
        """Whether the bus says that connections have left."""

    async def _who_is(self, name: str) -> int:
        self.asked.append(name)
        await asyncio.sleep(0)
        await self.answering.wait()
        if self.nobody:
            raise BusError("it has left")
        return self.uids.get(name, USER)

    async def _wait(self, caller: object, target: object) -> tuple[()]:
        await self.release.wait()
        return ()

    def call(self, sender: str, serial: int, *, size: int = 1, fds: Sequence[int] = ()) -> None:
        """Have a call come in; one of size 0 is over the cap."""
        header = frame.Header(
            type=frame.METHOD_CALL, flags=0, serial=serial, path="/", member="Wait", sender=sender
        )
        message = codec.method_call(":1.0", "/", "a.b", "Wait", "", [], serial=serial)
        data = codec.serialize(message) if size else b""
        self.connection.on_call(frame.Frame(header, data, [*fds]))

    async def settle(self) -> None:
        """Let everything happen that needs no time."""
        for _ in range(300):
            await asyncio.sleep(0)


def story(body: Callable[[Stand], Coroutine[Any, Any, None]], limits: Limits | None = None) -> None:
    async def run() -> None:
        stand = Stand(limits or Limits())
        await body(stand)
        stand.release.set()
        await stand.settle()

    asyncio.run(run())


def test_of_many_calls_at_once_some_are_served_some_refused_and_the_rest_not_heard() -> None:
    async def body(stand: Stand) -> None:
        stand.call(":1.7", 1)
        await stand.settle()
        for serial in range(2, 101):
            stand.call(":1.7", serial)
        assert stand.connection.muted == {b":1.7"}
        await stand.settle()
        assert stand.connection.errors == [
            (serial, "LimitsExceeded") for serial in range(17, 17 + 16)
        ]
        stand.release.set()
        await stand.settle()
        assert stand.connection.replies == [*range(1, 17)]

    story(body)


def test_who_is_not_heard_is_heard_again_before_long() -> None:
    async def body(stand: Stand) -> None:
        for serial in range(1, 101):
            stand.call(":1.7", serial)
        assert stand.connection.muted == {b":1.7"}
        stand.release.set()
        await asyncio.sleep(session_module._SILENCE * 2)
        assert stand.connection.muted == set()
        stand.call(":1.7", 101)
        await stand.settle()
        assert stand.connection.replies[-1] == 101

    story(body)


def test_before_its_user_is_known_a_connection_has_no_more_than_after() -> None:
    """Quota dodges."""

    async def body(stand: Stand) -> None:
        for serial in range(1, 101):
            stand.call(":1.7", serial)
        await stand.settle()
        assert [serial for serial, _ in stand.connection.errors] == [*range(17, 33)]
        stand.release.set()
        await stand.settle()
        assert stand.connection.replies == [*range(1, 17)]

    story(body)


def test_calls_of_strangers_have_a_limit_of_their_own() -> None:
    """Quota dodges: else many new connections of one user would be in everybody's way."""

    async def body(stand: Stand) -> None:
        stand.uids[":1.1"] = 2000
        stand.uids[":1.2"] = ROOT
        stand.call(":1.1", 1)
        await stand.settle()
        for number in range(20, 80):
            stand.call(f":1.{number}", 1)
        # A second one is too many now; the first of a stranger may be root's.
        stand.call(":1.20", 2)
        stand.call(":1.1", 2)
        stand.call(":1.2", 1)
        await stand.settle()
        # Of the strangers fifty are found to be too many for one user.
        assert stand.connection.errors.count((2, "LimitsExceeded")) == 1
        assert stand.connection.errors.count((1, "LimitsExceeded")) == 50
        stand.release.set()
        await stand.settle()
        assert stand.connection.replies.count(1) == 1 + 10 + 1
        assert stand.connection.replies.count(2) == 1

    story(body, Limits(calls=40, calls_per_user=10))


def fill(stand: Stand, uids: range, each: int) -> None:
    """Have so many calls of each of these users, by as few connections as there can be."""
    for uid in uids:
        for number in range(each):
            sender = f":1.{uid}{number // 16}"
            stand.uids[sender] = uid
            stand.call(sender, number + 1)


def test_users_who_take_all_they_get_leave_something_to_the_next_and_to_root() -> None:
    """Limits in all: calls that have begun, and so cannot give way."""

    async def body(stand: Stand) -> None:
        prove(stand, range(1000, 1005))
        for uid in range(1000, 1005):
            fill(stand, range(uid, uid + 1), 64)
            await stand.settle()
        begun = {uid: stand.bus._turns.account(uid).calls for uid in range(1000, 1005)}
        assert begun == {1000: 64, 1001: 64, 1002: 48, 1003: 24, 1004: 12}
        for uid in (ROOT, 2000):
            stand.uids[f":1.{uid}"] = uid
            refused = len(stand.connection.errors)
            for serial in range(1001, 1005):
                stand.call(f":1.{uid}", serial)
            await stand.settle()
            assert len(stand.connection.errors) == refused
            assert stand.bus._turns.account(uid).calls == 4

    story(body)


def test_where_all_places_are_taken_the_latest_of_who_has_most_gives_way() -> None:
    """Limits in all: calls that wait for their turn."""

    async def body(stand: Stand) -> None:
        prove(stand, range(1000, 1060))
        await stand.settle()
        fill(stand, range(1000, 1010), 64)  # none has begun yet
        stand.uids[":1.99"] = 2000
        for _ in range(3):
            await asyncio.sleep(0)  # it is known who they are
        stand.call(":1.99", 1)
        await stand.settle()
        assert (1, "LimitsExceeded") not in stand.connection.errors
        counts = sorted(stand.bus._turns.account(uid).calls for uid in range(1000, 1010))
        assert sum(counts) + 1 <= 224
        assert counts[0] > 0
        assert stand.bus._turns.account(2000).calls == 1

    story(body)


def test_a_user_of_whom_no_call_was_authorized_has_as_much_as_one_connection() -> None:
    """Limits in all."""

    async def body(stand: Stand) -> None:
        fill(stand, range(1000, 1001), 40)
        await stand.settle()
        assert stand.bus._turns.account(1000).calls == 16
        stand.release.set()
        await stand.settle()
        stand.release.clear()
        prove(stand, range(1000, 1001))
        await stand.settle()
        fill(stand, range(1000, 1001), 40)
        await stand.settle()
        assert stand.bus._turns.account(1000).calls == 40

    story(body)


def prove(stand: Stand, uids: range) -> None:
    """Have had a call of each authorized."""
    for uid in uids:
        account = stand.bus._turns.account(uid)
        account.sessions += 1
        account.proven = True


def test_a_call_over_the_cap_is_refused_and_takes_no_place() -> None:
    async def body(stand: Stand) -> None:
        for serial in range(1, 11):
            stand.call(":1.7", serial, size=0)
        for serial in range(11, 27):
            stand.call(":1.7", serial)
        await stand.settle()
        assert [serial for serial, _ in stand.connection.errors] == [*range(1, 11)]
        stand.release.set()
        await stand.settle()
        assert stand.connection.replies == [*range(11, 27)]

    story(body)


def test_nothing_is_left_of_a_connection_that_flooded_and_left() -> None:
    async def body(stand: Stand) -> None:
        for serial in range(1, 101):
            stand.call(":1.7", serial)
        await stand.settle()
        assert stand.bus._turns.account(USER).sessions == 1
        message = codec.signal(
            "/", "a.b", "NameOwnerChanged", "sss", [":1.7", ":1.7", ""], serial=1
        )
        header = frame.Header(
            type=frame.SIGNAL,
            flags=0,
            serial=1,
            member="NameOwnerChanged",
            sender="org.freedesktop.DBus",
            signature="sss",
        )
        stand.connection.on_signal(frame.Frame(header, codec.serialize(message)))
        assert stand.left == [":1.7"]
        stand.release.set()
        await asyncio.sleep(session_module._SILENCE * 2)
        assert stand.connection.muted == set()
        inside: Any = SimpleNamespace(**vars(stand.bus))
        assert (inside._sessions, inside._calls, inside._calls_of_nobody) == ({}, 0, 0)
        account = inside._turns.account(USER)
        assert (account.calls, account.sessions) == (0, 0)

    story(body)


def test_a_client_that_left_while_its_call_waited_is_not_served() -> None:
    """CVE-2021-3560."""

    async def body(stand: Stand) -> None:
        served: list[object] = []

        async def serve(caller: object, target: object) -> tuple[()]:
            served.append(caller)
            return ()

        stand._wait = serve  # type: ignore[method-assign]
        stand.call(":1.7", 1)
        session = stand.bus._sessions[":1.7"]
        session.left.set_result(None)
        await stand.settle()
        assert served == []
        assert stand.bus._calls == 0

    story(body)


def test_it_is_asked_once_whose_fds_come_next_and_the_wait_is_charged() -> None:
    """Transport rule 16 (whose fds)."""

    async def body(stand: Stand) -> None:
        stand.answering.clear()
        known = stand.connection.trusts(":1.7")
        assert isinstance(known, asyncio.Future)
        assert stand.connection.trusts(":1.7") is known
        stand.call(":1.7", 1)
        await stand.settle()
        assert not known.done()
        stand.answering.set()
        await known
        assert stand.connection.trusts(":1.7") is True
        assert stand.asked == [":1.7"]
        assert stand.bus._turns.account(USER).used > 0
        assert not stand.connection.trusts("")

    story(body)


def test_a_bus_that_does_not_say_whose_fds_come_next_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transport rule 16 (whose fds): and for no long time; then they are not taken."""
    monkeypatch.setattr(bus_module, "_PATIENCE", 0.01)

    async def body(stand: Stand) -> None:
        stand.answering.clear()
        known = stand.connection.trusts(":1.7")
        assert isinstance(known, asyncio.Future)
        await known
        assert stand.connection.trusts(":1.7") is False
        assert stand.connection.trusts(":1.8") is False
        stand.call(":1.8", 1)
        await stand.settle()
        # It answers again.
        stand.answering.set()
        await stand.settle()
        assert stand.connection.trusts(":1.7") is True
        assert stand.connection.trusts(":1.8") is True
        assert isinstance(stand.connection.trusts(":1.9"), asyncio.Future)
        await stand.settle()

    story(body)


def test_a_user_with_too_many_fds_to_close_is_not_trusted_by_any_connection() -> None:
    """Transport rule 16 (whose fds): and everybody else is."""

    async def body(stand: Stand) -> None:
        stand.uids[":1.9"] = USER + 1
        for name in (":1.7", ":1.8", ":1.9"):
            stand.call(name, 1)
        await stand.settle()
        closes = stand.threads.closes
        assert not stand.connection.is_wary()
        closes._may_hang.add(USER, 33)
        assert stand.connection.is_wary()
        trusted = [stand.connection.trusts(name) for name in (":1.7", ":1.8", ":1.9")]
        assert trusted == [False, False, True]
        closes._may_hang.add(USER, -33)

    story(body)


def test_connections_that_leave_before_they_are_known_close_their_fds_as_one_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hanging files: else each would have a user's threads, and a user has many connections."""
    released = threading.Event()
    begun: list[int] = []
    close = os.close

    def closing(fd: int) -> None:
        if fd in passed:
            begun.append(fd)
            assert released.wait(20)
        close(fd)

    async def body(stand: Stand) -> None:
        monkeypatch.setattr(closes.os, "close", closing)
        stand.answering.clear()
        for number, fd in enumerate(passed):
            stand.call(f":2.{number % 20}", number + 1, fds=[fd])
        # What does not know them is the bus.
        stand.nobody = True
        stand.answering.set()
        while stand.threads.closes._may_hang.total < len(passed):  # noqa: ASYNC110  by threads
            await asyncio.sleep(0)
        assert len(begun) <= closes._SLOW_AT_A_TIME
        stand.uids[":1.9"] = USER
        stand.nobody = False
        # Who is known then is trusted nevertheless.
        stand.call(":1.9", 1)
        await stand.settle()
        assert stand.connection.is_wary()
        assert stand.connection.trusts(":1.9") is True
        released.set()
        assert await asyncio.to_thread(stand.threads.stop, 20) == 0

    passed = [os.open(os.devnull, os.O_RDONLY) for _ in range(80)]
    try:
        story(body)
    finally:
        released.set()
        monkeypatch.undo()


def test_what_was_spent_on_a_connection_before_it_was_known_is_charged_whole() -> None:
    session = Session(":1.7", asyncio.Future(loop=asyncio.new_event_loop()))
    session.charge(0.25)
    session.charge(0.5)
    assert session.spent == 0.75

    async def body(stand: Stand) -> None:
        stand.call(":1.7", 1)
        stand.bus._sessions[":1.7"].charge(10.0)
        stand.bus._sessions[":1.7"].charge(20.0)
        await stand.settle()
        assert stand.bus._turns.account(USER).used >= 30.0

    story(body)


def test_a_bug_that_a_call_shows_costs_no_place() -> None:
    async def body(stand: Stand) -> None:
        stand.bus._find = lambda *_: 1 / 0  # type: ignore[assignment,return-value]
        for serial in range(1, 40):
            stand.call(":1.7", serial)
            await stand.settle()
        assert {name for _, name in stand.connection.errors} == {"Failed"}
        assert len(stand.connection.errors) == 39
        assert stand.bus._calls == 0

    story(body)


def test_who_goes_on_is_not_heard_for_longer_and_is_forgiven_after_a_while() -> None:
    session = Session(":1.7", asyncio.Future(loop=asyncio.new_event_loop()))
    now, silences = 1000.0, []
    for _ in range(6):
        silences.append(session.silence(now))
        now += silences[-1] + 0.01
    assert silences == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert session.silence(now + 2) == 0.1
