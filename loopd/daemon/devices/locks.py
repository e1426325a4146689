# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who holds which BSD lock on a device, and until when: one a device, of one connection.

The locks themselves are taken in `loop.change`. udev waits for a lock for three minutes and then
gives up on the device for good, so an exclusive one of an ordinary user ends before that. Locks
that follow each other closely have no more time together, and then udev has a pause to look.
"""

import asyncio
import fcntl
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from loopd.daemon.access import ROOT, Client
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.errors import DeviceBusy
from loopd.loop import kernel
from loopd.loop.block_device import Lock

from .device import Device

log = logging.getLogger(__name__)

# How long a new lock waits for the end of the last one, which systemd may have to take note of.
_END_TIMEOUT = 10.0
# Seconds without an exclusive lock, in which udev has its look: it tries each 0.2 s.
_PAUSE = 3.0


@dataclass(kw_only=True, eq=False)
class _Held:
    device: Device
    client: Client
    expiry: asyncio.TimerHandle | None = field(default=None, repr=False)


class Locks:
    """All locks that are held; `changed` is told of devices whose lock is another one now."""

    def __init__(
        self,
        threads: Threads,
        changed: Callable[[Device], None],
        record: Callable[[Device], None],
        *,
        exclusive_for: float,
    ) -> None:
        """`record` has the next loopd know of a lock; `exclusive_for`: how many seconds an ordinary
        user may keep a device exclusively.
        """
        self._threads = threads
        self._changed = changed
        self._record = record
        self._exclusive_for = exclusive_for
        self._held: dict[str, _Held] = {}
        self._ends: dict[str, asyncio.Task[None]] = {}
        """Locks that are being closed, by their devices."""
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    def holder(self, device: Device) -> Client | None:
        """The connection that holds the lock on a device."""
        held = self._held.get(device.path)
        return held.client if held else None

    def note(self, device: Device, client: Client, kind: Lock) -> None:
        """Note the lock that has been taken on a device, in place of the one there was.

        Raises OSError if the next loopd would not know of it; then there is none.
        """
        if kind is device.lock:
            return  # an exclusive one does not begin anew: nobody else had a chance
        expires = None
        if kind is Lock.EXCLUSIVE and client.uid != ROOT:
            if not self._pause_left(device):
                device.exclusive_left = self._exclusive_for
            expires = self._loop.time() + device.exclusive_left
        self._hold(device, client, kind, expires)
        try:
            self._record(device)
        except OSError:
            self.drop(device)
            raise

    def require_time(self, device: Device, client: Client, kind: Lock) -> None:
        """Raise DeviceBusy if the owner's time of exclusive locks is used up and no pause was."""
        if kind is not Lock.EXCLUSIVE or device.lock is kind or client.uid == ROOT:
            return
        pause = self._pause_left(device)
        if pause and not device.exclusive_left:
            raise DeviceBusy(
                f"{device.node} was locked exclusively for {self._exclusive_for:g} s, so udev has "
                f"its turn now: try again in {math.ceil(pause)} s"
            )

    def _pause_left(self, device: Device) -> float:
        """The seconds until the owner of a device may have it exclusively for all of the time."""
        if device.exclusive_ended is None:
            return 0
        return max(device.exclusive_ended + _PAUSE - self._loop.time(), 0)

    def take_back(
        self, device: Device, client: Client | None, kind: Lock, expires: float | None
    ) -> None:
        """Note a lock that a former loopd took, or drop it if its connection is gone."""
        if client:
            self._hold(device, client, kind, expires)
        else:
            device.lock = kind
            self.drop(device)

    def _hold(self, device: Device, client: Client, kind: Lock, expires: float | None) -> None:
        self._forget(device)
        held = self._held[device.path] = _Held(device=device, client=client)
        if expires is not None:
            held.expiry = self._loop.call_at(expires, self._expire, held)
        device.lock, device.lock_holder, device.lock_expires = kind, client.name, expires
        self._changed(device)

    def drop(self, device: Device) -> None:
        """Unlock a device, if it is locked; others get it a moment later."""
        self._forget(device)
        if device.lock is Lock.NONE:
            return
        device.lock, device.lock_holder, device.lock_expires = Lock.NONE, "", None
        self._changed(device)
        if device.loop and device.loop.lock:
            lock, device.loop.lock = device.loop.lock, None
            # Now, whoever has a copy of the fd; its close may have to wait, and so makes udev look.
            try:
                kernel.flock(lock.fileno(), fcntl.LOCK_UN)
            except OSError as exc:
                log.debug("cannot unlock %s: %s", device.node, exc.strerror)
            end = self._threads.run_in_turn(device.owner, Work.ENDING, lock.close)
            self._ends[device.path] = task = self._tasks.start(end)
            task.add_done_callback(partial(self._ended, device.path))

    def _ended(self, path: str, task: asyncio.Task[None]) -> None:
        if self._ends.get(path) is task:
            del self._ends[path]

    async def settle(self, device: Device) -> None:
        """Wait until the lock that was dropped last is closed, and out of systemd's store.

        Else who locks and unlocks over and over would fill that. Raises DeviceBusy.
        """
        if end := self._ends.get(device.path):
            await asyncio.wait([end], timeout=_END_TIMEOUT)
            if not end.done():
                raise DeviceBusy(f"the last lock on {device.node} is not closed yet: try again")

    def client_left(self, client: Client) -> None:
        """Drop all that a connection held."""
        for held in [each for each in self._held.values() if each.client is client]:
            self.drop(held.device)

    def _expire(self, held: _Held) -> None:
        log.info(
            "%s was locked for %g s, which is enough",
            held.device.node,
            self._exclusive_for,
            extra={"UID": held.device.owner, **held.device.fields},
        )
        self.drop(held.device)
        held.device.exclusive_left = 0  # timers may be a little early

    def _forget(self, device: Device) -> None:
        held = self._held.pop(device.path, None)
        if held and held.expiry:
            held.expiry.cancel()
            now = self._loop.time()
            device.exclusive_left = max((device.lock_expires or now) - now, 0)
            device.exclusive_ended = now
