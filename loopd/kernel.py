# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's side of loop(4): constants, structs, one function per call, OSError untouched.

Names are the kernel's own. Nothing here retries, waits, logs or decides. This module is the only
seam of the tests below the bus: a scripted kernel replaces its functions.
"""

import contextlib
import ctypes
import fcntl
import os
import platform
import re
from pathlib import Path

LOOP_MAJOR = 7

# include/uapi/linux/loop.h
LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_CAPACITY = 0x4C07
LOOP_SET_DIRECT_IO = 0x4C08
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_ADD = 0x4C80
LOOP_CTL_REMOVE = 0x4C81
LOOP_CTL_GET_FREE = 0x4C82

LO_NAME_SIZE = 64
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16

# include/uapi/linux/fs.h and blkpg.h
BLKSSZGET = 0x1268
BLKPG = 0x1269
BLKGETSIZE64 = 0x80081272
BLKGETDISKSEQ = 0x80081280
BLKPG_DEL_PARTITION = 2

# include/uapi/linux/stat.h and fcntl.h
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
STATX_BASIC_STATS = 0x7FF

_DEV = Path("/dev")
_SYS_BLOCK = Path("/sys/block")
_SYS_DEV_BLOCK = Path("/sys/dev/block")


class loop_info64(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct loop_info64."""

    lo_device: int
    lo_inode: int
    lo_rdevice: int
    lo_offset: int
    lo_sizelimit: int
    lo_number: int
    lo_flags: int
    lo_file_name: bytes
    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_crypt_name", ctypes.c_char * LO_NAME_SIZE),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class loop_config(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct loop_config, the argument of LOOP_CONFIGURE."""

    fd: int
    block_size: int
    info: loop_info64
    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", loop_info64),
        ("reserved", ctypes.c_uint64 * 8),
    )


class _blkpg_partition(ctypes.Structure):  # noqa: N801  the kernel's name
    _fields_ = (
        ("start", ctypes.c_longlong),
        ("length", ctypes.c_longlong),
        ("pno", ctypes.c_int),
        ("devname", ctypes.c_char * 64),
        ("volname", ctypes.c_char * 64),
    )


class _blkpg_ioctl_arg(ctypes.Structure):  # noqa: N801  the kernel's name
    _fields_ = (
        ("op", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("datalen", ctypes.c_int),
        ("data", ctypes.POINTER(_blkpg_partition)),
    )


class _statx_timestamp(ctypes.Structure):  # noqa: N801  the kernel's name
    _fields_ = (
        ("tv_sec", ctypes.c_int64),
        ("tv_nsec", ctypes.c_uint32),
        ("__reserved", ctypes.c_int32),
    )


class statx_buf(ctypes.Structure):  # noqa: N801  the kernel's name
    """struct statx."""

    stx_mode: int
    stx_ino: int
    stx_size: int
    stx_rdev_major: int
    stx_rdev_minor: int
    stx_dev_major: int
    stx_dev_minor: int
    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("stx_blksize", ctypes.c_uint32),
        ("stx_attributes", ctypes.c_uint64),
        ("stx_nlink", ctypes.c_uint32),
        ("stx_uid", ctypes.c_uint32),
        ("stx_gid", ctypes.c_uint32),
        ("stx_mode", ctypes.c_uint16),
        ("__spare0", ctypes.c_uint16),
        ("stx_ino", ctypes.c_uint64),
        ("stx_size", ctypes.c_uint64),
        ("stx_blocks", ctypes.c_uint64),
        ("stx_attributes_mask", ctypes.c_uint64),
        ("stx_atime", _statx_timestamp),
        ("stx_btime", _statx_timestamp),
        ("stx_ctime", _statx_timestamp),
        ("stx_mtime", _statx_timestamp),
        ("stx_rdev_major", ctypes.c_uint32),
        ("stx_rdev_minor", ctypes.c_uint32),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("__spare2", ctypes.c_uint64 * 14),
    )


_libc = ctypes.CDLL(None, use_errno=True)


# --- files --------------------------------------------------------------------------------------


def statx(fd: int, flags: int = AT_STATX_DONT_SYNC) -> statx_buf:
    """What is known of an open file; the default never asks a network or FUSE server.

    Python has os.statx from 3.15 only.
    """
    buf = statx_buf()
    if _libc.statx(fd, b"", AT_EMPTY_PATH | flags, STATX_BASIC_STATS, ctypes.byref(buf)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buf


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
    return os.open(_DEV / "loop-control", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)


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
    return os.open(
        _DEV / f"loop{number}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
    )


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


def blkpg_del_partition(block_fd: int, number: int) -> None:
    """Remove a partition device."""
    partition = _blkpg_partition(pno=number)
    argument = _blkpg_ioctl_arg(
        op=BLKPG_DEL_PARTITION, datalen=ctypes.sizeof(partition), data=ctypes.pointer(partition)
    )
    fcntl.ioctl(block_fd, BLKPG, argument)


def _get_u64(fd: int, request: int) -> int:
    value = ctypes.c_uint64()
    fcntl.ioctl(fd, request, value)
    return value.value


# --- sysfs --------------------------------------------------------------------------------------


def loop_numbers() -> list[int]:
    """The numbers of all loop devices that exist, bound or not."""
    names = (path.name.removeprefix("loop") for path in _SYS_BLOCK.glob("loop*"))
    return sorted(int(name) for name in names if name.isdecimal())


def loop_attribute(number: int, attribute: str) -> bytes:
    """A sysfs attribute such as "size" or "loop/backing_file", without its final newline."""
    return (_SYS_BLOCK / f"loop{number}" / attribute).read_bytes().removesuffix(b"\n")


def loop_binding(number: int) -> int | None:
    """Which binding of a file this is; None if none is, not even one that waits for a last close.

    It is the inode of the directory that sysfs makes for a binding and removes with it, so unlike
    the diskseq it stays the same over LOOP_CHANGE_FD, and no two bindings have the same.
    """
    try:
        return (_SYS_BLOCK / f"loop{number}" / "loop").stat().st_ino
    except FileNotFoundError:
        return None


def loop_bound(number: int) -> bool:
    """Whether the kernel has a file bound, be it that it only waits for the last close."""
    return loop_binding(number) is not None


def loop_partitions(number: int) -> list[int]:
    """The numbers of the partition devices that exist."""
    numbers = []
    for path in (_SYS_BLOCK / f"loop{number}").glob(f"loop{number}p*"):
        with contextlib.suppress(FileNotFoundError):
            numbers.append(int((path / "partition").read_bytes()))
    return sorted(numbers)


def loop_of_block_device(major: int, minor: int) -> int | None:
    """The number of the loop device that a block device is, or is a partition of."""
    if major != LOOP_MAJOR and not (_SYS_DEV_BLOCK / f"{major}:{minor}" / "partition").exists():
        return None
    path = (_SYS_DEV_BLOCK / f"{major}:{minor}").resolve()
    name = path.parent.name if (path / "partition").exists() else path.name
    number = name.removeprefix("loop")
    return int(number) if name.startswith("loop") and number.isdecimal() else None


def release() -> tuple[int, int]:
    """The running kernel's version, major and minor."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)
