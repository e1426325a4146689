# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals that end a program on an event loop: the first in good order, the next one at once."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

_T = TypeVar("_T")

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal came that ends the program."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """SIGINT, SIGTERM and SIGHUP, taken care of while in a `with` block."""

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[int] = self._loop.create_future()
        self._handled: set[signal.Signals] = set()
        self.redirect(_STOPPING, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def redirect(self, numbers: Sequence[signal.Signals], to: Callable[[int], None]) -> None:
        """Call `to` for each of these from now on; what was ignored at the start stays so."""
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._loop.add_signal_handler(number, to, number)
                self._handled.add(number)

    def release(self) -> None:
        """Let signals do what they do by default."""
        for number in self._handled:
            self._loop.remove_signal_handler(number)
        self._handled.clear()

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self._first.done():
            raise Interrupted(self._first.result())

    async def unless(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Await something, or give it up and raise Interrupted when a signal comes."""
        task = asyncio.ensure_future(work)
        waiting: set[asyncio.Future[Any]] = {task, self._first}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.check()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _stop(self, number: int) -> None:
        self._first.set_result(number)
        self.release()
