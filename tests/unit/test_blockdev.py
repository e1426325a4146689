# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks that are never waited for without a deadline, and the pauses between attempts."""

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopd.loop import block_device


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Two independent fds on one file."""
    path = tmp_path / "lock"
    path.touch()
    fds = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY)
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_lock_that_somebody_keeps_is_given_up_at_the_deadline(two: tuple[int, int]) -> None:
    """Locked for ever."""
    fcntl.flock(two[0], fcntl.LOCK_EX)
    begun = time.monotonic()
    assert not block_device.try_lock(two[1], fcntl.LOCK_EX, timeout=0.05)
    assert time.monotonic() - begun >= 0.05
    fcntl.flock(two[0], fcntl.LOCK_UN)
    assert block_device.try_lock(two[1], fcntl.LOCK_EX)


def test_the_control_lock_is_for_the_block_only(two: tuple[int, int]) -> None:
    with block_device.control_locked(two[0], timeout=1):
        assert not block_device.try_lock(two[1], fcntl.LOCK_EX)
    assert block_device.try_lock(two[1], fcntl.LOCK_EX)


def test_the_control_lock_is_done_without_when_somebody_keeps_it(two: tuple[int, int]) -> None:
    fcntl.flock(two[0], fcntl.LOCK_EX)
    entered = False
    with block_device.control_locked(two[1], timeout=0.01):
        entered = True
    assert entered
    # And the other's lock is still the other's.
    assert not block_device.try_lock(two[1], fcntl.LOCK_EX)


def test_retries_pause_at_random_and_ever_longer() -> None:
    pauses = [list(block_device.retry_pauses(64)) for _ in range(50)]
    assert all(len(each) == 64 for each in pauses)
    assert all(0 <= each[0] <= 0.010 for each in pauses)
    assert all(each[63] <= 0.250 for each in pauses)
    assert max(each[63] for each in pauses) > 0.1
    assert len({each[0] for each in pauses}) > 1


def test_removal_is_tried_39_times_over_less_than_six_seconds() -> None:
    pauses = list(block_device.removal_pauses())
    assert len(pauses) + 1 == 39
    assert pauses[:5] == [0.005] * 4 + [0.010]
    assert pauses[-1] == 0.640
    assert sum(pauses) == pytest.approx(5.73)
