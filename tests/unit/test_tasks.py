# SPDX-License-Identifier: LGPL-2.1-or-later
"""Background tasks last until they are done, and their time is charged to those who cause them."""

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from loopd.daemon import tasks as tasks_module
from loopd.daemon.tasks import Tasks, charging, metered
from tests.harness.asynchronous import run_async


def test_a_task_that_only_waits_for_itself_is_kept() -> None:
    """Transport rule 6 (handlers): a strong reference; the event loop's own is a weak one."""

    async def body() -> None:
        ended = []

        async def wait() -> None:
            try:
                # Nobody else has this future: without the task both are garbage.
                await asyncio.get_running_loop().create_future()
            finally:
                ended.append(True)

        tasks = Tasks()
        tasks.start(wait())
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)
        assert ended == []
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        assert ended == [True]

    run_async(body())


# Metering


class Clock:
    """Processor time that passes when it is told to."""

    def __init__(self) -> None:
        self.worked = 0.0


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    fake = SimpleNamespace(thread_time=lambda: clock.worked)
    with mock.patch.object(tasks_module, "time", fake):
        yield clock


def test_what_a_call_starts_and_what_that_starts_is_charged_to_its_user(clock: Clock) -> None:
    """Within the limits."""
    charged: list[float] = []

    async def body() -> None:
        tasks = Tasks()

        async def child() -> None:
            clock.worked += 1
            await asyncio.sleep(0)
            clock.worked += 2

        async def parent() -> None:
            clock.worked += 4
            await tasks.start(child())

        with charging(charged.append):
            begun = tasks.start(parent())
        await begun
        assert sum(charged) == 7
        await tasks.start(child())  # of nobody's
        assert sum(charged) == 7

    run_async(body())


def test_the_steps_of_a_coroutine_are_charged_and_its_waits_are_not(clock: Clock) -> None:
    charged: list[float] = []

    async def work() -> str:
        clock.worked += 1
        await asyncio.sleep(0)
        clock.worked += 2
        return "done"

    async def run() -> str:
        task = asyncio.ensure_future(wrapped(work()))
        await asyncio.sleep(0)
        clock.worked += 100
        return await task

    async def wrapped(coroutine: Coroutine[Any, Any, str]) -> str:
        return await metered(coroutine, charged.append)

    assert asyncio.run(run()) == "done"
    assert charged == [1, 2]


def test_a_metered_coroutine_fails_and_is_cancelled_as_any_other() -> None:
    seen: list[str] = []

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("so")

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def outcome(work: Coroutine[Any, Any, None]) -> None:
        await metered(work, lambda seconds: None)

    async def run() -> None:
        with pytest.raises(ValueError, match="so"):
            await outcome(fail())
        task = asyncio.ensure_future(outcome(wait()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert seen == ["cancelled"]
