# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls on files and mounts of any filesystem: one function per call, OSError untouched.

Beside those of `kernel`, which a scripted kernel replaces in tests. Each says what it may wait for.
"""

import ctypes
import fcntl
import os
import uuid

from .uapi import (
    AT_EMPTY_PATH,
    BTRFS_IOC_FS_INFO,
    STATMOUNT_SB_BASIC,
    SYS_STATMOUNT,
    btrfs_ioctl_fs_info_args,
    file_handle,
    flock64,
    mnt_id_req,
    mnt_ns_info,
    statmount_buf,
)

_LAST_OFFSET = (1 << 63) - 1

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    """Raise OSError for a call of the C library that failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def read_nothing(fd: int) -> None:
    """Read no bytes, which asks no filesystem; fails if the file has nothing to read by at all."""
    # read(2) would wait for the file's position, which another one that hangs may have.
    os.preadv(fd, [bytearray()], 0)


def fallocate_nothing(fd: int) -> None:
    """Ask for room behind the largest offset there is, which fails before a filesystem is asked.

    With ETXTBSY, if the file is an active swap file, and otherwise with EFBIG.
    """
    checked(libc.fallocate64(fd, 0, ctypes.c_longlong(_LAST_OFFSET), ctypes.c_longlong(1)))


def ofd_getlk(fd: int, lock: flock64) -> flock64:
    """A lock of another open file or of a process that is in the way of a lock, else F_UNLCK.

    Network and FUSE servers are asked.
    """
    return flock64.from_buffer_copy(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, bytes(lock)))


def file_handle_type(fd: int) -> int:
    """Which kind of handle the file's filesystem would make of it.

    It is made of what the kernel knows, and no FUSE server is asked.
    """
    handle, mount = file_handle(handle_bytes=128), ctypes.c_int()
    checked(
        libc.name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount), AT_EMPTY_PATH)
    )
    return handle.handle_type


def btrfs_fsid(fd: int) -> str:
    """The UUID of the btrfs that a file is on; any other filesystem would be asked what this is."""
    info = btrfs_ioctl_fs_info_args()
    fcntl.ioctl(fd, BTRFS_IOC_FS_INFO, info)
    return str(uuid.UUID(bytes=bytes(info.fsid)))


def open_mount_namespace() -> int:
    """Open our own mount namespace."""
    return os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def mount_namespace_beside(namespace_fd: int, request: int) -> tuple[int, int]:
    """Open the next or the former mount namespace, by NS_MNT_GET_NEXT or _PREV (Linux 6.12).

    Returns an fd and the namespace's id.
    """
    info = mnt_ns_info(size=ctypes.sizeof(mnt_ns_info))
    return fcntl.ioctl(namespace_fd, request, info), info.mnt_ns_id


def statmount(mount: int, namespace: int) -> statmount_buf:
    """Of which filesystem a mount in a namespace is, by their unique ids; asks no filesystem."""
    request = mnt_id_req(
        size=ctypes.sizeof(mnt_id_req),
        mnt_id=mount,
        param=STATMOUNT_SB_BASIC,
        mnt_ns_id=namespace,
    )
    buf = statmount_buf()
    checked(
        libc.syscall(
            ctypes.c_long(SYS_STATMOUNT),
            ctypes.byref(request),
            ctypes.byref(buf),
            ctypes.c_size_t(ctypes.sizeof(buf)),
            ctypes.c_long(0),
        )
    )
    return buf
