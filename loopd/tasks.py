# SPDX-License-Identifier: LGPL-2.1-or-later
"""Background tasks that are kept alive, and whose failures are logged."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from .errors import BusError, LoopError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Tasks:
    """A set of running tasks; the event loop itself keeps only weak references."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run it in the background."""
        task = asyncio.ensure_future(work)
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
