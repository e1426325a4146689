# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices and their numbers after a detach: which user may have them next, and until when.

An unbound device of ours is kept for a moment, because the next attach of its user takes it.
Removing a device takes 46 ms of the kernel's time, making it again half a millisecond and events
for udev; together they were a fifth of an attach and a detach in a row.

The lowest numbers are kept, because LOOP_CTL_GET_FREE names the lowest. A program that opens a
device which was removed after GET_FREE had named it gets ENXIO, and losetup gives up then.

Only devices that were made for loopd are kept and removed, and no others are taken. The loop module
makes some when it is loaded, and others may name those. GET_FREE does not say whether it has made
the device that it names, so loopd does not ask it. A device that somebody has open cannot be
removed, and is tried again later. While there are many of those, no new ones are made.

No other user gets the number for some seconds, also when the device has been removed, except by
asking for that very number. A program that mounts a device by its name, as udisks2 does for its
owner, would mount the other user's file.

Threads read here. Only the event loop writes.
"""

import asyncio
import itertools
from collections.abc import Iterator
from functools import partial

from loopd.daemon.access import NOBODY
from loopd.daemon.threads import Threads
from loopd.loop import kernel, loop_device
from loopd.loop.attach import Numbers

# Seconds since the last detach of the same user, so that no device is removed in the midst of that
# user's work; and how many are kept: a user who detaches hundreds wants to see their nodes gone.
_KEPT_FOR = 0.5
_KEPT = 4
# So many may be there to be removed before another one is made. Seconds until one that could not be
# removed is tried again.
_GOING = 16
_AGAIN_AFTER = 2.0
# Seconds since the last detach of the same user in which its numbers go to no other user.
_REMEMBERED_FOR = 10.0


class Spares:
    """The numbers of our devices, and the users that had them last."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._kept: frozenset[int] = frozenset()
        """The devices that are kept. Replaced, never changed, because threads read it."""
        self._made: set[int] = set()
        """The devices that were made for us, those in use among them."""
        self._going: frozenset[int] = frozenset()
        """Those of them that are unbound and not kept any more. Replaced as well."""
        self._owners: dict[int, int] = {}
        """The users of bound devices, and the last users of unbound and removed ones."""
        self._left: frozenset[int] = frozenset()
        """The numbers that have an owner and are not bound by us. Replaced as well."""
        self._timers: dict[int, asyncio.TimerHandle] = {}
        """By owner."""
        self._loop = asyncio.get_running_loop()

    def numbers(self, uid: int) -> Numbers:
        """Which devices a user may have, for the thread that attaches."""
        return Numbers(
            choose=partial(self._choose, uid),
            new=partial(self._new, uid),
            suits=partial(self._suits, uid),
            stays=self.stays,
        )

    def _choose(self, uid: int, _control_fd: int) -> int | None:
        """A device that a user has had, and that is not removed yet; None for a new one."""
        own = (each for each in sorted(self._kept | self._going) if self._owners.get(each) == uid)
        return next((each for each in own if not kernel.loop_bound(each)), None)

    def _new(self, uid: int) -> Iterator[int]:
        """The numbers to try for a new device."""
        if len(self._going) >= _GOING:
            return
        if all(self._suits(uid, number) for number in self._left):
            yield -1
        # LOOP_CTL_ADD fails for each of these, and a machine can have a thousand.
        existing = set(kernel.loop_numbers())
        for number in itertools.filterfalse(existing.__contains__, itertools.count()):
            bound = number in self._owners and number not in self._left
            if self._suits(uid, number) and not bound:
                yield number

    def _suits(self, uid: int, number: int) -> bool:
        return self._owners.get(number, uid) == uid

    def stays(self, number: int) -> None:
        """Remove a device that was made in vain, when that can be done; for threads."""
        self._loop.call_soon_threadsafe(self._remove, number)

    def take(self, number: int, uid: int, *, is_new: bool = False) -> None:
        """Note that a device is in use, by a user of ours or by somebody else (NOBODY).

        `is_new` says that it was made for that.
        """
        self._kept -= {number}
        self._going -= {number}
        if is_new:
            self._made.add(number)
        # Of somebody else's nothing is noted: by udisks2, for a moment, another user could have a
        # number forgotten.
        if uid != NOBODY:
            self._left -= {number}
            # Now, since it can be unbound, and offered, for a moment before we hear of it.
            self._owners[number] = uid

    def keep(self, number: int) -> None:
        """Keep a device of ours that has just been unbound; it is removed later if it still is.

        One that was there before us stays.
        """
        uid = self._owners[number]
        self._left |= {number}
        if number in self._made:
            self._kept |= {number}
        if timer := self._timers.get(uid):
            timer.cancel()
        self._timers[uid] = self._loop.call_later(_KEPT_FOR, self._end, uid)
        if len(self._kept) > _KEPT:
            self._remove(max(self._kept))

    def left_by_others(self, number: int) -> None:
        """Remove a device that others have used since, if it was made for us."""
        if number in self._made:
            self._remove(number)

    def remove_all(self) -> None:
        """Keep none any more."""
        for number in sorted(self._kept, reverse=True):
            self._remove(number)

    def _end(self, uid: int) -> None:
        """Remove the devices that are kept for a user, and remember their numbers for longer."""
        for number in sorted(self._kept, reverse=True):
            if self._owners[number] == uid:
                self._remove(number)
        rest = _REMEMBERED_FOR - _KEPT_FOR
        self._timers[uid] = self._loop.call_later(rest, self._forget, uid)

    def _forget(self, uid: int) -> None:
        del self._timers[uid]
        over = {number for number in self._left if self._owners[number] == uid}
        self._left -= over
        for number in over:
            del self._owners[number]

    def _remove(self, number: int) -> None:
        self._kept -= {number}
        self._made.add(number)
        self._going |= {number}
        self._threads.remove(loop_device.remove, number, partial(self._removed, number))

    def _removed(self, number: int, gone: bool) -> None:
        if not gone:
            self._loop.call_later(_AGAIN_AFTER, self._again, number)
        elif number in self._going or number not in self._owners:
            # Else there is a new one by now, which was made for us as well.
            self._made.discard(number)
            self._going -= {number}

    def _again(self, number: int) -> None:
        if number in self._going:
            self._remove(number)
