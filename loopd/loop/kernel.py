# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's side of loop(4): one function per call and per place in sysfs, OSError untouched.

Nothing here retries, waits, logs or decides. This module is the only seam of the tests below the
bus: a scripted kernel replaces its functions.
"""

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple

from .uapi import (
    AT_EMPTY_PATH,
    AT_STATX_DONT_SYNC,
    BLKFLSBUF,
    BLKGETDISKSEQ,
    BLKGETSIZE64,
    BLKPG,
    BLKPG_ADD_PARTITION,
    BLKPG_DEL_PARTITION,
    BLKPG_RESIZE_PARTITION,
    BLKSSZGET,
    LOOP_CLR_FD,
    LOOP_CONFIGURE,
    LOOP_CTL_ADD,
    LOOP_CTL_GET_FREE,
    LOOP_CTL_REMOVE,
    LOOP_GET_STATUS64,
    LOOP_MAJOR,
    LOOP_SET_BLOCK_SIZE,
    LOOP_SET_CAPACITY,
    LOOP_SET_DIRECT_IO,
    LOOP_SET_FD,
    LOOP_SET_STATUS64,
    STATX_BASIC_STATS,
    STATX_MNT_ID,
    blkpg_ioctl_arg,
    blkpg_partition,
    loop_config,
    loop_info64,
    statx_buf,
)
from .vfs import checked, libc

_DEV = "/dev"
_SYS_BLOCK = "/sys/block"
_UEVENT_SEQNUM = "/sys/kernel/uevent_seqnum"
_SYS_DEV_BLOCK = "/sys/dev/block"
_ATTRIBUTE_SIZE = 1 << 13  # a page, and what tells that there is no more


class PartitionExtent(NamedTuple):
    """A partition device: its number, and where it is on the disk in bytes."""

    number: int
    start: int
    size: int


# --- files --------------------------------------------------------------------------------------


def statx(
    fd: int, flags: int = AT_STATX_DONT_SYNC, mask: int = STATX_BASIC_STATS | STATX_MNT_ID
) -> statx_buf:
    """What is known of an open file; the default never asks a network or FUSE server.

    Python has os.statx from 3.15 only.
    """
    buf = statx_buf()
    checked(libc.statx(fd, b"", AT_EMPTY_PATH | flags, mask, ctypes.byref(buf)))
    return buf


def preadv(fd: int, buffer: mmap.mmap, offset: int) -> int:
    """Read into a buffer, which has to suit the file's alignment where that is open O_DIRECT."""
    return os.preadv(fd, [buffer], offset)


def fsync(fd: int) -> None:
    """Write back what is dirty."""
    os.fsync(fd)


def flock(fd: int, operation: int) -> None:
    """Take, change or drop a BSD lock."""
    fcntl.flock(fd, operation)


def dup(fd: int) -> int:
    """Another fd on the same open file; not another opener of a device."""
    return os.dup(fd)


def close(fd: int) -> None:
    """Close an fd of a device."""
    os.close(fd)


# --- /dev/loop-control --------------------------------------------------------------------------


def open_loop_control() -> int:
    """Open /dev/loop-control."""
    return os.open(f"{_DEV}/loop-control", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)


def loop_ctl_get_free(control_fd: int) -> int:
    """The number of an unbound device, made if there is none; others may be given the same."""
    return fcntl.ioctl(control_fd, LOOP_CTL_GET_FREE)


def loop_ctl_add(control_fd: int, number: int) -> int:
    """Make the device of this number (-1: of the lowest number that has none)."""
    return fcntl.ioctl(control_fd, LOOP_CTL_ADD, number)


def loop_ctl_remove(control_fd: int, number: int) -> None:
    """Remove an unbound device; waits for an RCU grace period."""
    fcntl.ioctl(control_fd, LOOP_CTL_REMOVE, number)


# --- a loop device ------------------------------------------------------------------------------


def open_loop(number: int, flags: int) -> int:
    """Open /dev/loopN without becoming a terminal's or a child's."""
    return _open_node(f"loop{number}", flags)


def reopen(fd: int, flags: int) -> int:
    """Open once more what an fd is open on, whatever has its name by now."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def open_partition(number: int, partition: int, flags: int) -> int:
    """Open /dev/loopNpM in the same way."""
    return _open_node(f"loop{number}p{partition}", flags)


def partition_node_exists(number: int, partition: int) -> bool:
    """Whether there is a /dev/loopNpM."""
    return os.path.exists(f"{_DEV}/loop{number}p{partition}")


def loop_set_fd(loop_fd: int, file_fd: int) -> None:
    """Bind a backing file; the rest is set by calls that follow."""
    fcntl.ioctl(loop_fd, LOOP_SET_FD, file_fd)


def loop_configure(loop_fd: int, config: loop_config) -> None:
    """Bind a backing file and set everything about it in one step (Linux 5.8)."""
    fcntl.ioctl(loop_fd, LOOP_CONFIGURE, config)


def loop_clr_fd(loop_fd: int) -> None:
    """Unbind, now or when the last opener closes."""
    fcntl.ioctl(loop_fd, LOOP_CLR_FD)


def loop_get_status64(loop_fd: int) -> loop_info64:
    """How the device is bound; asks the backing file's filesystem, which may hang."""
    info = loop_info64()
    fcntl.ioctl(loop_fd, LOOP_GET_STATUS64, info)
    return info


def loop_set_status64(loop_fd: int, info: loop_info64) -> None:
    """Change offset, limit, name and the settable flags."""
    fcntl.ioctl(loop_fd, LOOP_SET_STATUS64, info)


def loop_set_capacity(loop_fd: int) -> None:
    """Take up the size that the backing file has now."""
    fcntl.ioctl(loop_fd, LOOP_SET_CAPACITY)


def loop_set_direct_io(loop_fd: int, enable: bool) -> None:
    """Turn direct I/O to the backing file on or off."""
    fcntl.ioctl(loop_fd, LOOP_SET_DIRECT_IO, int(enable))


def loop_set_block_size(loop_fd: int, size: int) -> None:
    """Set the logical sector size in bytes."""
    fcntl.ioctl(loop_fd, LOOP_SET_BLOCK_SIZE, size)


def _open_node(name: str, flags: int) -> int:
    return os.open(
        f"{_DEV}/{name}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
    )


# --- any block device ---------------------------------------------------------------------------


def blkgetdiskseq(block_fd: int) -> int:
    """The sequence number of what is in the drive (Linux 5.15)."""
    return _get_u64(block_fd, BLKGETDISKSEQ)


def blkgetsize64(block_fd: int) -> int:
    """The size in bytes."""
    return _get_u64(block_fd, BLKGETSIZE64)


def blksszget(block_fd: int) -> int:
    """The logical sector size in bytes."""
    value = ctypes.c_int()
    fcntl.ioctl(block_fd, BLKSSZGET, value)
    return value.value


def blkflsbuf(block_fd: int) -> None:
    """Write back and drop what is cached of the device."""
    fcntl.ioctl(block_fd, BLKFLSBUF, 0)


def blkpg_add_partition(block_fd: int, number: int, start: int, length: int) -> None:
    """Make a partition device; start and length in bytes."""
    _blkpg(block_fd, BLKPG_ADD_PARTITION, number, start, length)


def blkpg_del_partition(block_fd: int, number: int) -> None:
    """Remove a partition device."""
    _blkpg(block_fd, BLKPG_DEL_PARTITION, number)


def blkpg_resize_partition(block_fd: int, number: int, start: int, length: int) -> None:
    """Give a partition device another length; the start, in bytes, has to be the one it has."""
    _blkpg(block_fd, BLKPG_RESIZE_PARTITION, number, start, length)


def _blkpg(block_fd: int, operation: int, number: int, start: int = 0, length: int = 0) -> None:
    partition = blkpg_partition(pno=number, start=start, length=length)
    argument = blkpg_ioctl_arg(
        op=operation, datalen=ctypes.sizeof(partition), data=ctypes.pointer(partition)
    )
    fcntl.ioctl(block_fd, BLKPG, argument)


def _get_u64(fd: int, request: int) -> int:
    value = ctypes.c_uint64()
    fcntl.ioctl(fd, request, value)
    return value.value


# --- sysfs --------------------------------------------------------------------------------------


def loop_attribute(number: int, attribute: str) -> bytes:
    """A sysfs attribute such as "size" or "loop/backing_file", without its final newline."""
    return _read(f"{_SYS_BLOCK}/loop{number}/{attribute}")


def _read(path: str) -> bytes:
    # Half the time of pathlib's, and a look at a device reads a dozen.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _ATTRIBUTE_SIZE).removesuffix(b"\n")
    finally:
        os.close(fd)


def uevent_seqnum() -> int:
    """The number of the last event that the kernel has told, of whatever device."""
    return int(_read(_UEVENT_SEQNUM))


def loop_binding(number: int) -> int | None:
    """Which binding of a file this is; None if none is, not even one that waits for a last close.

    It is the inode of the directory that sysfs makes for a binding and removes with it, so unlike
    the diskseq it stays the same over LOOP_CHANGE_FD, and no two bindings have the same.
    """
    try:
        return os.stat(f"{_SYS_BLOCK}/loop{number}/loop").st_ino
    except FileNotFoundError:
        return None


def loop_numbers() -> list[int]:
    """The numbers of all loop devices that exist, bound or not."""
    names = (name.removeprefix("loop") for name in os.listdir("/sys/block") if name[:4] == "loop")
    return sorted(int(name) for name in names if name.isdecimal())


def loop_exists(number: int) -> bool:
    """Whether there is a device of this number, bound or not."""
    return os.path.exists(f"{_SYS_BLOCK}/loop{number}")


def loop_bound(number: int) -> bool:
    """Whether the kernel has a file bound, be it that it only waits for the last close."""
    return loop_binding(number) is not None


def set_loop_attribute(number: int, attribute: str, value: bytes) -> None:
    """Write a sysfs attribute such as "queue/discard_max_bytes"."""
    Path(_SYS_BLOCK, f"loop{number}", attribute).write_bytes(value)


def loop_partitions(number: int) -> list[PartitionExtent]:
    """The partition devices of a loop device, by number, whatever is bound to it."""
    return _partitions(_SYS_BLOCK, f"loop{number}")


def _partitions(directory: str, disk: str) -> list[PartitionExtent]:
    found = []
    try:
        names = os.listdir(f"{directory}/{disk}")
    except FileNotFoundError:
        return []
    for name in names:
        if not name.startswith(disk):
            continue
        try:
            number, start, size = (
                int(_read(f"{directory}/{disk}/{name}/{attribute}"))
                for attribute in ("partition", "start", "size")
            )
        except OSError as exc:
            # Removed between look and read; any other reason would hide one that is there.
            if exc.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            continue
        found.append(PartitionExtent(number, start * 512, size * 512))
    return sorted(found)


def loop_of_block_device(major: int, minor: int) -> int | None:
    """The number of the loop device that a block device is, or is a partition of."""
    path = Path(_SYS_DEV_BLOCK, f"{major}:{minor}")
    if major != LOOP_MAJOR and not (path / "partition").exists():
        return None
    path = path.resolve()
    name = path.parent.name if (path / "partition").exists() else path.name
    number = name.removeprefix("loop")
    return int(number) if name.startswith("loop") and number.isdecimal() else None


def block_name(major: int, minor: int) -> str:
    """The kernel's name of a block device, such as sda1."""
    return Path(_SYS_DEV_BLOCK, f"{major}:{minor}").resolve(strict=True).name


def block_attribute(major: int, minor: int, attribute: str) -> bytes:
    """A sysfs attribute of a block device such as "size" or "../dev", as `loop_attribute`."""
    return _read(f"{_SYS_DEV_BLOCK}/{major}:{minor}/{attribute}")


def block_partitions(major: int, minor: int) -> list[PartitionExtent]:
    """The partition devices of a block device, by number."""
    disk = Path(_SYS_DEV_BLOCK, f"{major}:{minor}").resolve()
    return _partitions(str(disk.parent), disk.name)


@functools.cache
def release() -> tuple[int, int]:
    """The running kernel's version, major and minor."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
