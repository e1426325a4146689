# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which tests may run beside others of this machine: loop devices and udev are everybody's.

Most tests heed their own devices only, and hold a shared lock. One that counts or exhausts what
there is, or runs another udevd, has the lock for itself.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Whoever waits for the second one keeps others from coming in by holding the first.
_DOOR = Path("/run/lock/loopd-tests-door")
_ROOM = Path("/run/lock/loopd-tests-room")


@contextmanager
def together() -> Iterator[None]:
    """Be in the company of others, but for those who are alone."""
    with _held(fcntl.LOCK_SH):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Be alone, when the others have come to their end."""
    with _held(fcntl.LOCK_EX):
        yield


@contextmanager
def _held(how: int) -> Iterator[None]:
    with _locked(_DOOR, fcntl.LOCK_EX):
        room = os.open(_ROOM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(room, how)
    try:
        yield
    finally:
        os.close(room)


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)
