# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closing the fds that clients have sent, in threads, a few at a time for each user.

A close can hang: a FUSE server may never answer the flush. A user's other fds wait in a queue
meanwhile, and `is_full` tells when so many of one user wait that no more should be taken.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from threading import Lock

from loopd.loop.backing_file import closes_quickly

log = logging.getLogger(__name__)

# Threads for one user, of closes that are sure to end as far as is known, and of the others.
_QUICK_AT_A_TIME = 2
_SLOW_AT_A_TIME = 4
# Fds of one user that may wait to be closed: of files whose close may hang, and in all.
_MAX_SLOW = 32
_MAX_OPEN = 256

Submit = Callable[[int | None, Callable[[], None]], object]
"""Has a function called for an owner in a thread of a pool."""


class Closes:
    """All fds that are to be closed; `quick` and `slow` are pools of threads.

    An owner is the uid of a user. Connections whose users are not known are one owner, None: a user
    has many, and can close each before the bus has said whose it was.
    """

    def __init__(self, quick: Submit, slow: Submit) -> None:
        self._quick = _Lanes(quick, _QUICK_AT_A_TIME)
        self._slow = _Lanes(slow, _SLOW_AT_A_TIME)
        self._open = _Tally()
        self._may_hang = _Tally()

    @property
    def crowded(self) -> bool:
        """Whether there may be an owner who `is_full`."""
        return self._may_hang.total > _MAX_SLOW or self._open.total > _MAX_OPEN

    def is_full(self, owner: int | None) -> bool:
        """Whether too many fds of an owner's wait to be closed."""
        return self._may_hang.of(owner) > _MAX_SLOW or self._open.of(owner) > _MAX_OPEN

    def later(self, fds: Iterable[int], owner: int | None) -> None:
        """Close fds in threads of the owner's share."""
        batch = tuple(fds)
        self._open.add(owner, len(batch))
        self._quick.add(owner, partial(self._close_batch, batch, owner))

    def here(self, fds: Iterable[int], owner: int | None) -> None:
        """Close fds in this thread, but for those whose close may hang."""
        for fd in fds:
            if closes_quickly(fd):
                _close(fd)
            else:
                self._open.add(owner, 1)
                self._hand_on(fd, owner)

    def _close_batch(self, fds: tuple[int, ...], owner: int | None) -> None:
        closed = 0
        for fd in fds:
            if closes_quickly(fd):
                _close(fd)
                closed += 1
            else:
                self._hand_on(fd, owner)
        self._open.add(owner, -closed)

    def _hand_on(self, fd: int, owner: int | None) -> None:
        self._may_hang.add(owner, 1)
        self._slow.add(owner, partial(self._close_slowly, fd, owner))

    def _close_slowly(self, fd: int, owner: int | None) -> None:
        _close(fd)
        self._may_hang.add(owner, -1)
        self._open.add(owner, -1)


class _Tally:
    """Counts for each owner and in all; for any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._counts: Counter[int | None] = Counter()
        self._lock = Lock()

    def add(self, owner: int | None, number: int) -> None:
        with self._lock:
            self.total += number
            self._counts[owner] += number
            if not self._counts[owner]:
                del self._counts[owner]

    def of(self, owner: int | None) -> int:
        return self._counts.get(owner, 0)


class _Lanes:
    """A pool of which each owner has so many threads at a time; the owner's other work waits."""

    def __init__(self, submit: Submit, at_a_time: int) -> None:
        self._submit = submit
        self._at_a_time = at_a_time
        self._running: Counter[int | None] = Counter()
        self._waiting: dict[int | None, deque[Callable[[], None]]] = {}
        self._lock = Lock()

    def add(self, owner: int | None, work: Callable[[], None]) -> None:
        with self._lock:
            if self._running[owner] >= self._at_a_time:
                self._waiting.setdefault(owner, deque()).append(work)
                return
            self._running[owner] += 1
        self._submit(owner, partial(self._run, owner, work))

    def _run(self, owner: int | None, work: Callable[[], None] | None) -> None:
        while work:
            try:
                work()
            # A bug of ours, which is not to cost the owner a thread.
            except Exception:
                log.exception("an fd of a client may be left open")
            work = self._next(owner)

    def _next(self, owner: int | None) -> Callable[[], None] | None:
        """Take the owner's next work, or give the thread back."""
        with self._lock:
            waiting = self._waiting.get(owner)
            if waiting:
                following = waiting.popleft()
                if not waiting:
                    del self._waiting[owner]
                return following
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
            return None


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as exc:
        # The fd is gone all the same; the error is the client's to see, on its own fd.
        log.debug("closing a client's file: %s", exc.strerror)
