# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users who do not read what the bus holds for them get no more answers until they do."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loopd.daemon.server import backlog
from loopd.daemon.server.backlog import Backlog, Unread
from loopd.daemon.server.fair_queue import Account, Turns
from loopd.daemon.tasks import Tasks
from loopd.errors import LoopError, UnknownMethod
from tests.harness.asynchronous import run_async

USER, OTHER = 1000, 1001
NAME = ":1.7"


class Stand:
    """A bus that holds for each connection what it is said to."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.held: dict[str, Unread] = {}
        self.error: LoopError | None = None
        self.asked = asyncio.Event()
        self.tasks = Tasks()
        self.unread_signals = 0
        self.backlog = Backlog(self.turns, self.tasks, self._ask, self._ask_own)

    async def _ask_own(self) -> int:
        self.asked.set()
        if self.error:
            raise self.error
        return self.unread_signals + sum(held.bytes for held in self.held.values())

    async def _ask(self, name: str) -> Unread:
        self.asked.set()
        if self.error:
            raise self.error
        return self.held.get(name, Unread())

    def answer(self, account: Account, *, fds: int = 0, size: int = 100) -> None:
        """Send an answer that the bus holds until it is read."""
        held = self.held.get(NAME, Unread())
        self.held[NAME] = Unread(held.bytes + size, held.fds + fds)
        self.backlog.sent(account, NAME, size, fds)


def story(body: Callable[[Stand], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        stand = Stand()
        await asyncio.wait_for(body(stand), 20)
        await stand.tasks.finish(20)

    run_async(run())


@pytest.mark.parametrize("answer", [{"fds": 1}, {"size": 1 << 18}], ids=["fds", "bytes"])
def test_who_reads_nothing_gets_no_more_answers_until_it_reads(answer: dict[str, int]) -> None:
    """Within the limits: dbus-daemon would read no more from loopd, for nobody."""

    async def body(stand: Stand) -> None:
        account, other = stand.turns.account(USER), stand.turns.account(OTHER)
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for _ in range(8):
            assert not account.deaf
            stand.answer(account, **answer)
        assert account.deaf
        waits = asyncio.ensure_future(stand.backlog.room(account, left))
        await stand.asked.wait()
        assert account.deaf
        assert not waits.done()
        assert not other.deaf
        stand.held.clear()  # it has read
        await waits
        assert not account.deaf

    story(body)


def test_who_leaves_is_forgotten() -> None:
    async def body(stand: Stand) -> None:
        account = stand.turns.account(USER)
        for _ in range(8):
            stand.answer(account, fds=1)
        assert account.deaf
        stand.backlog.left(account, NAME)
        assert not account.deaf

    story(body)


def test_a_bus_that_does_not_say_what_it_holds_keeps_nobody_waiting() -> None:
    """dbus-broker charges who receives, and has no such question."""

    async def body(stand: Stand) -> None:
        stand.error = UnknownMethod("no statistics")
        account = stand.turns.account(USER)
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for _ in range(8):
            stand.answer(account, fds=1)
        await stand.backlog.room(account, left)
        assert not account.deaf
        for _ in range(100):
            stand.answer(account, fds=1)
        assert not account.deaf

    story(body)


def test_root_is_never_held_back() -> None:
    async def body(stand: Stand) -> None:
        root = stand.turns.account(0)
        for _ in range(100):
            stand.answer(root, fds=1)
        assert not root.deaf

    story(body)


# Signals, which go to everyone

MIB = 1 << 20


def signal_all(stand: Stand, owner: int, *, read: bool) -> int:
    """Tell of a user's devices for as long as that is done; return how many MiB it was."""
    told = 0
    while stand.backlog.is_told(owner) and told < 1000:
        stand.backlog.signalled(owner, MIB)
        stand.unread_signals += 0 if read else MIB
        told += 1
    return told


def test_signals_that_a_listener_does_not_read_cost_those_of_whose_devices_they_are() -> None:
    """Unread signals: dbus-daemon would read no more from loopd, for nobody."""

    async def body(stand: Stand) -> None:
        told = signal_all(stand, USER, read=False)
        assert told == 28  # half of what root leaves
        assert stand.backlog.is_told(OTHER)
        told += signal_all(stand, OTHER, read=False)
        told += signal_all(stand, 0, read=False)
        assert told <= backlog._SIGNALS // MIB
        await stand.asked.wait()
        assert not stand.backlog.is_told(USER)
        stand.unread_signals = 0  # somebody has read them, or has left
        while not stand.backlog.is_told(USER):  # noqa: ASYNC110  for the next question
            await asyncio.sleep(0.01)
        assert stand.backlog.is_told(OTHER)
        assert stand.backlog._signals == {}

    story(body)


def test_signals_that_are_read_are_told_for_ever() -> None:
    async def body(stand: Stand) -> None:
        for _ in range(100):
            stand.asked.clear()
            stand.backlog.signalled(USER, MIB)
            await stand.asked.wait()
            assert stand.backlog.is_told(USER)
            await asyncio.sleep(0.011)

    story(body)


def test_answers_that_nobody_reads_are_no_signals() -> None:
    async def body(stand: Stand) -> None:
        account = stand.turns.account(OTHER)
        while not account.deaf:
            stand.answer(account, size=MIB)
        for _ in range(3):
            stand.asked.clear()
            stand.backlog.signalled(USER, MIB)
            await stand.asked.wait()
        while stand.backlog._signals.total():  # noqa: ASYNC110  for the answer
            await asyncio.sleep(0.01)
        stand.held.clear()

    story(body)


def test_a_bus_that_does_not_say_what_it_holds_is_told_everything() -> None:
    """dbus-broker disconnects a listener who does not read."""

    async def body(stand: Stand) -> None:
        stand.error = UnknownMethod("no statistics")
        for _ in range(100):
            assert stand.backlog.is_told(USER)
            stand.backlog.signalled(USER, MIB)
            await asyncio.sleep(0)

    story(body)
