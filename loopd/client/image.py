# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files to attach: opened by the client, with its own rights and no more."""

import contextlib
import errno
import os
import re
import stat
import time

from loopd.fd import OwnedFd
from loopd.loop import kernel
from loopd.loop.uapi import STATX_BASIC_STATS, STATX_DIOALIGN

_LEASE_PAUSE = 0.05

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def open_file(
    path: Path,
    *,
    read_only: bool | None = None,
    direct_io: bool | None = None,
    lease_wait: float = 0,
) -> OwnedFd:
    """Open a file to attach with the rights of this process, read-write if that is allowed.

    `read_only` of None falls back to reading alone where writing is not allowed; True and False
    do not. Each is tried with O_DIRECT first and then without, unless `direct_io` is False. Blocks
    as long as the filesystem does, and `lease_wait` seconds for another program, such as a file
    server, to let go of its lease. Raises OSError, that of the first attempt without O_DIRECT, and
    BlockingIOError for a lease. After systemd's loop_device_make_by_path.
    """
    deadline = time.monotonic() + lease_wait
    while True:
        try:
            return _open_once(path, read_only, direct_io is not False)
        except BlockingIOError:
            # The first attempt has told the holder, who has to let go of it within
            # /proc/sys/fs/lease-break-time.
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LEASE_PAUSE)


def _open_once(path: Path, read_only: bool | None, direct: bool) -> OwnedFd:
    try:
        return _open(path, os.O_RDONLY if read_only else os.O_RDWR, direct)
    except OSError as exc:
        if read_only is not None or exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:
            return _open(path, os.O_RDONLY, direct)
        except OSError:
            raise exc from None


def _open(path: Path, access: int, direct: bool) -> OwnedFd:
    flags = access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if direct:
        try:
            return OwnedFd(os.open(path, flags | os.O_DIRECT))
        except BlockingIOError:
            raise  # else the file would be opened without it once the lease is gone
        except OSError:
            pass  # Not every filesystem knows it. Whatever else is wrong is so without it, too.
    return OwnedFd(os.open(path, flags))


_PARTITION = re.compile(r"loop\d+p(\d+)", re.ASCII)


def name_file(path: Path) -> OwnedFd:
    """Open a file, a node or a partition only to tell loopd which one is meant.

    That needs no right to read it, waits for no filesystem's server, and does not count as a user
    of a device that is to be detached. Raises OSError.
    """
    return OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC))


def partition_named(fd: int) -> int | None:
    """The number of the partition of a loop device that an fd is open on, in any mode.

    None if it is open on anything else. Asks no filesystem. Raises OSError.
    """
    status = kernel.statx(fd)
    if not stat.S_ISBLK(status.stx_mode):
        return None
    name = kernel.block_name(status.stx_rdev_major, status.stx_rdev_minor)
    match = _PARTITION.fullmatch(name)
    return int(match[1]) if match else None


def direct_io_alignment(fd: int) -> int | None:
    """The bytes of which offsets in a file are multiples for direct I/O; None if it has none.

    The loop driver asks the same: the filesystem, which may tell since Linux 6.1, else the disk
    that it is on. Raises OSError.
    """
    status = kernel.statx(fd, mask=STATX_BASIC_STATS | STATX_DIOALIGN)
    if status.stx_mask & STATX_DIOALIGN:
        return status.stx_dio_offset_align or None
    if stat.S_ISBLK(status.stx_mode):
        return sector_size(status.stx_rdev_major, status.stx_rdev_minor)
    return sector_size(status.stx_dev_major, status.stx_dev_minor)


def sector_size(major: int, minor: int) -> int:
    """The bytes in a logical sector of a block device, and 512 where there is no such device."""
    for queue in ("queue", "../queue"):  # a partition's is that of its disk
        with contextlib.suppress(FileNotFoundError):
            return int(kernel.block_attribute(major, minor, f"{queue}/logical_block_size"))
    return 512
