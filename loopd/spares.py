# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unbound devices of ours that are kept for a moment, because the next attach takes one of them.

Removing a device takes 46 ms of the kernel's time, making it again half a millisecond and events
for udev; together they were a fifth of an attach and a detach in a row.

What is kept are the lowest numbers, for those are what LOOP_CTL_GET_FREE names. Whoever was named
a device that is removed before it is opened gets ENXIO, which losetup takes for the end: of six
runs of two of them beside the end of 256 devices, one failed while it was the oldest that went.

No other user gets one of them, unless by its number. Who is about to mount a device by its name, as
udisks2 does for its owner, would mount what has that name by then.
"""

import asyncio

from . import loopdev
from .access import NOBODY
from .threads import Threads

# Seconds, and how many: a user who lets go of hundreds wants to see their nodes gone.
_KEPT_FOR = 0.5
_KEPT = 4


class Spares:
    """Their numbers, and whose devices they were."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._numbers: set[int] = set()
        self._owners: dict[int, int] = {}
        """Also of those that are bound, and of those whose removal has just begun."""
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()

    def suits(self, uid: int, number: int) -> bool:
        """Whether a user may take a device that is there; for threads, too."""
        return self._owners.get(number, uid) == uid

    def take(self, number: int, uid: int) -> None:
        """Note that a device is in use, by a user of ours or by somebody else (NOBODY)."""
        self._numbers.discard(number)
        if timer := self._timers.pop(number, None):
            timer.cancel()
        # Now, since it can be unbound, and offered, for a moment before we hear of it.
        if uid == NOBODY:
            self._owners.pop(number, None)
        else:
            self._owners[number] = uid

    def keep(self, number: int) -> None:
        """Keep a device of ours that has just been unbound; it is removed later if it still is."""
        self._numbers.add(number)
        if timer := self._timers.pop(number, None):
            timer.cancel()
        self._timers[number] = self._loop.call_later(_KEPT_FOR, self._end, number)
        if len(self._numbers) > _KEPT:
            self._remove(max(self._numbers))

    def remove_all(self) -> None:
        """Keep none any more."""
        for number in sorted(self._numbers, reverse=True):
            self._remove(number)

    def _end(self, number: int) -> None:
        del self._timers[number]
        self._owners.pop(number, None)
        if number in self._numbers:
            self._remove(number)

    def _remove(self, number: int) -> None:
        self._numbers.discard(number)
        self._threads.remove(loopdev.remove, number)
