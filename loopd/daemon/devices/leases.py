# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who holds which device, and for how long: pure bookkeeping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

LIFETIMES = CONNECTION, USER, SYSTEM = "connection", "user", "system"


@dataclass(slots=True, eq=False)
class Lease:
    """A device is kept for as long as its lifetime says."""

    device: str
    """The object path."""
    owner: int
    """The uid."""
    holder: str
    """The unique bus name; empty if it is no connection that keeps it."""
    lifetime: str
    over: bool = False
    """Whether the lifetime is over, and only Holds keep the device."""
    autoclear: bool = True
    """Whether the kernel is to detach the device if loopd is gone, too."""


class Leases:
    """All leases, by device and by holder."""

    def __init__(self) -> None:
        self._by_device: dict[str, Lease] = {}
        self._by_holder: defaultdict[str, set[str]] = defaultdict(set)

    def grant(self, lease: Lease) -> None:
        """Note a lease; a device has one at the most."""
        if lease.device in self._by_device:
            raise ValueError(f"{lease.device} has a lease already")
        self._by_device[lease.device] = lease
        if lease.holder:
            self._by_holder[lease.holder].add(lease.device)

    def of(self, device: str) -> Lease | None:
        """The lease on a device."""
        return self._by_device.get(device)

    def end(self, device: str) -> None:
        """Forget the lease on a device, if there is one."""
        if lease := self._by_device.pop(device, None):
            self._leave(lease)

    def over(self, lease: Lease) -> None:
        """Note that nothing but Holds keeps its device any more."""
        self._leave(lease)
        lease.holder = ""
        lease.over = True

    def _leave(self, lease: Lease) -> None:
        devices = self._by_holder.get(lease.holder, set())
        devices.discard(lease.device)
        if not devices:
            self._by_holder.pop(lease.holder, None)

    def held_by(self, holder: str) -> list[Lease]:
        """The leases that end when this connection does."""
        return [self._by_device[device] for device in sorted(self._by_holder.get(holder, ()))]

    def users(self) -> set[int]:
        """The users whose being there keeps devices."""
        return {lease.owner for lease in self if lease.lifetime == USER and not lease.over}

    def of_user(self, uid: int) -> list[Lease]:
        """The leases that end when this user leaves."""
        return [
            lease
            for lease in self
            if lease.lifetime == USER and lease.owner == uid and not lease.over
        ]

    def __iter__(self) -> Iterator[Lease]:
        return iter([*self._by_device.values()])

    def __len__(self) -> int:
        return len(self._by_device)
