# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records that are damaged, or of something else, are dropped, and nothing worse comes of them."""

import dataclasses
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.daemon.access import NOBODY
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.leases import CONNECTION, USER, Lease
from loopd.daemon.devices.records import Record, Records
from tests.unit.test_announcer import STATUS

GOOD: dict[str, Any] = {
    "name": "loop3",
    "diskseq": 41,
    "which": None,
    "number": 3,
    "binding": 77,
    "file_device": 1,
    "file_inode": 2,
    "file_block": 0,
    "reference": "name",
    "owner": 1000,
    "attached_at": 5,
    "detaching": False,
    "lifetime": "connection",
    "holder": ":1.5",
    "over": False,
    "autoclear": True,
    "holds": {"loop3_41.hold1": 1000},
    "lock": "exclusive",
    "lock_holder": ":1.5",
    "lock_expires": 12.5,
    "may_hang": False,
    "bus": "0123",
    "table": [1, 5],
    "cut_limit": 4096,
    "cut_asked": 0,
    "is_new": True,
    "format": 1,
}
HUGE = 1 << 70


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "leases").mkdir()
    return tmp_path / "leases"


def load(directory: Path) -> list[Record]:
    return Records(directory.parent).load()


def test_a_good_one_is_read(directory: Path) -> None:
    (directory / "loop3_41").write_text(json.dumps(GOOD))
    (directory / "sda1_12_9").write_text(
        json.dumps(GOOD | {"name": "sda1", "diskseq": 12, "which": 9, "number": None})
    )
    first, second = load(directory)
    assert dataclasses.asdict(first) == GOOD
    assert (second.name, second.number) == ("sda1", None)


@pytest.mark.parametrize(
    "change",
    [
        {"owner": -1},
        {"owner": NOBODY},
        {"owner": HUGE},
        {"diskseq": HUGE},
        {"binding": -1},
        {"file_block": HUGE},
        {"file_block": -1},
        {"file_inode": HUGE},
        {"attached_at": HUGE},
        {"table": [0]},
        {"table": [256]},
        {"table": ["1"]},
        {"table": {"1": 1}},
        {"lock_expires": float("nan")},
        {"lock_expires": float("inf")},
        {"reference": "\ud800"},
        {"reference": "x" * 64},
        {"holder": "no\0name"},
        {"lock_holder": "org.example.Other"},
        {"holds": {"loop3_41.hold1": "1000"}},
        {"holds": {"loop3_41.hold1": NOBODY}},
        {"holds": {"loop3_41.hold1": True}},
        {"holds": {"loop3_41.hold1": 1000.0}},
        {"holds": {"loop3_41.hold1": None}},
        {"holds": []},
        {"over": "no"},
        {"may_hang": 1},
        {"reference": 7},
        {"owner": 1000.0},
        {"lock_expires": "soon"},
        {"bus": None},
        {"lock": "other"},
        {"lifetime": "for ever"},
        {"number": 4},
        {"number": None},
        {"name": "loop4"},
        {"diskseq": 42},
        {"which": 1},
    ],
    ids=str,
)
def test_one_that_no_loopd_wrote_is_dropped(directory: Path, change: dict[str, Any]) -> None:
    (directory / "loop3_41").write_text(json.dumps(GOOD | change))
    assert load(directory) == []
    assert [*directory.iterdir()] == []


def test_roots_and_the_largest_uids_are_read(directory: Path) -> None:
    for owner in (0, NOBODY - 1):
        change = {"owner": owner, "holds": {"loop3_41.hold1": owner}}
        (directory / "loop3_41").write_text(json.dumps(GOOD | change))
        (found,) = load(directory)
        assert (found.owner, found.holds) == (owner, {"loop3_41.hold1": owner})


def test_what_a_later_version_adds_is_passed_over(directory: Path) -> None:
    (directory / "loop3_41").write_text(json.dumps(GOOD | {"added": {"later": "x"}} | {"x": [1]}))
    (found,) = load(directory)
    assert dataclasses.asdict(found) == GOOD


def test_a_directory_among_them_is_left_alone(directory: Path) -> None:
    for name in ("loop3_41.new", "loop3_41"):
        (directory / name).mkdir()
    assert load(directory) == []
    assert len([*directory.iterdir()]) == 2


# What is written


def device_of_ours(**options: Any) -> Device:
    made = Device(number=0, name="loop0", diskseq=1, status=STATUS, owner=1000, **options)
    made.lease = Lease(made.path, made.owner, ":1.5", CONNECTION)
    return made


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have the kernel write no more than that, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_record_takes_the_place_of_none(directory: Path) -> None:
    records, device = Records(directory.parent), device_of_ours()
    records.save(device)
    (before,) = load(directory)
    with files_of_at_most(100), pytest.raises(OSError, match="No space left"):
        records.save(device, Lease(device.path, device.owner, "", USER))
    assert load(directory) == [before]
    assert [each.name for each in directory.iterdir()] == [device.label]
    # It is not taken for what is on disk either.
    records.save(device, Lease(device.path, device.owner, "", USER))
    assert [each.lifetime for each in load(directory)] == [USER]


def test_a_device_that_is_ending_is_recorded_so_without_a_word_more(directory: Path) -> None:
    records, device = Records(directory.parent), device_of_ours()
    records.save(device)
    device.ending = True
    with files_of_at_most(0):
        records.note(device)
        records.note(device)
    (found,) = load(directory)
    assert found.detaching
    # The next loopd writes one of its own, and is killed before it goes on with the detach.
    device.ending = False
    Records(directory.parent).save(device)
    (found,) = load(directory)
    assert found.detaching
    records.remove(device.label)
    assert [*directory.iterdir()] == []


def test_what_has_not_changed_is_not_written_again(directory: Path) -> None:
    records, device = Records(directory.parent), device_of_ours()
    records.save(device)
    written = (directory / device.label).stat().st_ino
    records.note(device)
    assert (directory / device.label).stat().st_ino == written
    records.remove(device.label)
    records.save(device)  # it is anew what it was
    assert (directory / device.label).exists()


def test_of_others_devices_there_is_no_record(directory: Path) -> None:
    for ending in (False, True):
        foreign = Device(number=0, name="loop0", diskseq=1, status=STATUS, ending=ending)
        Records(directory.parent).note(foreign)
    assert [*directory.iterdir()] == []
