# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of the kernel's events: which are of loop devices, and which of them count."""

import asyncio
import errno
import socket
from unittest import mock

import pytest

from loopd.daemon.host import uevents as module
from loopd.daemon.host.uevents import Monitor, listen
from loopd.loop import kernel

DISK, PARTITION = "/devices/virtual/block/loop3", "/devices/virtual/block/loop3/loop3p1"
SDA = "/devices/pci0000:00/0000:00:01.1/ata1/block/sda"


def event(path: str, seqnum: int, subsystem: str = "block") -> tuple[bytes, tuple[int, int]]:
    """An event of the kernel's, and where it comes from."""
    fields = f"ACTION=change\0DEVPATH={path}\0SUBSYSTEM={subsystem}\0MAJOR=7\0SEQNUM={seqnum}\0"
    return f"change@{path}\0{fields}".encode(), (0, 1)


class Socket:
    """A socket with events, or errors; then it has no more."""

    def __init__(self, events: list[tuple[bytes, tuple[int, int]] | OSError]) -> None:
        self._reading, self._writing = socket.socketpair()
        self._writing.send(b"x")  # it can always be read
        self._events = iter([*events, BlockingIOError()])

    def fileno(self) -> int:
        return self._reading.fileno()

    def close(self) -> None:
        self._reading.close()
        self._writing.close()

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        found = next(self._events)
        if isinstance(found, OSError):
            raise found
        return found


def heard(*events: tuple[bytes, tuple[int, int]] | OSError) -> list[tuple[int | None, int] | str]:
    """What is told of events that are read at once; it still listens afterwards."""
    told: list[tuple[int | None, int] | str] = []

    async def run() -> None:
        sock = Socket([*events])
        monitor = Monitor(sock, lambda *it: told.append(it), lambda: told.append("block"))  # type: ignore[arg-type]
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock.fileno())
        monitor._read()
        assert loop.remove_reader(sock.fileno())
        monitor.close()

    asyncio.run(run())
    return told


def test_of_several_events_of_a_device_the_newest_is_told_once() -> None:
    """The kernel counts them, and does not always tell them in that order."""
    events = event(DISK, 7), event(PARTITION, 9), event(DISK, 8), event(SDA, 10)
    assert heard(*events) == [(3, 9), "block"]


@pytest.mark.parametrize(
    "path",
    [
        "/devices/virtual/block/loopback",
        "/devices/virtual/block/dm-0/loop3",
        "/devices/virtual/bdi/7:3",
    ],
)
def test_what_is_no_loop_device_is_told_as_some_block_device(path: str) -> None:
    assert heard(event(path, 7)) == ["block"]


def test_events_of_other_subsystems_are_skipped() -> None:
    assert heard(event("/devices/virtual/net/loop3", 7, "net")) == []


def test_only_the_kernel_is_believed() -> None:
    data, _ = event(DISK, 7)
    assert heard((data, (4711, 1))) == []


@pytest.mark.parametrize("data", [b"", b"libudev\0", b"change@", b"change@/block/loop3\0" * 9])
def test_what_is_no_event_is_skipped(data: bytes) -> None:
    assert heard((data, (0, 1)), event(DISK, 7)) == [(3, 7), "block"]


def test_after_a_loss_all_devices_are_to_be_looked_at() -> None:
    assert heard(event(DISK, 7), OSError(errno.ENOBUFS, "")) == [(None, 0)]


def test_many_are_read_in_slices() -> None:
    told: list[int | None] = []

    async def run() -> None:
        every = asyncio.Event()

        def on_event(number: int | None, _: int) -> None:
            told.append(number)
            if len(told) == 5:
                every.set()

        sock = Socket([event(f"/devices/virtual/block/loop{number}", 1) for number in range(5)])
        monitor = Monitor(sock, on_event, lambda: None)  # type: ignore[arg-type]
        await asyncio.wait_for(every.wait(), 20)
        monitor.close()

    with mock.patch.object(module, "_SLICE", 2):
        asyncio.run(run())
    assert told == [*range(5)]


def test_the_kernel_lets_anybody_listen() -> None:
    with listen() as sock:
        assert sock.getsockname()[1] == 1
        assert not sock.getblocking()


def test_all_loop_devices_are_listed() -> None:
    numbers = kernel.loop_numbers()
    assert numbers == sorted(set(numbers))
