# SPDX-License-Identifier: LGPL-2.1-or-later
"""When loopd has had nothing to do for so long that it leaves, until the bus starts it again."""

import asyncio
from collections.abc import Callable


class Idle:
    """Calls `leave` when there was nothing to do for `timeout` seconds.

    `is_busy` says whether there is something; whatever ends it has to `touch`, so that nothing
    wakes up only to look.
    """

    def __init__(
        self, timeout: float, *, is_busy: Callable[[], bool], leave: Callable[[], None]
    ) -> None:
        self._timeout = timeout
        self._is_busy = is_busy
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def touch(self) -> None:
        """Begin to count anew, because something has just been done."""
        self._last = self._loop.time()
        if self._timer is None:
            self._wait(self._timeout)

    def stop(self) -> None:
        """Count no more."""
        if self._timer:
            self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._is_busy():
            return
        left = self._last + self._timeout - self._loop.time()
        if left > 0:
            self._wait(left)
        else:
            self._leave()
