# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who holds which device, and how many anybody may have: pure bookkeeping.

A place in the quota is taken before a device is bound and given back when the kernel says it is
unbound, not when somebody asks for that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from .access import ROOT
from .errors import LimitsExceeded

CONNECTION = "connection"


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A device is kept for as long as its lifetime says."""

    device: str
    """The object path."""
    owner: int
    """The uid."""
    holder: str
    """The unique bus name."""
    lifetime: str


class Place:
    """One device's place in the quota; given back by `free` or at the end of a `with` block."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def free(self) -> None:
        """Give it back; a second time does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back:
            give_back()

    def keep(self) -> Place:
        """Carry it out of its `with` block."""
        if not self._give_back:
            raise ValueError("the place was given back or carried away before")
        kept = Place(self._give_back)
        self._give_back = None
        return kept

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.free()


class Quota:
    """Places for devices, so many per uid and so many in all; root is bound by the latter only."""

    def __init__(self, *, per_user: int, in_all: int) -> None:
        self.per_user = per_user
        self.in_all = in_all
        self._taken: Counter[int] = Counter()

    @property
    def taken(self) -> int:
        """The places taken in all."""
        return self._taken.total()

    def take(self, uid: int) -> Place:
        """Take a place.

        Raises LimitsExceeded, saying which limit it is.
        """
        if uid != ROOT and self._taken[uid] >= self.per_user:
            raise LimitsExceeded(
                f"this user has {self.per_user} loop devices already, which is the limit: "
                "detach one first (a device counts until the kernel has let go of it)"
            )
        if self.taken >= self.in_all:
            raise LimitsExceeded(
                f"there are {self.in_all} loop devices in use, which is the limit: try again later"
            )
        self._taken[uid] += 1
        return Place(partial(self._free, uid))

    def _free(self, uid: int) -> None:
        self._taken[uid] -= 1
        if not self._taken[uid]:
            del self._taken[uid]


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
        self._by_holder[lease.holder].add(lease.device)

    def of(self, device: str) -> Lease | None:
        """The lease on a device."""
        return self._by_device.get(device)

    def end(self, device: str) -> None:
        """Forget the lease on a device, if there is one."""
        if lease := self._by_device.pop(device, None):
            devices = self._by_holder[lease.holder]
            devices.discard(device)
            if not devices:
                del self._by_holder[lease.holder]

    def held_by(self, holder: str) -> list[Lease]:
        """The leases that end when this connection does."""
        return [self._by_device[device] for device in sorted(self._by_holder.get(holder, ()))]

    def __iter__(self) -> Iterator[Lease]:
        return iter([*self._by_device.values()])

    def __len__(self) -> int:
        return len(self._by_device)
