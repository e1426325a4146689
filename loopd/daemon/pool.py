# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pool of threads that start when there is work for them and end when there is none for a while.

The executor of the standard library keeps every thread that it has ever needed.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread
from typing import Any, TypeVar

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Seconds without work after which a thread ends.
_IDLE = 10.0


class Pool:
    """At most so many threads; what comes when all of them work waits for one."""

    def __init__(self, most: int, name: str) -> None:
        """The name of each thread begins with that one."""
        self._most = most
        self._names = (f"{name}_{number}" for number in itertools.count())
        self._lock = Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._idle: list[Lock] = []
        """Of each thread without work, the lock that it waits for. The last one is the next to get
        work, so that the others have none for long enough."""
        self._threads = 0
        self._closed = False

    def submit(self, function: Callable[[], _T], *, gives_up: bool = False) -> Future[_T]:
        """Have a function called in a thread.

        Where no thread can be started it waits for one, unless it `gives_up`: then RuntimeError is
        raised, and it is not called. After `close` no thread can be: a future is cancelled then.
        """
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                if gives_up:
                    raise RuntimeError("the pool is closed")
                future.cancel()
                return future
            self._waiting.append((future, function))
            try:
                self._call_a_thread()
            except RuntimeError as exc:
                log.warning("cannot start a thread: %s", exc)
                if gives_up:
                    self._waiting.pop()
                    raise
        return future

    def close(self, *, drop: bool = False) -> None:
        """Take no more work; what waits is done yet, unless it is to be dropped."""
        with self._lock:
            self._closed = True
            dropped = [*self._waiting] if drop else []
            if drop:
                self._waiting.clear()
            for wake in self._idle:
                wake.release()
            self._idle.clear()
        for future, _ in dropped:
            future.cancel()

    def _call_a_thread(self) -> None:
        if self._idle:
            self._idle.pop().release()
        elif self._threads < self._most:
            Thread(target=self._serve, name=next(self._names), daemon=True).start()
            self._threads += 1

    def _serve(self) -> None:
        wake = Lock()
        wake.acquire()
        while work := self._next(wake):
            _do(*work)
            del work  # it may hold what is to be closed

    def _next(self, wake: Lock) -> tuple[Future[Any], Callable[[], Any]] | None:
        """Wait for work; None if the thread is to end."""
        while True:
            with self._lock:
                if self._waiting:
                    return self._waiting.popleft()
                if self._closed:
                    self._threads -= 1
                    return None
                self._idle.append(wake)
            if wake.acquire(timeout=_IDLE):
                continue
            with self._lock:
                if wake in self._idle:
                    self._idle.remove(wake)
                    self._threads -= 1
                    return None
            wake.acquire()  # it was called at the last moment


def _do(future: Future[_T], function: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as exc:  # noqa: BLE001  it is for whoever waits
        future.set_exception(exc)
    else:
        future.set_result(result)
