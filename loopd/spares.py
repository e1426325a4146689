# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unbound devices of ours that are kept for a moment, because the next attach takes one of them.

Removing a device takes 46 ms of the kernel's time, making it again half a millisecond and events
for udev; together they were a fifth of an attach and a detach in a row.

What is kept are the lowest numbers, for those are what LOOP_CTL_GET_FREE names. Whoever was named
a device that is removed before it is opened gets ENXIO, which losetup takes for the end: of six
runs of two of them beside the end of 256 devices, one failed while it was the oldest that went.
"""

import asyncio

from . import loopdev
from .threads import Threads

# Seconds since the last one came, and how many: a user who lets go of hundreds wants to see their
# nodes gone.
_KEPT_FOR = 0.5
_KEPT = 4


class Spares:
    """Their numbers."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._numbers: set[int] = set()
        self._end: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def keep(self, number: int) -> None:
        """Keep a device that has just been unbound, and remove it later if it still is."""
        self._numbers.add(number)
        if len(self._numbers) > _KEPT:
            self._remove(max(self._numbers))
        if self._end:
            self._end.cancel()
        self._end = self._loop.call_later(_KEPT_FOR, self.remove_all)

    def take(self, number: int) -> None:
        """Note that a device is in use again."""
        self._numbers.discard(number)

    def remove_all(self) -> None:
        """Keep none any more."""
        for number in sorted(self._numbers, reverse=True):
            self._remove(number)

    def _remove(self, number: int) -> None:
        self._numbers.discard(number)
        self._threads.remove(loopdev.remove, number)
