# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many of something each user may have, and all users together: pure bookkeeping.

A place in the quota of devices is taken before a device is bound and given back when the kernel
says it is unbound, not when somebody asks for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from loopd.errors import LimitsExceeded

from .access import ROOT

# One place in eight is root's alone. Where few are left, a user may have these without leaving any.
_RESERVED = 8
_FEW = 4


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
