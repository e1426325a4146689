# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unbound devices of ours that are kept for a moment, because the next attach takes one of them.

Removing a device takes 46 ms of the kernel's time, making it again half a millisecond and events
for udev; together they were a fifth of an attach and a detach in a row.
"""

import asyncio

from . import loopdev
from .threads import Threads

# Seconds, and how many: a user who lets go of hundreds wants to see their nodes gone.
_KEPT_FOR = 0.5
_KEPT = 4


class Spares:
    """Their numbers, oldest first."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def keep(self, number: int) -> None:
        """Keep a device that has just been unbound, and remove it later if it still is."""
        self.take(number)
        self._timers[number] = self._loop.call_later(_KEPT_FOR, self._remove, number)
        if len(self._timers) > _KEPT:
            self._remove(next(iter(self._timers)))

    def take(self, number: int) -> None:
        """Note that a device is in use again."""
        if timer := self._timers.pop(number, None):
            timer.cancel()

    def remove_all(self) -> None:
        """Keep none any more."""
        for number in [*self._timers]:
            self._remove(number)

    def _remove(self, number: int) -> None:
        self.take(number)
        self._threads.remove(loopdev.remove, number)
