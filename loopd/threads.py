# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place where threads start: whatever can block runs here, off the event loop."""

import asyncio
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from enum import Enum
from functools import partial
from threading import Lock, get_ident
from typing import Any, TypeVar

from .backing import closes_quickly
from .errors import LimitsExceeded, TimedOut

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Work(Enum):
    """What a user's devices are worked at for, and how much of it may run for one user."""

    OPERATION = 6
    """What a client waits for; on its own device it can hang for ever."""
    ENDING = 8
    """Detaching and closing, which is never to wait behind the former."""
    SCAN = 1
    """A child that reads a partition table: 15 ms of a processor."""


class Threads:
    """Bounded pools: operations, ends of devices, looks, closes of clients' files, removals.

    They are apart because each can be stuck for as long as somebody else likes: a call on a
    hanging file, the flush of one, or a device that stays busy. Files whose close is sure to end
    do not wait behind those for which it is not. Within a pool, turns keep what one user makes
    hang to a few threads.
    """

    def __init__(self) -> None:
        self._loop_thread = get_ident()
        self._calls = ThreadPoolExecutor(64, "call")
        self._endings = ThreadPoolExecutor(64, "ending")
        self._looks = ThreadPoolExecutor(8, "look")
        self._closes = ThreadPoolExecutor(4, "close")
        self._slow_closes = ThreadPoolExecutor(256, "slow-close")
        self._removals = ThreadPoolExecutor(16, "removal")
        self._closing: Counter[object] = Counter()
        self._counting = Lock()
        self._turns: dict[tuple[int, Work], asyncio.Semaphore] = {}
        self._running: set[Future[Any]] = set()
        self._stopped = False

    async def run(
        self,
        function: Callable[[], _T],
        *,
        timeout: float | None = None,
        late: Callable[[_T], object] = lambda _: None,
        ended: Callable[[], object] = lambda: None,
        work: Work = Work.OPERATION,
    ) -> _T:
        """Call a function in a thread and wait for it, at most `timeout` seconds.

        The thread goes on when the time is over, and `late` gets what it returns then, in a
        thread. `ended` is called on the event loop when all of that is over. Raises TimedOut.
        """
        loop = asyncio.get_running_loop()
        # Not asyncio.wait on a wrapped future: that was half of what a call costs the event loop.
        waited = loop.create_future()

        def wake() -> None:
            if not waited.done():
                waited.set_result(None)

        def done(_: Future[_T]) -> None:
            # Closed, if it comes too late for anybody.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        def over(done: Future[_T]) -> None:
            if get_ident() == self._loop_thread:  # it was done just now
                self._submit(pool, partial(over, done))
                return
            try:
                if not done.exception():
                    late(done.result())
            finally:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(ended)

        pool = self._endings if work is Work.ENDING else self._calls
        try:
            future = self._submit(pool, function, gives_up=work is not Work.ENDING)
        except LimitsExceeded:
            ended()
            raise
        future.add_done_callback(done)
        timer = None if timeout is None else loop.call_later(timeout, wake)
        in_time = False
        try:
            await waited
            in_time = future.done()
        finally:
            if timer:
                timer.cancel()
            if in_time:
                ended()
            else:
                future.add_done_callback(_note_late)
                future.add_done_callback(over)
        if not in_time:
            raise TimedOut(f"the kernel did not finish within {math.ceil(timeout or 0)} s")
        return future.result()

    async def run_in_turn(
        self,
        uid: int,
        work: Work,
        function: Callable[[], _T],
        *,
        timeout: float | None = None,
        late: Callable[[_T], object] = lambda _: None,
    ) -> _T:
        """As `run`, when it is the turn of that user, with one deadline for both."""
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        give_back = await self.turn(uid, work, timeout)
        return await self.run(
            function, timeout=remaining(deadline), late=late, ended=give_back, work=work
        )

    async def turn(self, uid: int, work: Work, timeout: float | None) -> Callable[[], None]:
        """Wait for a user's turn to have a thread, and return what gives it back.

        `uid` is the owner of what is worked at: what a user can make hang takes that user's own
        turns and nobody else's. Raises TimedOut.
        """
        turns = self._turns.get((uid, work))
        if turns is None:
            turns = self._turns[uid, work] = asyncio.Semaphore(work.value)
        try:
            async with asyncio.timeout(timeout):
                await turns.acquire()
        except TimeoutError as exc:
            raise TimedOut("other operations of this user did not end in time") from exc
        return turns.release

    async def look(self, function: Callable[[], _T]) -> _T:
        """Call a function in a thread that only reads sysfs, in places that wait for nobody."""
        return await asyncio.wrap_future(self._submit(self._looks, function))

    def close_fd(self, fd: int, owner: object = None) -> None:
        """Close a client's fd: the flush of a file on FUSE ends when its server likes."""
        self.close_fds([fd], owner)

    def close_fds(self, fds: Iterable[int], owner: object = None) -> None:
        """Close several at once, at the expense of whoever sent them."""
        close = partial(self._close, tuple(fds), owner)
        if get_ident() == self._loop_thread:
            self._submit(self._closes, close)
        else:
            close()  # as well here as in another thread

    def _close(self, fds: tuple[int, ...], owner: object) -> None:
        for fd in fds:
            if closes_quickly(fd):
                _close(fd)
                continue
            with self._counting:
                self._closing[owner] += 1
            self._submit(self._slow_closes, partial(self._close_slowly, fd, owner))

    def _close_slowly(self, fd: int, owner: object) -> None:
        _close(fd)
        with self._counting:
            self._closing[owner] -= 1
            if not self._closing[owner]:
                del self._closing[owner]

    def closing(self, owner: object) -> int:
        """The fds of somebody that are being closed and may not be for as long as it likes."""
        return self._closing.get(owner, 0)

    @property
    def closing_for_all(self) -> int:
        """Those of everybody."""
        with self._counting:
            return self._closing.total()

    def remove(self, function: Callable[[int], bool], number: int) -> None:
        """Remove a loop device in nobody's way."""
        self._submit(self._removals, partial(function, number)).add_done_callback(_note_late)

    def stop(self, timeout: float) -> int:
        """Take no more work, and say how many calls have not ended within `timeout` seconds.

        Devices that are not removed yet stay, unbound.
        """
        self._stopped = True
        self._removals.shutdown(wait=False, cancel_futures=True)
        self._calls.shutdown(wait=False)
        self._endings.shutdown(wait=False)
        self._looks.shutdown(wait=False)
        self._closes.shutdown()  # none of it waits for anybody, and some is for the next
        self._slow_closes.shutdown(wait=False)
        return len(wait(self._running.copy(), timeout).not_done)

    def _submit(
        self, pool: ThreadPoolExecutor, function: Callable[[], _T], *, gives_up: bool = False
    ) -> Future[_T]:
        """Have a function called in a thread of a pool.

        Where no thread can be started, it waits for one. Raises LimitsExceeded if it rather
        `gives_up`, and is not called at all then.
        """
        future: Future[_T] = Future()
        self._running.add(future)
        future.add_done_callback(self._running.discard)

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as exc:  # noqa: BLE001  it is for whoever waits
                future.set_exception(exc)
            else:
                future.set_result(result)

        def cancel(queued: Future[None]) -> None:
            if queued.cancelled():
                future.cancel()

        try:
            pool.submit(call).add_done_callback(cancel)
        # The executor queues first, and then finds that it cannot start a thread.
        except RuntimeError as exc:
            log.warning("cannot start a thread: %s", exc)
            if gives_up or self._stopped:
                future.cancel()
            if gives_up:
                raise LimitsExceeded("loopd cannot start a thread: try again later") from exc
        return future


def remaining(deadline: float | None) -> float | None:
    """The seconds that are left until a time of the event loop's clock."""
    return None if deadline is None else max(deadline - asyncio.get_running_loop().time(), 0)


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as exc:
        # The fd is gone all the same; the error is the client's to see, on its own fd.
        log.debug("closing a client's file: %s", exc.strerror)


def _note_late(future: "asyncio.Future[_T] | Future[_T]") -> None:
    if not future.cancelled() and (exc := future.exception()):
        log.debug("a thread that nobody waits for ended with: %s", exc)
