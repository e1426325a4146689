# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns between users: by the time they had, within half of a processor, and a tenth in a flood."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from loopd.daemon import budget
from loopd.daemon.server import fair_queue
from loopd.daemon.server.fair_queue import Account, Turns

ROOT, USER, OTHER = 0, 1000, 1001


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    fake = SimpleNamespace(monotonic=lambda: clock.now)
    with mock.patch.object(fair_queue, "time", fake), mock.patch.object(budget, "time", fake):
        yield clock


# Accounts


def spend(account: Account, clock: Clock, seconds: float, *, floods: bool = False) -> float:
    """Have one user take all the time it gets; return how much that was."""
    spent, start = 0.0, clock.now
    while clock.now < start + seconds:
        if floods:
            account.flood()
        if wait := account.wait():
            clock.now += wait
        else:
            account.charge(0.002)
            spent += 0.002
            clock.now += 0.002
    return spent


def test_a_thousand_pairs_in_a_row_make_no_user_wait(clock: Clock) -> None:
    account = Account(USER)
    for _ in range(1000):
        assert account.wait() == 0
        account.charge(0.003)
        clock.now += 0.003


def test_who_uses_less_than_half_of_a_processor_never_waits(clock: Clock) -> None:
    account = Account(USER)
    for _ in range(100_000):
        assert account.wait() == 0
        account.charge(0.003)
        clock.now += 0.0065


def test_one_user_alone_has_half_of_a_processor_in_the_long_run(clock: Clock) -> None:
    """Within the limits."""
    assert spend(Account(USER), clock, 1000) == pytest.approx(500, abs=5)


def test_who_floods_has_a_tenth_of_a_processor(clock: Clock) -> None:
    assert spend(Account(USER), clock, 100, floods=True) == pytest.approx(10.0, abs=0.2)


def test_root_never_waits(clock: Clock) -> None:
    assert spend(Account(ROOT), clock, 100, floods=True) == pytest.approx(100)


def test_a_flood_is_forgiven_when_it_is_over(clock: Clock) -> None:
    account = Account(USER)
    account.flood()
    account.charge(1.0)
    assert 0 < account.wait() < 1.5
    clock.now += 1.0
    assert account.wait() == 0


def test_an_account_is_idle_when_nothing_is_held_against_it(clock: Clock) -> None:
    account = Account(USER)
    assert account.idle
    account.calls += 1
    assert not account.idle
    account.calls -= 1
    account.sessions += 1
    assert not account.idle
    account.sessions -= 1
    account.flood()
    assert not account.idle
    clock.now += 2
    assert account.idle
    account.charge(0.01)
    assert not account.idle
    clock.now += 1
    assert account.idle
    account.charge(1.0)
    clock.now += 1
    assert not account.idle


# Turns


def story(body: Callable[[Turns], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        await body(Turns())

    asyncio.run(run())


async def settle(begun: list[Any], count: int) -> None:
    """Let the event loop turn until so many calls have begun."""
    for _ in range(10_000):
        if len(begun) >= count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"only {len(begun)} calls have begun")


def test_calls_of_one_user_begin_in_their_order_one_in_a_turn() -> None:
    async def body(queue: Turns) -> None:
        begun: list[int] = []
        account = queue.account(USER)
        for number in range(5):
            queue.add(account, lambda number=number: begun.append(number))
        seen = []
        while len(begun) < 5:
            await asyncio.sleep(0)
            seen.append(len(begun))
        assert begun == [0, 1, 2, 3, 4]
        assert seen == [1, 2, 3, 4, 5]

    story(body)


def test_of_many_users_each_has_a_call_begun_in_a_turn() -> None:
    """Within the limits: the event loop reads in between, for up to 5 ms, and they would add up."""

    async def body(queue: Turns) -> None:
        begun: list[int] = []
        for uid in range(1000, 1017):
            account = queue.account(uid)
            for _ in range(3):
                queue.add(account, lambda uid=uid: begun.append(uid))
        await asyncio.sleep(0)
        assert sorted(begun) == [*range(1000, 1017)]
        await settle(begun, 51)

    with mock.patch.object(fair_queue, "_TURN", 60.0):
        story(body)


def test_calls_are_begun_for_a_while_only_before_what_comes_in_is_read(clock: Clock) -> None:
    async def body(queue: Turns) -> None:
        begun: list[int] = []

        def begin(uid: int) -> None:
            begun.append(uid)
            clock.now += fair_queue._TURN * 0.6

        for uid in range(1000, 1017):
            queue.add(queue.account(uid), lambda uid=uid: begin(uid))
        await asyncio.sleep(0)
        assert len(begun) == 2
        await settle(begun, 17)

    story(body)


def test_who_comes_late_is_before_all_that_another_user_has_waiting() -> None:
    async def body(queue: Turns) -> None:
        begun: list[int] = []
        busy, late = queue.account(USER), queue.account(OTHER)

        def call(account: Account) -> None:
            begun.append(account.uid)
            account.charge(0.01)

        for _ in range(50):
            queue.add(busy, lambda: call(busy))
        await settle(begun, 10)
        for _ in range(3):
            queue.add(late, lambda: call(late))
        await settle(begun, 16)
        assert begun[:10] == [USER] * 10
        # It begins level with the other: what that had before is not held against it.
        assert sorted(begun[10:16]) == [USER] * 3 + [OTHER] * 3
        assert OTHER in begun[10:12]
        await settle(begun, 53)

    story(body)


def test_two_users_share_by_time_and_not_by_calls() -> None:
    """Transport rule 6 (handlers)."""

    async def body(queue: Turns) -> None:
        begun: list[int] = []
        dear, cheap = queue.account(USER), queue.account(OTHER)

        def call(account: Account, cost: float) -> None:
            begun.append(account.uid)
            account.charge(cost)

        for _ in range(100):
            queue.add(dear, lambda: call(dear, 0.009))
            queue.add(cheap, lambda: call(cheap, 0.001))
        await settle(begun, 50)
        assert 4 <= begun[:50].count(USER) <= 6
        await settle(begun, 200)

    story(body)


def test_who_floods_waits_and_nobody_else_does(clock: Clock) -> None:
    """Transport rule 6 (handlers)."""

    async def body(queue: Turns) -> None:
        begun: list[int] = []
        flooder, other = queue.account(USER), queue.account(OTHER)
        flooder.flood()
        flooder.charge(1.0)
        queue.add(flooder, lambda: begun.append(USER))
        queue.add(other, lambda: begun.append(OTHER))
        await settle(begun, 1)
        assert begun == [OTHER]
        clock.now += 2
        queue.add(other, lambda: begun.append(OTHER))
        await settle(begun, 3)
        assert sorted(begun) == [USER, OTHER, OTHER]

    story(body)


def test_who_waits_alone_is_served_when_the_time_has_come() -> None:
    async def body(queue: Turns) -> None:
        served = asyncio.get_running_loop().create_future()
        account = queue.account(USER)
        account.flood()
        account.charge(0.052)
        assert account.wait() > 0
        queue.add(account, lambda: served.set_result(None))
        await asyncio.wait_for(served, 10)

    story(body)


def test_who_has_answers_waiting_for_the_bus_waits_for_it_and_nobody_else_does() -> None:
    """Within the limits: what waits to be sent is in the way of everybody's answers."""

    async def body(queue: Turns) -> None:
        begun: list[int] = []
        greedy, other = queue.account(USER), queue.account(OTHER)
        answers: list[asyncio.Future[None]] = []

        def answer() -> None:
            begun.append(USER)
            answers.append(asyncio.get_running_loop().create_future())
            queue.sends(greedy, answers[-1])

        for _ in range(20):
            queue.add(greedy, answer)
            queue.add(other, lambda: begun.append(OTHER))
        await settle(begun, 24)
        for _ in range(50):
            await asyncio.sleep(0)
        assert (begun.count(USER), begun.count(OTHER)) == (4, 20)
        while len(begun) < 40:
            answers.pop(0).set_result(None)
            for _ in range(3):
                await asyncio.sleep(0)
            assert len(answers) <= 4
        for each in answers:
            each.cancel()  # as what is dropped
        await asyncio.sleep(0)
        assert greedy.unsent == 0

    story(body)


def test_users_who_do_nothing_are_forgotten_when_there_are_many(clock: Clock) -> None:
    async def body(queue: Turns) -> None:
        flooder = queue.account(USER)
        flooder.flood()
        for uid in range(2000, 2000 + fair_queue._MANY * 2):
            queue.account(uid)
        assert len(queue._accounts) <= fair_queue._MANY
        assert queue.account(USER) is flooder

    story(body)


def test_a_user_who_is_connected_keeps_its_account_however_many_others_there_are(
    clock: Clock,
) -> None:
    """Another connection of the same user would have limits of its own, beside those."""

    async def body(queue: Turns) -> None:
        account = queue.account(USER)
        account.sessions += 1
        clock.now += 100
        for uid in range(2000, 2000 + fair_queue._MANY * 2):
            queue.account(uid)
        assert queue.account(USER) is account

    story(body)
