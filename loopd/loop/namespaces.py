# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which filesystem a file is on that was opened in a mount namespace with mounts of its own.

No mount table that loopd reads has its mount, and on btrfs and overlay the file's device number is
none of the filesystem's. The kernel knows both, and is asked for them without the filesystem.

What else there is was tried on Linux 6.18, with a FUSE server that answers nothing:

- fstatfs and FS_IOC_GETFLAGS wait for the server, and the ioctls of btrfs are passed on to it.
- FS_IOC_GETFSUUID and FS_IOC_GETFSSYSFSPATH are not, from Linux 6.9 on, but btrfs has neither. That
  of an overlay is chosen by whoever mounts it, in a user namespace of a user's for one.
- A table in /proc/PID would do, as the kernel writes it. The unit has ProtectProc=, by which loopd
  sees no process of a user's.
- An inotify watch tells the number in fdinfo, but takes the right to read the file, which loopd has
  not.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache

from . import kernel, vfs
from .uapi import FILEID_BTRFS, NS_MNT_GET_NEXT, NS_MNT_GET_PREV, STATX_MNT_ID_UNIQUE

# A user can make as many namespaces as it likes. A file that is in none of so many on either side
# of ours is not known.
_MOST = 1000


def device(fd: int) -> int | None:
    """The device number of the filesystem that a file's mount is of, as mountinfo has it.

    None before Linux 6.12, for a mount that is in no namespace any more, and where systemd is too
    old to know statmount(2), which the unit's filter of system calls refuses then.
    """
    try:
        buf = kernel.statx(fd, mask=STATX_MNT_ID_UNIQUE)
        return _device(buf.stx_mnt_id) if buf.stx_mask & STATX_MNT_ID_UNIQUE else None
    except OSError:
        return None


# No mount ever has the unique id of another one, so one look is enough. A user who sends many files
# would otherwise have all namespaces looked at for each.
@lru_cache(maxsize=_MOST)
def _device(mount: int) -> int | None:
    for request in (NS_MNT_GET_NEXT, NS_MNT_GET_PREV):
        for namespace in _namespaces(request):
            with suppress(FileNotFoundError):
                found = vfs.statmount(mount, namespace)
                return os.makedev(found.sb_dev_major, found.sb_dev_minor)
    return None


def _namespaces(request: int) -> Iterator[int]:
    """The ids of the mount namespaces that were made before ours, or after it."""
    fd = vfs.open_mount_namespace()
    try:
        for _ in range(_MOST):
            beside_fd, namespace = vfs.mount_namespace_beside(fd, request)
            os.close(fd)
            fd = beside_fd
            yield namespace
    except FileNotFoundError:
        pass  # there is no further one
    finally:
        os.close(fd)


def btrfs(fd: int) -> str:
    """The UUID of the btrfs that a file is on; empty if it is on anything else."""
    # The handle tells, and only then an ioctl is sure not to reach a server. It is looked up like a
    # path, for which NFS and 9p ask theirs: of a mount that `device` knows this is not asked.
    try:
        return vfs.btrfs_fsid(fd) if vfs.file_handle_type(fd) in FILEID_BTRFS else ""
    except OSError:
        return ""
