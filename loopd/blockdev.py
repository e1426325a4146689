# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block device chores around loop devices: BSD locks with deadlines, leftover partitions, pauses.

Synchronous, for threads. No lock here is ever waited for without a deadline: whoever has the
device open, for reading too, can hold its lock for ever.
"""

import errno
import fcntl
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import kernel
from .fd import OwnedFd

log = logging.getLogger(__name__)

# How often a lock is tried again. Its usual other holder is udev, for the milliseconds of a probe.
_LOCK_INTERVAL = 0.001
# Asking whether a device is in use is a use for an instant, and somebody else may be asking.
_IN_USE_ATTEMPTS = 5


def opened(fd: int) -> OwnedFd:
    """Own an fd of a device."""
    return OwnedFd(fd, kernel.close)


def try_lock(fd: int, operation: int, *, timeout: float = 0) -> bool:
    """Take a BSD lock (LOCK_SH or LOCK_EX) within `timeout` seconds; false when others keep it."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            kernel.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_INTERVAL)
        else:
            return True


@contextmanager
def control_locked(control_fd: int, *, timeout: float) -> Iterator[None]:
    """Keep other allocators away while the block runs, if they let us within `timeout` seconds.

    The lock only saves them and us some retries, so going on without it is right.
    """
    locked = try_lock(control_fd, fcntl.LOCK_EX, timeout=timeout)
    if not locked:
        log.debug("/dev/loop-control stays locked by someone else; going on without")
    try:
        yield
    finally:
        if locked:
            kernel.flock(control_fd, fcntl.LOCK_UN)


def in_use(number: int) -> bool:
    """Whether the device or a partition of it is mounted or otherwise exclusively open."""
    for attempt in range(_IN_USE_ATTEMPTS):
        if attempt:
            time.sleep(_LOCK_INTERVAL)
        try:
            opened(kernel.open_loop(number, os.O_RDONLY | os.O_EXCL)).close()
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
        else:
            return False
    return True


def remove_partitions(loop_fd: int, number: int) -> int:
    """Remove all partition devices that are not in use and return how many there were.

    Partitions added by BLKPG can outlive the binding, and the next image on the number would be
    read through them.
    """
    numbers = kernel.loop_partitions(number)
    for partition in numbers:
        try:
            kernel.blkpg_del_partition(loop_fd, partition)
        except OSError as exc:
            # The kernel has dropped it meanwhile, or somebody has it open.
            if exc.errno not in (errno.ENXIO, errno.EBUSY):
                raise
    return len(numbers)


def retry_pauses(attempts: int) -> Iterator[float]:
    """Seconds to pause after each attempt: random, at most 10 ms at first and 250 ms at the end.

    The random part keeps two racing allocators from meeting again, as in systemd's loop-util.
    """
    for attempt in range(attempts):
        yield random.uniform(0, 0.010 + 0.240 * attempt / attempts)


def removal_pauses() -> Iterator[float]:
    """Seconds to pause between the attempts to remove a device: 39 attempts, 5.73 s in all.

    Four of 5 ms, then five each of 10 ms, 20 ms and so on, as in systemd's loop-util.
    """
    pause = 0.005
    for attempt in range(1, 39):
        if attempt % 5 == 0:
            pause *= 2
        yield pause
