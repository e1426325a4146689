# SPDX-License-Identifier: LGPL-2.1-or-later
"""Background tasks that are kept alive, whose failures are logged, and whose time is charged.

A task is charged to the user whose call has started it, and so are those that it starts.
"""

import asyncio
import logging
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from loopd.errors import BusError, LoopError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

Charge = Callable[[float], None]
"""Takes note of seconds of the event loop's processor time."""

_charge: ContextVar[Charge | None] = ContextVar("charge", default=None)


class Tasks:
    """A set of running tasks; the event loop itself keeps only weak references."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run it in the background."""
        charge = _charge.get()
        loop = asyncio.get_running_loop()
        task = loop.create_task(_charged(work, charge) if charge else work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, timeout: float) -> None:
        """Wait for all that run now, at most `timeout` seconds."""
        if self._running:
            await asyncio.wait([*self._running], timeout=timeout)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        exc = None if task.cancelled() else task.exception()
        # The others are answers to whoever waits for the task.
        if exc and not isinstance(exc, LoopError | BusError | OSError):
            log.error("a background task failed", exc_info=exc)


@contextmanager
def charging(charge: Charge) -> Iterator[None]:
    """Charge the tasks that are started in the block, and those that they start in turn."""
    token = _charge.set(charge)
    try:
        yield
    finally:
        _charge.reset(token)


async def _charged(work: Coroutine[Any, Any, _T], charge: Charge) -> _T:
    return await metered(work, charge)


@types.coroutine
def metered(work: Coroutine[Any, Any, _T], charge: Charge) -> Generator[Any, Any, _T]:
    """Await a coroutine, and charge the processor time of its steps on the event loop."""
    step: Callable[[Any], Any] = work.send
    value: Any = None
    while True:
        start = time.thread_time()
        try:
            waits_for = step(value)
        except StopIteration as end:
            result: _T = end.value
            return result
        finally:
            charge(time.thread_time() - start)
        try:
            step, value = work.send, (yield waits_for)
        # Cancellation, too, is the coroutine's to take.
        except BaseException as exc:  # noqa: BLE001
            step, value = work.throw, exc
