# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many uevents a user may cause: udev deals with each of them, and everybody waits for udev.

A thousand are to be had at once, which is five hundred pairs of Attach and Detach, and fifty a
second from then on. Who has caused more waits in a turn of their own. Root never waits.
"""

import asyncio
import math

from loopd.daemon.access import ROOT
from loopd.daemon.budget import Bucket
from loopd.errors import TimedOut

# Of a disk: bound and cleared. Of a partition: made and removed, which nobody asks about.
DISK = 2
PARTITION = 2

_BURST = 1000
_RATE = 50
# Users to remember before those who have nothing to wait for are forgotten.
_MANY = 256


class Uevents:
    """What each user may cause yet."""

    def __init__(self) -> None:
        self._buckets: dict[int, Bucket] = {}

    async def take(self, uid: int, events: int, timeout: float | None) -> None:
        """Wait until a user may cause events, and count so many. Raises TimedOut."""
        if uid == ROOT:
            return
        bucket = self._bucket(uid)
        if bucket.wait():
            try:
                async with asyncio.timeout(timeout):
                    while wait := bucket.wait():  # noqa: ASYNC110  for time to pass, not for others
                        await asyncio.sleep(wait)
            except TimeoutError as exc:
                raise self._timed_out(bucket) from exc
        bucket.take(events)

    def count(self, uid: int, events: int) -> None:
        """Count events that were caused already: the next ones wait for them."""
        if uid != ROOT:
            self._bucket(uid).take(events)

    def require_no_wait(self, uid: int) -> None:
        """Raise TimedOut if this is what a call of the user has waited for."""
        bucket = self._buckets.get(uid)
        if bucket and bucket.wait():
            raise self._timed_out(bucket)

    @staticmethod
    def _timed_out(bucket: Bucket) -> TimedOut:
        return TimedOut(
            "devices and partitions of this user have come and gone too often for udev: "
            f"try again in {math.ceil(bucket.wait())} s"
        )

    def _bucket(self, uid: int) -> Bucket:
        bucket = self._buckets.get(uid)
        if bucket is None:
            if len(self._buckets) >= _MANY:
                self._buckets = {k: v for k, v in self._buckets.items() if not v.full}
            bucket = self._buckets[uid] = Bucket(burst=_BURST, rate=_RATE, step=1)
        return bucket
