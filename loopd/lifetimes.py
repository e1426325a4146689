# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long devices are kept: by a connection, by a user's being there, and by Holds beside them.

A Hold is a pipe whose write end is ours: it lasts until nobody has the read end open any more, in
whatever process, and whoever reads it finds its end when the device is gone.
"""

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from .access import Client
from .config import Limits
from .device import ATTACHED, Device
from .errors import NotSupported
from .fd import OwnedFd
from .leases import CONNECTION, USER, Lease, Leases, Place, Quota
from .logind import Logind
from .registry import Registry
from .tasks import Tasks

log = logging.getLogger(__name__)

# Between two rounds of questions to logind, because anybody may send what makes us ask.
_PAUSE = 0.1


@dataclass(eq=False)
class _Hold:
    device: Device
    write_end: OwnedFd
    place: Place


class Lifetimes:
    """The leases and the Holds of all devices; `let_go` detaches one that nothing keeps."""

    def __init__(
        self,
        leases: Leases,
        registry: Registry,
        logind: Logind,
        limits: Limits,
        let_go: Callable[[Device], None],
    ) -> None:
        self._leases = leases
        self._registry = registry
        self._logind = logind
        self._let_go = let_go
        self._quota = Quota(
            "Holds", per_user=limits.holds_per_user, in_all=limits.holds, hint="close one first"
        )
        self._holds: defaultdict[str, set[_Hold]] = defaultdict(set)
        self._looking = False
        self._look_again = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    # --- leases ---------------------------------------------------------------------------------

    async def require(self, uid: int, lifetime: str) -> None:
        """Raise NotSupported if a device of this user cannot have such a lifetime."""
        if lifetime == USER and not await self._logind.knows(uid):
            raise NotSupported(
                f"lifetime: logind does not know the uid {uid}, so it would not say when it leaves"
            )

    def grant(self, device: Device, client: Client, lifetime: str) -> None:
        """Keep a new device for so long."""
        holder = client.name if lifetime == CONNECTION else ""
        device.lease = Lease(device.path, device.owner, holder, lifetime)
        self._leases.grant(device.lease)
        # The user may have left after logind was asked and before it was noted.
        if lifetime == USER:
            self.users_may_have_left()

    def change(self, device: Device, client: Client, lifetime: str) -> None:
        """Keep a device for as long as this says from now on; `connection` is the client's."""
        self._leases.end(device.path)
        self.grant(device, client, lifetime)
        self._registry.changed(device)

    def end(self, device: Device) -> None:
        """Keep a device no more, whatever does."""
        self._leases.end(device.path)
        device.lease = None

    def gone(self, device: Device) -> None:
        """Tell those who hold a device that it is gone."""
        self.end(device)
        for hold in [*self._holds.get(device.path, ())]:
            self._close(hold)

    def client_left(self, client: Client) -> None:
        """End what was kept by a connection."""
        for lease in self._leases.held_by(client.name):
            self._over(lease, f"{client.name} has left", client.fields)

    def users_may_have_left(self) -> None:
        """Ask logind whether the users whom it knew are still there."""
        self._look_again = True
        if not self._looking:
            self._looking = True
            self._tasks.start(self._look_for_users())

    async def _look_for_users(self) -> None:
        try:
            while self._look_again:
                self._look_again = False
                for uid in self._leases.users():
                    if not await self._logind.has_forgotten(uid):
                        continue
                    for lease in self._leases.of_user(uid):
                        self._over(lease, f"the user {uid} has left", {"UID": uid})
                await asyncio.sleep(_PAUSE)
        finally:
            self._looking = False

    def _over(self, lease: Lease, why: str, fields: dict[str, object]) -> None:
        """Leave a device to those who hold it."""
        self._leases.over(lease)
        device = self._registry.at(lease.device)
        if device is None:
            return
        extra = {"ACTION": "Detach", **fields, **device.fields}
        if device.holds:
            log.info("%s: %s is kept by %d Holds", why, device.node, device.holds, extra=extra)
            self._registry.changed(device)
        else:
            log.info("%s: detaching %s", why, device.node, extra=extra)
            self._let_go(device)

    # --- Holds ----------------------------------------------------------------------------------

    def hold(self, device: Device, uid: int) -> OwnedFd:
        """Keep a device for as long as the returned fd, or a copy of it, is open.

        Raises LimitsExceeded, OSError.
        """
        with self._quota.take(uid) as place:
            reading, writing = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
            hold = _Hold(device, writing, place.keep())
        self._holds[device.path].add(hold)
        # Of the write end of a pipe there is nothing to be told but that nobody can read.
        self._loop.add_reader(writing.fileno(), self._closed, hold)
        self._count(device)
        return reading

    def _closed(self, hold: _Hold) -> None:
        """Take note that nobody has the read end open any more."""
        device = hold.device
        self._close(hold)
        if device.lease and device.lease.over and not device.holds and device.state == ATTACHED:
            extra = {"ACTION": "Detach", "UID": device.owner, **device.fields}
            log.info("nobody holds %s any more: detaching it", device.node, extra=extra)
            self._let_go(device)

    def _close(self, hold: _Hold) -> None:
        self._loop.remove_reader(hold.write_end.fileno())
        hold.write_end.close()
        hold.place.free()
        holds = self._holds[hold.device.path]
        holds.discard(hold)
        if not holds:
            del self._holds[hold.device.path]
        self._count(hold.device)

    def _count(self, device: Device) -> None:
        device.holds = len(self._holds.get(device.path, ()))
        if self._registry.knows(device):
            self._registry.changed(device)
