# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that has threads: whatever can block runs here, off the event loop."""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from enum import Enum
from functools import partial
from threading import get_ident
from typing import Any, TypeVar

from loopd.errors import LimitsExceeded, TimedOut

from .access import ROOT
from .closes import Closes, Submit
from .pool import Pool
from .quota import share

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Threads for one kind of work. One that hangs has 20 KiB.
_THREADS = 256


class Work(Enum):
    """What a user's devices are worked at for, and how much of it may run for one user."""

    OPERATION = 6
    """What a client waits for; on its own device it can hang for ever."""
    ENDING = 8
    """Detaching and closing, which is never to wait behind the former."""
    LOOK = 4
    """The first look at a file that a client passed."""
    SCAN = 1
    """A child that reads a partition table: 15 ms of a processor; in a thread of an operation's."""


class _Turns:
    """The threads for one kind of work: so many for one user, and less where few are left.

    Some are left to root, whatever others do.
    """

    def __init__(self, per_user: int) -> None:
        self._per_user = per_user
        self._taken: Counter[int] = Counter()
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}

    def take_at_once(self, uid: int) -> bool:
        """Take a turn of a user's if it need not wait for one."""
        if uid in self._waiting or not self._has_one_for(uid):
            return False
        self._taken[uid] += 1
        return True

    async def take(self, uid: int) -> None:
        """Wait for a turn of a user's; a user's own are given in their order."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(uid, turn)
            else:
                self.give_back(uid)
            raise

    def give_back(self, uid: int) -> None:
        """Give a turn back, to those who wait."""
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]
        while (next_one := next(filter(self._has_one_for, self._waiting), None)) is not None:
            turn = self._waiting[next_one][0]
            self._leave(next_one, turn)
            if not turn.done():  # cancelled
                self._taken[next_one] += 1
                turn.set_result(None)

    def _leave(self, uid: int, turn: asyncio.Future[None]) -> None:
        """Wait no more; users who wait for more turns do so behind the others."""
        waiting = self._waiting.pop(uid, deque())
        with suppress(ValueError):
            waiting.remove(turn)
        if waiting:
            self._waiting[uid] = waiting

    def _has_one_for(self, uid: int) -> bool:
        own, root = self._taken[uid], self._taken[ROOT]
        others = self._taken.total() - own - (root if uid != ROOT else 0)
        places = share(uid, of_root=root, of_others=others, in_all=_THREADS)
        return own < min(places, self._per_user)


class Threads:
    """Bounded pools: operations, ends of devices, looks, closes of clients' files, removals.

    They are apart because each can be stuck for as long as somebody else likes: a call on a
    hanging file, the flush of one, or a device that stays busy. Within a pool, turns keep what one
    user makes hang to a few threads, and what all users do to all but root's; `closes` has turns of
    its own.
    """

    def __init__(self) -> None:
        self._loop_thread = get_ident()
        self._calls = Pool(_THREADS, "call")
        self._endings = Pool(_THREADS, "ending")
        self._file_looks = Pool(_THREADS, "file-look")
        self._looks = Pool(8, "look")
        self._quick_closes = Pool(64, "close")
        self._slow_closes = Pool(256, "slow-close")
        self._roots_closes = Pool(8, "roots-close")
        self._removals = Pool(16, "removal")
        self._pools = {Work.ENDING: self._endings, Work.LOOK: self._file_looks}
        self.closes = Closes(
            self._closes_in(self._quick_closes), self._closes_in(self._slow_closes)
        )
        self._turns = {work: _Turns(work.value) for work in Work}
        self._running: set[Future[Any]] = set()

    async def run(
        self,
        function: Callable[[], _T],
        *,
        timeout: float | None = None,
        late: Callable[[_T], object] = lambda _: None,
        ended: Callable[[], object] = lambda: None,
        unused: Callable[[], object] = lambda: None,
        work: Work = Work.OPERATION,
    ) -> _T:
        """Call a function in a thread and wait for it, at most `timeout` seconds.

        The thread goes on when the time is over, and `late` gets what it returns then, in a
        thread. `ended` is called on the event loop when all of that is over. If the function is
        never called, `unused` is, to close the fds that it would have closed.
        Raises TimedOut, LimitsExceeded.
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

        pool = self._pools.get(work, self._calls)
        try:
            future = self._submit(pool, function, gives_up=work is not Work.ENDING)
        except LimitsExceeded:
            unused()
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
        unused: Callable[[], object] = lambda: None,
    ) -> _T:
        """As `run`, when it is the turn of that user, with one deadline for both."""
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        try:
            give_back = await self.turn(uid, work, timeout)
        except BaseException:
            unused()
            raise
        return await self.run(
            function,
            timeout=remaining(deadline),
            late=late,
            ended=give_back,
            unused=unused,
            work=work,
        )

    async def turn(self, uid: int, work: Work, timeout: float | None) -> Callable[[], None]:
        """Wait for a user's turn to have a thread, and return what gives it back.

        `uid` is the owner of what is worked at: what a user can make hang takes that user's own
        turns and nobody else's. Raises TimedOut.
        """
        turns = self._turns[work]
        # A timer costs as much as the rest of this, and nothing is waited for as a rule.
        if not turns.take_at_once(uid):
            try:
                async with asyncio.timeout(timeout):
                    await turns.take(uid)
            except TimeoutError as exc:
                raise TimedOut("other operations did not end in time") from exc
        return partial(turns.give_back, uid)

    async def look(self, function: Callable[[], _T]) -> _T:
        """Call a function in a thread that only reads sysfs, in places that wait for nobody."""
        return await asyncio.wrap_future(self._submit(self._looks, function))

    def close_fd(self, fd: int, *, owner: int | None) -> None:
        """Close a client's fd, see `close_fds`."""
        self.close_fds([fd], owner)

    def close_fds(self, fds: Iterable[int], owner: int | None) -> None:
        """Close fds at the expense of the user who sent them."""
        if get_ident() == self._loop_thread:
            self.closes.later(fds, owner)
        else:
            self.closes.here(fds, owner)  # as well here as in another thread

    def remove(
        self, function: Callable[[int], bool], number: int, done: Callable[[bool], None]
    ) -> None:
        """Remove a loop device in nobody's way; the event loop tells `done` whether it is gone."""
        loop = asyncio.get_running_loop()

        def tell(future: Future[bool]) -> None:
            gone = not future.cancelled() and not future.exception() and future.result()
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(done, gone)

        future = self._submit(self._removals, partial(function, number))
        future.add_done_callback(_note_late)
        future.add_done_callback(tell)

    def stop(self, timeout: float) -> int:
        """Take no more work, and say how many calls have not ended within `timeout` seconds.

        Devices that are not removed yet stay, unbound.
        """
        self._removals.close(drop=True)
        for pool in (self._calls, self._endings, self._file_looks, self._looks):
            pool.close()
        # One close may hand on another, so their pools are open until all has ended.
        end = time.monotonic() + timeout
        while (running := self._running.copy()) and (left := end - time.monotonic()) > 0:
            wait(running, left)
        for pool in (self._quick_closes, self._slow_closes, self._roots_closes):
            pool.close()
        return sum(not each.done() for each in self._running.copy())

    def _closes_in(self, pool: Pool) -> Submit:
        """Has files closed in threads of a pool, and root's where no user's are in the way."""

        def submit(owner: int | None, close: Callable[[], None]) -> None:
            self._submit(self._roots_closes if owner == ROOT else pool, close)

        return submit

    def _submit(
        self, pool: Pool, function: Callable[[], _T], *, gives_up: bool = False
    ) -> Future[_T]:
        """Have a function called in a thread of a pool, see `Pool.submit`.

        Raises LimitsExceeded if it `gives_up` where no thread can be started.
        """
        try:
            future = pool.submit(function, gives_up=gives_up)
        except RuntimeError as exc:
            raise LimitsExceeded("loopd cannot start a thread: try again later") from exc
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future


def remaining(deadline: float | None) -> float | None:
    """The seconds that are left until a time of the event loop's clock."""
    return None if deadline is None else max(deadline - asyncio.get_running_loop().time(), 0)


def _note_late(future: "asyncio.Future[_T] | Future[_T]") -> None:
    if not future.cancelled() and (exc := future.exception()):
        log.debug("a thread that nobody waits for ended with: %s", exc)
