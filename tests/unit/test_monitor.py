# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of the kernel's events, and of what libudev cannot do with one."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from loopd import monitor as module
from loopd.monitor import Monitor


class Event:
    """An event as pyudev tells it."""

    def __init__(self, path: str, sequence_number: int) -> None:
        self.device_path = path
        self.sequence_number = sequence_number


def heard(*events: Event | type[Exception]) -> list[tuple[int | None, int]]:
    """Return what is told of events that are read at once; it still listens afterwards."""
    told: list[tuple[int | None, int]] = []
    waiting: Iterator[Event | type[Exception] | None] = iter([*events, None])

    def poll(timeout: float) -> Any:
        event = next(waiting)
        if isinstance(event, type):
            raise event
        return event

    async def run() -> None:
        monitor = Monitor(lambda *event: told.append(event), lambda: None)
        loop = asyncio.get_running_loop()
        with mock.patch.object(monitor._monitor, "poll", poll):
            loop.remove_reader(monitor._socket)
            monitor._read()
            assert loop.remove_reader(monitor._socket)
        monitor.close()

    asyncio.run(run())
    gc.collect()  # pyudev closes its socket with its object
    return told


def test_of_several_events_of_a_device_the_newest_is_told_once() -> None:
    """The kernel counts them, and does not always tell them in that order."""
    disk, partition = "/devices/virtual/block/loop3", "/devices/virtual/block/loop3/loop3p1"
    events = (Event(disk, 7), Event(partition, 9), Event(disk, 8), Event("/block/sda", 10))
    assert heard(*events) == [(3, 9)]


@pytest.mark.parametrize("failure", [OSError, ValueError, MemoryError, OverflowError])
def test_what_cannot_be_read_is_lost_and_what_follows_is_heard(failure: type[Exception]) -> None:
    assert heard(Event("/block/loop3", 7), failure) == [(None, 0)]


def test_many_are_read_in_slices() -> None:
    with mock.patch.object(module, "_SLICE", 2):
        told: list[int | None] = []

        async def run() -> None:
            every = asyncio.Event()
            waiting = iter([Event(f"/block/loop{number}", 1) for number in range(5)])

            def on_event(number: int | None, _: int) -> None:
                told.append(number)
                if len(told) == 5:
                    every.set()

            def poll(timeout: float) -> Event | None:
                return next(waiting, None)

            monitor = Monitor(on_event, lambda: None)
            with mock.patch.object(monitor._monitor, "poll", poll):
                monitor._readable()
                await asyncio.wait_for(every.wait(), 10)
            monitor.close()

        asyncio.run(run())
        gc.collect()
        assert told == [*range(5)]
