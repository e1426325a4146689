# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the client library takes udev, and udisks2, for done with a device."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopd import errors
from loopd.client import settling
from loopd.loop.kernel import PartitionExtent
from tests.harness.asynchronous import run_async

OURS = ["E:LOOPD_DISKSEQ=41"]
OLD = ["E:LOOPD_DISKSEQ=40", "S:disk/by-diskseq/40"]
BY_DISKSEQ = ["S:disk/by-diskseq/41"]
PART_BY_DISKSEQ = ["S:disk/by-diskseq/41-part1"]


class World:
    """A /run/udev, what sysfs tells of /dev/loop3, and a bus with udisks2 on it, or without."""

    def __init__(self, udev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._udev = udev
        self.attributes = {"diskseq": b"41", "dev": b"7:3", "loop3p1/dev": b"259:5"}
        self.partitions: list[PartitionExtent] = []
        self.udisks: list[Any] | None = None
        self.asked: list[str] = []
        monkeypatch.setattr(settling, "_UDEV", udev)
        monkeypatch.setattr(settling.kernel, "loop_attribute", self._attribute)
        monkeypatch.setattr(settling.kernel, "loop_partitions", lambda _: self.partitions)

    def _attribute(self, number: int, name: str) -> bytes:
        assert number == 3
        if name not in self.attributes:
            raise FileNotFoundError(name)
        return self.attributes[name]

    def run_udev(self, *, busy: bool = False) -> None:
        (self._udev / "data").mkdir(parents=True)
        (self._udev / "control").touch()
        if busy:
            (self._udev / "queue").touch()

    def stop_udev(self) -> None:
        (self._udev / "control").unlink()

    def sees(self, device: str, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in ["I:1234", *lines, "V:1"])
        (self._udev / "data" / f"b{device}").write_text(text)

    def make_partition(self) -> None:
        self.partitions = [PartitionExtent(1, 512, 1024)]

    # What a Link offers.

    async def has_owner(self, name: str) -> bool:
        assert name == "org.freedesktop.UDisks2"
        return self.udisks is not None

    async def property_of(self, name: str, path: str, interface: str, member: str) -> Any:
        assert (interface, member) == ("org.freedesktop.UDisks2.Block", "Symlinks")
        self.asked.append(os.path.basename(path))
        assert self.udisks is not None
        answer = self.udisks.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def settled(self, timeout: float = 0) -> bool:
        link: Any = self
        return run_async(settling.settled(link, 3, 41, timeout))


@pytest.fixture
def world(area: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(area / "udev", monkeypatch)


def test_where_no_udev_runs_there_is_nothing_to_wait_for(world: World) -> None:
    assert world.settled(30)
    assert world.asked == []


@pytest.mark.parametrize(
    ("disk", "partition", "done"),
    [
        (None, None, False),
        (OLD, None, False),
        (OURS, None, False),
        (OURS, OLD, False),
        (OURS, OURS, True),
        (OURS, PART_BY_DISKSEQ, False),
        (OLD, OURS, False),
        # Without loopd's rule, in the versions of udev that tell of a partition's disk or do not.
        (BY_DISKSEQ, None, False),
        (BY_DISKSEQ, PART_BY_DISKSEQ, True),
        (BY_DISKSEQ, [], True),
        # With a diskseq that begins with the same digits.
        (["S:disk/by-diskseq/412", "E:LOOPD_DISKSEQ=412"], [], False),
    ],
)
def test_disk_and_partitions_are_waited_for(
    world: World, disk: list[str] | None, partition: list[str] | None, done: bool
) -> None:
    world.run_udev()
    world.make_partition()
    for device, lines in (("7:3", disk), ("259:5", partition)):
        if lines is not None:
            world.sees(device, lines)
    assert world.settled() is done


@pytest.mark.parametrize("busy", [False, True])
def test_a_udev_without_work_has_missed_the_device_or_was_killed(
    world: World, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    """A udevd that is killed leaves its socket, which only root can connect to."""
    world.run_udev(busy=busy)
    monkeypatch.setattr(settling, "_IDLE", -1)
    assert world.settled(0.01) is not busy


@pytest.mark.parametrize("gone", ["", "42"])
def test_a_device_that_is_gone_is_not_waited_for(world: World, gone: str) -> None:
    world.run_udev()
    world.attributes["diskseq"] = gone.encode()
    if not gone:
        del world.attributes["diskseq"]
    assert world.settled(30)


def looking(world: World, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], None]) -> list[int]:
    """Have something happen at each pause between looks; returns those that are left."""
    left = [*range(len(steps))]
    really = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds == settling._PAUSE:
            steps[left.pop(0)]()
        await really(0)

    monkeypatch.setattr(settling.asyncio, "sleep", sleep)
    return left


@pytest.mark.parametrize("end", ["seen", "stopped"])
def test_it_waits_until_udev_is_done_or_has_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    world.run_udev()
    last = world.stop_udev if end == "stopped" else lambda: world.sees("7:3", BY_DISKSEQ)
    left = looking(world, monkeypatch, lambda: world.sees("7:3", OLD), last)
    assert world.settled(30)
    assert left == []


def test_udisks_is_waited_for_where_it_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run_udev()
    world.make_partition()
    world.sees("7:3", OURS + BY_DISKSEQ)
    world.sees("259:5", OURS + PART_BY_DISKSEQ)
    assert world.settled()
    assert world.asked == []
    left = looking(world, monkeypatch, *[lambda: None] * 3)
    # None yet, that of a former device, and what is no answer.
    world.udisks = [errors.UnknownObject("none"), [b"/dev/disk/by-diskseq/40\0"], None]
    world.udisks += [[b"/dev/disk/by-diskseq/41\0"], [b"/dev/disk/by-diskseq/41-part1\0"]]
    assert world.settled()
    assert world.asked == ["loop3"] * 4 + ["loop3p1"]
    assert left == []


@pytest.mark.parametrize(
    "entry", [OURS, [*OURS, *BY_DISKSEQ, "E:DM_UDEV_DISABLE_OTHER_RULES_FLAG=1"]]
)
def test_udisks_is_not_waited_for_where_it_has_no_object_or_no_link_to_know_it_by(
    world: World, entry: list[str]
) -> None:
    world.run_udev()
    world.sees("7:3", entry)
    world.udisks = []
    assert world.settled()
    assert world.asked == []


def test_a_udisks_that_never_hears_of_it_is_no_obstacle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run_udev()
    world.sees("7:3", BY_DISKSEQ)
    world.udisks = []
    monkeypatch.setattr(settling, "_UDISKS_TIMEOUT", 0)

    async def never(*_: str) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(world, "property_of", never)
    assert world.settled()
