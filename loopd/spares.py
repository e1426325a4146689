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

# Seconds since the last one of the same user came, so that none is removed in the middle of that
# user's work, and how many: who lets go of hundreds wants to see their nodes gone.
_KEPT_FOR = 0.5
_KEPT = 4


class Spares:
    """Their numbers, and whose devices they were."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._numbers: set[int] = set()
        self._owners: dict[int, int] = {}
        """Also of those that are bound, and of those whose removal has just begun."""
        self._left: set[int] = set()
        """Those that have an owner and are not bound."""
        self._timers: dict[int, asyncio.TimerHandle] = {}
        """By owner."""
        self._loop = asyncio.get_running_loop()

    def choose(self, uid: int, number: int) -> int | None:
        """The device that a user gets where this one is free; None for a new one. For threads, too.

        That one, unless it has just been another user's; then one that was this user's own.
        """
        if self._owners.get(number, uid) == uid:
            return number
        own = (each for each in tuple(self._numbers) if self._owners.get(each) == uid)
        return min(own, default=None)

    def take(self, number: int, uid: int) -> None:
        """Note that a device is in use, by a user of ours or by somebody else (NOBODY)."""
        self._numbers.discard(number)
        self._left.discard(number)
        # Now, since it can be unbound, and offered, for a moment before we hear of it.
        if uid == NOBODY:
            self._owners.pop(number, None)
        else:
            self._owners[number] = uid

    def keep(self, number: int) -> None:
        """Keep a device of ours that has just been unbound; it is removed later if it still is."""
        uid = self._owners[number]
        self._numbers.add(number)
        self._left.add(number)
        if timer := self._timers.get(uid):
            timer.cancel()
        self._timers[uid] = self._loop.call_later(_KEPT_FOR, self._end, uid)
        if len(self._numbers) > _KEPT:
            self._remove(max(self._numbers))

    def remove_all(self) -> None:
        """Keep none any more."""
        for number in sorted(self._numbers, reverse=True):
            self._remove(number)

    def _end(self, uid: int) -> None:
        del self._timers[uid]
        for number in sorted(self._left, reverse=True):
            if self._owners[number] == uid:
                self._left.discard(number)
                del self._owners[number]
                if number in self._numbers:
                    self._remove(number)

    def _remove(self, number: int) -> None:
        self._numbers.discard(number)
        self._threads.remove(loopdev.remove, number)
