# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records that are damaged, or of something else, are dropped, and nothing worse comes of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from loopd.access import NOBODY
from loopd.records import Record, Records

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


def test_a_directory_among_them_is_left_alone(directory: Path) -> None:
    for name in ("loop3_41.new", "loop3_41"):
        (directory / name).mkdir()
    assert load(directory) == []
    assert len([*directory.iterdir()]) == 2
