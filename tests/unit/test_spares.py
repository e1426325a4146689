# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that are kept for the next attach: which, how many, and not for long."""

import asyncio
from collections.abc import Callable

from loopd import spares as module
from loopd.access import NOBODY
from loopd.spares import Spares
from loopd.threads import Threads

UID = 1000


class Removals(Threads):
    """Notes what is to be removed, and removes nothing."""

    def __init__(self, awaited: int) -> None:
        """`over` is set when as many are noted as are awaited."""
        super().__init__()
        self.numbers: list[int] = []
        self.over = asyncio.Event()
        self._awaited = awaited

    def remove(self, _function: Callable[[int], bool], number: int) -> None:
        """Note it."""
        self.numbers.append(number)
        if len(self.numbers) >= self._awaited:
            self.over.set()


def removed(story: Callable[[Spares], None], *, later: int = 0) -> list[int]:
    """Return what is removed in a story, at once and so many `later`."""

    async def run() -> list[int]:
        removals = Removals(later)
        story(Spares(removals))
        if later:
            assert not removals.numbers
            await asyncio.wait_for(removals.over.wait(), module._KEPT_FOR + 5)
        return removals.numbers

    return asyncio.run(run())


def keep(*numbers: int) -> Callable[[Spares], None]:
    def story(spares: Spares) -> None:
        for number in numbers:
            spares.take(number, UID)
            spares.keep(number)

    return story


def test_a_few_are_kept_and_those_are_the_lowest() -> None:
    """What LOOP_CTL_GET_FREE names is not taken away between its answer and the open."""
    assert removed(keep(0, 1, 2, 3)) == []
    assert removed(keep(0, 1, 2, 3, 4, 5)) == [4, 5]
    assert removed(keep(9, 8, 7, 6, 5, 4)) == [9, 8]
    assert removed(keep(3, 3, 3, 3, 3, 3)) == []


def test_they_go_when_no_other_of_the_user_has_come_for_a_while() -> None:
    assert removed(keep(3, 5, 4), later=3) == [5, 4, 3]


def test_one_that_is_in_use_again_is_not_removed() -> None:
    def story(spares: Spares) -> None:
        keep(3, 4)(spares)
        spares.take(3, UID)
        spares.remove_all()
        spares.remove_all()

    assert removed(story) == [4]


def test_all_go_when_loopd_does() -> None:
    assert removed(lambda spares: (keep(2, 1)(spares), spares.remove_all())[1]) == [2, 1]


def test_none_is_given_to_another_user() -> None:
    """Who is about to mount one by its name would mount the other's file."""

    def story(spares: Spares) -> None:
        keep(1, 2, 3, 4, 5)(spares)
        spares.take(6, UID)  # it can be unbound before anybody hears of it
        for number in (1, 5, 6):  # 5 is being removed, and may be offered yet
            assert spares.choose(UID, number) == number
            assert spares.choose(UID + 1, number) is None
        assert spares.choose(UID + 1, 7) == 7
        spares.take(3, UID + 1)
        spares.keep(3)
        assert spares.choose(UID + 1, 1) == 3  # its own
        spares.take(1, UID + 1)
        assert spares.choose(UID, 1) == 2
        spares.take(6, NOBODY)
        assert spares.choose(UID + 1, 6) == 6

    assert removed(story) == [5]


def test_whose_they_were_is_forgotten_with_them() -> None:
    kept: list[Spares] = []

    def story(spares: Spares) -> None:
        keep(1, 2, 3)(spares)
        spares.take(3, UID)
        kept.append(spares)

    assert removed(story, later=2) == [2, 1]
    assert [kept[0].choose(UID + 1, number) for number in (1, 2, 3)] == [1, 2, None]
