# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place where threads start: whatever can block runs here, off the event loop."""

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from .backing import closes_quickly
from .errors import TimedOut

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Operations on devices that one user may have in threads at a time.
_TURNS = 6


class Threads:
    """Bounded pools: calls into the kernel, closes of clients' files, device removals.

    They are apart because each can be stuck for as long as somebody else likes: a call on a
    hanging file, the flush of one, or a device that stays busy. Files whose close is sure to end
    do not wait behind those for which it is not.
    """

    def __init__(self) -> None:
        self._calls = ThreadPoolExecutor(64, "call")
        self._looks = ThreadPoolExecutor(8, "look")
        self._closes = ThreadPoolExecutor(4, "close")
        self._slow_closes = ThreadPoolExecutor(256, "slow-close")
        self._removals = ThreadPoolExecutor(16, "removal")
        self._turns: dict[int, asyncio.Semaphore] = {}
        self._running: set[Future[Any]] = set()

    async def run(
        self,
        function: Callable[[], _T],
        *,
        timeout: float | None = None,
        late: Callable[[_T], object] = lambda _: None,
        ended: Callable[[], object] = lambda: None,
    ) -> _T:
        """Call a function in a thread and wait for it, at most `timeout` seconds.

        The thread goes on when the time is over, and `late` gets what it returns then, in that
        thread. `ended` is called on the event loop when all of that is over. Raises TimedOut.
        """
        loop = asyncio.get_running_loop()

        def over(done: Future[_T]) -> None:
            if not done.exception():
                late(done.result())
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended)

        future = self._submit(self._calls, function)
        waited = asyncio.wrap_future(future)
        try:
            await asyncio.wait([waited], timeout=timeout)
        finally:
            if waited.done():
                ended()
            else:
                waited.add_done_callback(_note_late)
                future.add_done_callback(over)
        if not waited.done():
            raise TimedOut(f"the kernel did not finish within {timeout:g} s")
        return waited.result()

    async def look(self, function: Callable[[], _T]) -> _T:
        """Call a function that only reads sysfs, and so waits for nobody, in a thread."""
        return await asyncio.wrap_future(self._submit(self._looks, function))

    async def turn(self, uid: int, timeout: float) -> Callable[[], None]:
        """Wait for a user's turn to have a thread, and return what gives it back.

        What a user can make hang for ever takes that user's own threads and nobody else's.
        Raises TimedOut.
        """
        turns = self._turns.setdefault(uid, asyncio.Semaphore(_TURNS))
        try:
            await asyncio.wait_for(turns.acquire(), timeout)
        except TimeoutError as exc:
            raise TimedOut(
                f"other operations of this user did not end within {timeout:g} s"
            ) from exc
        return turns.release

    def close_fd(self, fd: int) -> None:
        """Close a client's fd: the flush of a file on FUSE ends when its server likes."""
        self._submit(self._closes, partial(self._close, fd))

    def _close(self, fd: int) -> None:
        if closes_quickly(fd):
            _close(fd)
        else:
            self._submit(self._slow_closes, partial(_close, fd))

    def remove(self, function: Callable[[int], bool], number: int) -> None:
        """Remove a loop device in nobody's way."""
        self._submit(self._removals, partial(function, number)).add_done_callback(_note_late)

    def stop(self, timeout: float) -> bool:
        """Take no more work, and say whether all that runs has ended within `timeout` seconds.

        Devices that are not removed yet stay, unbound.
        """
        self._removals.shutdown(wait=False, cancel_futures=True)
        self._calls.shutdown(wait=False)
        self._looks.shutdown(wait=False)
        self._closes.shutdown(wait=False)
        self._slow_closes.shutdown(wait=False)
        return not wait(self._running.copy(), timeout).not_done

    def _submit(self, pool: ThreadPoolExecutor, function: Callable[[], _T]) -> Future[_T]:
        future = pool.submit(function)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as exc:
        # The fd is gone all the same; the error is the client's to see, on its own fd.
        log.debug("closing a client's file: %s", exc.strerror)


def _note_late(future: "asyncio.Future[_T] | Future[_T]") -> None:
    if not future.cancelled() and (exc := future.exception()):
        log.debug("a thread that nobody waits for ended with: %s", exc)
