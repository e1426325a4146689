# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers that have something of every device: as they are in the end, and in slices."""

import asyncio
from typing import Any
from unittest import mock

from loopd.bus import codec
from loopd.daemon.server import listing
from loopd.daemon.server.listing import Listing
from tests.harness.asynchronous import run_async

SIGNATURE = "a(st)"


class Stand:
    """Things with a size by path, and how often each was marshalled."""

    def __init__(self, *paths: str) -> None:
        self.sizes = dict.fromkeys(paths, 0)
        self.made: list[str] = []
        self.listing = Listing(SIGNATURE, self._element)

    def _element(self, path: str) -> list[list[Any]]:
        self.made.append(path)
        return [[path, self.sizes[path]]]

    async def answer(self) -> dict[str, int]:
        """What an answer with the listing says."""
        array = await self.listing.of(lambda: self.sizes)
        return told(array)


def told(array: codec.Array) -> dict[str, int]:
    reply = codec.method_return(":1.1", 1, SIGNATURE, [array], serial=1)
    return dict(codec.parse(codec.serialize(reply)).body[0])


def test_an_element_is_marshalled_once_for_each_change() -> None:
    async def body() -> None:
        stand = Stand("a", "b", "c")
        for _ in range(3):
            assert await stand.answer() == {"a": 0, "b": 0, "c": 0}
        assert stand.made == ["a", "b", "c"]
        stand.sizes["b"] = 7
        stand.listing.forget("b")
        assert await stand.answer() == {"a": 0, "b": 7, "c": 0}
        assert stand.made == ["a", "b", "c", "b"]

    run_async(body())


def test_nothing_at_all_is_an_answer() -> None:
    async def body() -> None:
        assert await Stand().answer() == {}

    run_async(body())


def test_others_get_their_turn_between_slices_however_many_ask() -> None:
    """Within the limits."""

    async def body() -> None:
        stand = Stand(*map(str, range(50)))
        asking = [asyncio.ensure_future(stand.answer()) for _ in range(5)]
        most = 0
        while not all(each.done() for each in asking):
            before = len(stand.made)
            await asyncio.sleep(0)
            most = max(most, len(stand.made) - before)
        assert most == 1
        assert len(stand.made) == 50

    with mock.patch.object(listing, "_SLICE", -1.0):
        run_async(body())


def test_what_changes_comes_or_goes_between_slices_is_in_the_answer_as_it_is_then() -> None:
    """Within the limits."""

    async def body() -> None:
        stand = Stand("a", "b", "c", "d")
        answer = asyncio.ensure_future(stand.answer())
        for _ in range(10):
            if len(stand.made) < 3:
                await asyncio.sleep(0)
        assert len(stand.made) == 3
        stand.sizes["a"] = 9
        stand.listing.forget("a")
        del stand.sizes["b"]
        stand.listing.forget("b")
        del stand.sizes["d"]
        stand.sizes["e"] = 5
        assert await answer == {"a": 9, "c": 0, "e": 5}

    with mock.patch.object(listing, "_SLICE", -1.0):
        run_async(body())


def test_what_changes_all_the_time_keeps_nobody_waiting() -> None:
    """Within the limits: a user may change a device of its own in each turn of the event loop."""

    async def body() -> None:
        stand = Stand("a", "b")
        answer = asyncio.ensure_future(stand.answer())
        for size in range(20):
            stand.sizes["a"] = size
            stand.listing.forget("a")
            await asyncio.sleep(0)
        assert answer.done()

    run_async(body())
