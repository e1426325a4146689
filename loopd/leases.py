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

# One place in eight is root's alone. Where few are left, a user may have these without leaving any.
_RESERVED = 8
_FEW = 4

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


def share(uid: int, *, of_root: int, of_others: int, in_all: int) -> int:
    """How many of all places a user may have: half of those that others have left, at most.

    So users who take all that they get leave something to the next one, who has nothing yet. Root
    is not bound by that, and some places are for root alone.
    """
    if uid == ROOT:
        return in_all - of_others
    left = in_all - max(of_root, in_all // _RESERVED) - of_others
    return max(left // 2, min(left, _FEW))


class Quota:
    """Places, so many per uid and so many in all, see `share`; root is bound by the latter only."""

    def __init__(self, what: str, *, per_user: int, in_all: int, hint: str) -> None:
        """`what` they are for, and a `hint` how a user gets one back, are for the errors."""
        self._what = what
        self._hint = hint
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
                f"this user has {self.per_user} {self._what} already, which is the limit: "
                f"{self._hint}"
            )
        own, root = self._taken[uid], self._taken[ROOT]
        others = self.taken - own - (root if uid != ROOT else 0)
        if own >= share(uid, of_root=root, of_others=others, in_all=self.in_all):
            raise LimitsExceeded(
                f"there are {self.taken} {self._what} in use, of at most {self.in_all}, and the "
                "rest is kept for others: try again later"
            )
        return self.take_back(uid)

    def take_back(self, uid: int) -> Place:
        """Take a place that was granted before, whatever the limits are now."""
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
