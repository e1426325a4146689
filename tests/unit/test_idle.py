# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leaving when there is nothing to do, by a clock that the test winds."""

import asyncio
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from loopd.daemon.idle import Idle

TIMEOUT = 300


class Timer:
    def __init__(self, when: float, action: Callable[[], None]) -> None:
        self.when, self.action, self.cancelled = when, action, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """The clock and the timers of an event loop."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []
        self.woken = 0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, action: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + delay, action))
        return self.timers[-1]

    def wind(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while due := [each for each in self.timers if each.when <= end and not each.cancelled]:
            timer = min(due, key=lambda each: each.when)
            self.timers.remove(timer)
            self.now = timer.when
            self.woken += 1
            timer.action()
        self.now = end


class Stand:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.busy = False
        self.left: list[float] = []
        self.idle = Idle(
            TIMEOUT, is_busy=lambda: self.busy, leave=lambda: self.left.append(loop.now)
        )


@pytest.fixture
def stand() -> Iterator[Stand]:
    loop = Loop()
    with mock.patch.object(asyncio, "get_running_loop", return_value=loop):
        yield Stand(loop)


def test_it_leaves_when_the_time_is_over_and_not_before(stand: Stand) -> None:
    stand.idle.touch()
    stand.loop.wind(TIMEOUT - 1)
    assert stand.left == []
    stand.loop.wind(2)
    assert stand.left == [1000 + TIMEOUT]


def test_the_time_begins_with_the_last_thing_done(stand: Stand) -> None:
    for _ in range(100):
        stand.idle.touch()
        stand.loop.wind(TIMEOUT / 2)
    assert stand.left == []
    last = stand.loop.now - TIMEOUT / 2
    stand.loop.wind(TIMEOUT)
    assert stand.left == [last + TIMEOUT]


def test_it_stays_while_there_is_something_to_do_and_is_not_woken_for_that(stand: Stand) -> None:
    stand.idle.touch()
    stand.busy = True
    stand.loop.wind(100 * TIMEOUT)
    assert (stand.left, stand.loop.woken) == ([], 1)
    stand.busy = False
    stand.idle.touch()
    stand.loop.wind(TIMEOUT + 1)
    assert len(stand.left) == 1


def test_however_often_it_is_touched_there_is_one_timer(stand: Stand) -> None:
    for _ in range(1000):
        stand.idle.touch()
    assert len(stand.loop.timers) == 1


def test_one_that_is_stopped_leaves_no_more(stand: Stand) -> None:
    stand.idle.touch()
    stand.idle.stop()
    stand.loop.wind(10 * TIMEOUT)
    assert stand.left == []
