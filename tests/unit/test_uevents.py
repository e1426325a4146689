# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many events for udev a user may cause: enough for people, and not more than udev can bear."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest

from loopd.daemon import budget
from loopd.daemon.host import uevent_budget
from loopd.daemon.host.uevent_budget import DISK, PARTITION, Uevents
from loopd.errors import TimedOut
from tests.harness.asynchronous import run_async

ROOT, USER, OTHER = 0, 1000, 1001
PARTITIONS = 250


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.tasks.sleep(0)


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    fake_time = SimpleNamespace(monotonic=lambda: clock.now)
    fake_asyncio = SimpleNamespace(sleep=clock.sleep, timeout=asyncio.timeout)
    with (
        mock.patch.object(budget, "time", fake_time),
        mock.patch.object(uevent_budget, "asyncio", fake_asyncio),
    ):
        yield clock


async def attach(allowed: Uevents, uid: int, partitions: int = 0) -> None:
    """Do what Attach does."""
    await allowed.take(uid, DISK, None)
    allowed.count(uid, PARTITION * partitions)


def test_hundreds_of_pairs_in_a_row_make_no_user_wait(clock: Clock) -> None:
    async def body() -> None:
        allowed = Uevents()
        begun = clock.now
        for _ in range(400):
            await attach(allowed, USER)
        assert clock.now == begun

    run_async(body())


def test_who_loops_over_many_partitions_waits_for_udev(clock: Clock) -> None:
    """Within the limits."""

    async def body() -> None:
        allowed = Uevents()
        begun, count = clock.now, 200
        for _ in range(count):
            await attach(allowed, USER, PARTITIONS)
        rate = count * (DISK + PARTITION * PARTITIONS) / (clock.now - begun)
        assert rate < 52
        # Another user, and root, wait for none of it.
        now = clock.now
        await attach(allowed, OTHER, PARTITIONS)
        for _ in range(1000):
            await attach(allowed, ROOT, PARTITIONS)
        assert clock.now == now

    run_async(body())


def test_who_has_waited_for_as_long_as_there_is_is_told_for_how_long_more() -> None:
    async def body() -> None:
        allowed = Uevents()
        allowed.require_no_wait(USER)
        allowed.count(USER, 1500)
        with pytest.raises(TimedOut, match=r"try again in 1[01] s"):
            await allowed.take(USER, DISK, 0.001)
        with pytest.raises(TimedOut, match="too often for udev"):
            allowed.require_no_wait(USER)
        allowed.require_no_wait(OTHER)

    run_async(body())


def test_users_who_have_nothing_to_wait_for_are_forgotten_when_there_are_many() -> None:
    async def body() -> None:
        allowed = Uevents()
        allowed.count(USER, 500)
        for uid in range(2000, 2000 + uevent_budget._MANY * 2):
            allowed.count(uid, 0)
        assert len(allowed._buckets) <= uevent_budget._MANY + 1
        assert not allowed._buckets[USER].full

    run_async(body())
