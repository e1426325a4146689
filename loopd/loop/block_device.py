# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block device chores around loop devices: BSD locks with deadlines, sector sizes, pauses.

Synchronous, for threads. No lock here is ever waited for without a deadline: whoever has the
device open, for reading too, can hold its lock for ever.
"""

import errno
import fcntl
import logging
import mmap
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from loopd.errors import InvalidArgs, NoSuchDevice, NotSupported
from loopd.fd import OwnedFd

from . import kernel

log = logging.getLogger(__name__)

# How often a lock is tried again. Its usual other holder is udev, for the milliseconds of a probe.
_LOCK_INTERVAL = 0.001
# The sector sizes that a GPT may be written for.
SECTOR_SIZES = (512, 1024, 2048, 4096)
# Signature, revision, length of the header, (checksum, reserved,) the sector it is in.
_GPT_HEADER = struct.Struct("<8sII8xQ")
_GPT_HEADER_LENGTH = 92
# Up to Linux 5.16; later it means nothing.
_GENHD_FL_NO_PART_SCAN = 0x0200
# Asking whether a device is in use is a use for an instant, and somebody else may be asking.
_IN_USE_ATTEMPTS = 5
_AGAIN_ATTEMPTS = 64


def opened(fd: int) -> OwnedFd:
    """Own an fd of a device."""
    return OwnedFd(fd, _close)


def _close(fd: int) -> None:
    try:
        kernel.close(fd)
    except OSError as exc:
        # The fd is gone whatever close(2) says, and nothing that was done is to be undone for it.
        log.debug("closing a device: %s", exc.strerror)


class NotALoopDevice(NotSupported):
    """Something else is in the place of a loop device's node."""

    def __init__(self, number: int) -> None:
        super().__init__(f"/dev/loop{number} is no loop device: remove the file in its place")


def open_loop(number: int, flags: int) -> OwnedFd:
    """Open /dev/loopN, and make sure that it is that device. Raises NotALoopDevice, OSError.

    A program that writes to a node which is not there leaves a file in its place, whose ioctls say
    what those of a kernel without LOOP_CONFIGURE say.
    """
    try:
        fd = opened(kernel.open_loop(number, flags))
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise NotALoopDevice(number) from exc
        raise
    with fd:
        stat = kernel.statx(fd.fileno())
        rdev = f"{stat.stx_rdev_major}:{stat.stx_rdev_minor}".encode()
        if kernel.loop_attribute(number, "dev") != rdev:
            raise NotALoopDevice(number)
        return fd.move()


class Lock(StrEnum):
    """The BSD lock on a device; udev and other allocators keep off while it is taken."""

    NONE = "none"
    SHARED = "shared"
    EXCLUSIVE = "exclusive"

    @property
    def operation(self) -> int:
        """Its flock(2) operation."""
        return {
            Lock.NONE: fcntl.LOCK_UN,
            Lock.SHARED: fcntl.LOCK_SH,
            Lock.EXCLUSIVE: fcntl.LOCK_EX,
        }[self]


def unbinds_while_open() -> bool:
    """Whether CLR_FD by the only opener unbinds at once, and leaves it an fd on the number.

    From Linux 6.11 on a device stays bound until its last close.
    """
    return kernel.release() < (6, 11)


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
            try:
                kernel.flock(control_fd, fcntl.LOCK_UN)
            except OSError as exc:  # the close that follows does the same
                log.debug("cannot unlock /dev/loop-control: %s", exc.strerror)


def in_use(number: int, partition: int | None = None) -> bool:
    """Whether a device or a partition of it, or just that one, is mounted or exclusively open.

    Raises NoSuchDevice, OSError.
    """
    flags = os.O_RDONLY | os.O_EXCL
    for attempt in range(_IN_USE_ATTEMPTS):
        if attempt:
            time.sleep(_LOCK_INTERVAL)
        try:
            if partition is None:
                fd = open_loop(number, flags)
            else:
                fd = opened(kernel.open_partition(number, partition, flags))
        except OSError as exc:
            if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
                raise NoSuchDevice(f"loop{number} is gone") from exc
            if exc.errno != errno.EBUSY:
                raise
        else:
            fd.close()
            return False
    return True


def patiently(call: Callable[[], None]) -> None:
    """Make a call again while it says EAGAIN, 64 times at most.

    Since Linux 5.0 a device whose cache is in use says so to whoever would change its offset or
    its sector size: udev's probe usually, and those who probe without heeding the lock. The pauses
    are of 10 to 250 ms, as in systemd's loop-util. Raises OSError.
    """
    for attempt in range(1, _AGAIN_ATTEMPTS + 1):
        try:
            call()
        except OSError as exc:
            if exc.errno != errno.EAGAIN or attempt == _AGAIN_ATTEMPTS:
                raise
        else:
            return
        time.sleep(0.010 + random.uniform(0, 0.240 * attempt / _AGAIN_ATTEMPTS))


def probe_sector_size(fd: int, start: int = 0) -> int | None:
    """The sector size in bytes for which the image has a GPT; None if it has none.

    `start` is where in the file the image begins; only its `beginning` is read. Raises InvalidArgs
    if there are headers for more than one size.
    """
    return sector_size_of(beginning(fd, start))


def beginning(fd: int, start: int = 0) -> bytes:
    """Read the first 8 KiB of an image, which begins at `start` of the file; less if it is short.

    Raises OSError.
    """
    # In whole pages, whatever the alignment that an fd opened with O_DIRECT asks for.
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    begin = start - first
    length = -(-(begin + 2 * SECTOR_SIZES[-1]) // mmap.PAGESIZE) * mmap.PAGESIZE
    with mmap.mmap(-1, length) as buffer:
        count = kernel.preadv(fd, buffer, first)
        return buffer[begin:count]


def sector_size_of(image: bytes) -> int | None:
    """As `probe_sector_size`, of the `beginning` of an image.

    A GPT header stands in the second sector, so its place tells the size, as in systemd's
    dissect-image.
    """
    found = [size for size in SECTOR_SIZES if _is_gpt_header(image[size : size + _GPT_HEADER.size])]
    if len(found) > 1:
        sizes = " and ".join(map(str, found))
        raise InvalidArgs(f"sector-size: the file has partition tables for {sizes}: say which")
    return found[0] if found else None


def _is_gpt_header(data: bytes) -> bool:
    if len(data) < _GPT_HEADER.size:
        return False
    signature, revision, size, own_sector = _GPT_HEADER.unpack(data)
    return bool(
        signature == b"EFI PART"
        and revision == 0x00010000
        and _GPT_HEADER_LENGTH <= size <= SECTOR_SIZES[-1]
        and own_sector == 1
    )


def scans_partitions(attribute: Callable[[str], bytes]) -> bool:
    """Whether the kernel makes partition devices on a disk; `attribute` reads its sysfs.

    Since Linux 6.10 it says so itself. Before, a flag and a count tell, but no more of a loop
    device since Linux 5.17. What a loop device was told is not enough either, because Linux 5.8
    forgets it.
    """
    try:
        return attribute("partscan") == b"1"
    except FileNotFoundError:
        pass
    try:
        if int(attribute("ext_range")) <= 1:
            return False
        if int(attribute("capability"), 16) & _GENHD_FL_NO_PART_SCAN:
            return False
    except FileNotFoundError:
        return False  # a partition
    try:
        return attribute("loop/partscan") == b"1"
    except FileNotFoundError:
        return True  # no loop device


def mirror_discard_limit(number: int, backing: int) -> None:
    """Let a loop device over the block device `loop.backing_file` discard no more at once than that
    does.

    Else its users are told that it can what the device below cannot. After systemd's loop-util.
    Where sysfs cannot be written, as in the unit's sandbox, it is done without.
    """
    major, minor = os.major(backing), os.minor(backing)
    for place in ("queue", "../queue"):  # a partition's is that of its disk
        try:
            limit = kernel.block_attribute(major, minor, f"{place}/discard_max_bytes")
            kernel.set_loop_attribute(number, "queue/discard_max_bytes", limit)
        except FileNotFoundError:
            continue
        except OSError as exc:
            log.debug("cannot limit discards on loop%d: %s", number, exc.strerror)
        return


def discard_is_limited(number: int) -> bool:
    """Whether an unbound loop device still has a limit of `mirror_discard_limit`'s.

    It lasts until the device is removed, and one of 0 cannot even be raised.
    """
    limit, possible = (
        kernel.loop_attribute(number, f"queue/{name}")
        for name in ("discard_max_bytes", "discard_max_hw_bytes")
    )
    return int(limit) < int(possible)


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
