# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first look at a file that a client passed, by calls that never wait for its filesystem.

A FUSE or network server that does not answer blocks fstat, fstatfs and open for good, and SIGKILL
does not help. So this uses F_GETFL, F_GET_SEALS, statx without synchronisation, and calls that the
kernel answers before it asks a filesystem; and finds the filesystem's type by its mount.
"""

import enum
import errno
import fcntl
import mmap
import os
import re
import stat
from dataclasses import dataclass

from loopd.errors import UnsupportedFile, UntrustedFilesystem

from . import kernel, mounts, namespaces, vfs
from .uapi import STATX_ATTR_APPEND, STATX_ATTR_IMMUTABLE, STATX_MNT_ID, flock64, statx_buf

# Filesystems of the kernel's own making, whose files have no blocks to map. Files on hugetlbfs can
# be mapped to memory, and not be written.
_PSEUDO_FILESYSTEMS = frozenset(
    "binfmt_misc bpf cgroup cgroup2 configfs debugfs efivarfs fusectl hugetlbfs mqueue nsfs proc "
    "pstore securityfs selinuxfs smackfs sysfs tracefs".split()
)

# QEMU has a shared lock on one byte for each thing that it does to an image, from the first on
# (RAW_LOCK_PERM_BASE); the second is for writing.
_QEMU_FIRST = 100
_QEMU_WRITES = 101
_OPEN_FILE = -1  # in place of a process's id

_FDINFO = 4096  # what tells of the mount comes among the first

F_SEAL_FUTURE_WRITE = 0x0010  # Python has no name for it before 3.13


def _plain_flags() -> int:
    # O_LARGEFILE differs between architectures, and Python says 0 where it is implied.
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL)
    finally:
        os.close(fd)


_ALLOWED_FLAGS = (
    _plain_flags()
    | os.O_ACCMODE
    | os.O_NONBLOCK
    | os.O_NOFOLLOW
    | os.O_CLOEXEC
    | os.O_DIRECT
    | os.O_NOATIME
    | os.O_TMPFILE
    | os.O_SYNC
    | os.O_DSYNC
)


class Lock(enum.Enum):
    """What a lock of another open file says of its owner."""

    NONE = enum.auto()
    READER = enum.auto()
    """QEMU's lock for writing, which is a shared one: users who may only read can take it, too."""
    WRITER = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Which block device a file is; numbers as os.makedev makes them."""

    number: int
    disk: int
    """The whole disk that it is, or is a partition of."""
    start: int
    """Where on the disk it begins, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """Which file a file is, whatever it is called."""

    device: int
    """st_dev"""
    inode: int
    """st_ino"""
    block: Block | None = None
    """If it is a block device, this is what it is; there may be many nodes of one."""

    def is_same_as(self, other: "FileIdentity") -> bool:
        """Whether both are one file, or one block device."""
        if self.block and other.block:
            return self.block.number == other.block.number
        return (self.device, self.inode) == (other.device, other.inode)


@dataclass(frozen=True, kw_only=True)
class BackingFile:
    """A file that loopd may put behind a loop device."""

    identity: FileIdentity
    size: int
    """In bytes, as far as known without asking."""
    writable: bool
    """Open for reading and writing, and not sealed against it."""
    sealed: bool
    """A memfd that nobody can write to any more."""
    filesystem: str
    """The type as in mountinfo, or the name of what it stands on that is not trusted, as mounts
    says; empty for a block device, and where no mount can be seen."""
    guarded_by: str = ""
    """What keeps an ordinary user's writes from it or marks them, and not the loop driver's."""
    lock: Lock = Lock.NONE
    """A lock that another program has on it, as `lock_of` finds."""

    @property
    def closes_quickly(self) -> bool:
        """Whether a close of it is sure to end, as `closes_quickly` finds out of any fd."""
        return self.identity.block is None and self.filesystem in mounts.TRUSTED_FILESYSTEMS


def identify(fd: int) -> FileIdentity:
    """Say which file an fd is open on, in whatever mode, O_PATH too.

    Raises UntrustedFilesystem where not even root may look.
    """
    return _identity(_look(fd))


def is_writable(fd: int) -> bool:
    """Whether an fd is open for reading and writing."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def size(fd: int) -> int:
    """The size in bytes of a file or block device; asks the file's filesystem, which may hang."""
    buf = kernel.statx(fd, 0)
    return kernel.blkgetsize64(fd) if stat.S_ISBLK(buf.stx_mode) else buf.stx_size


def _look(fd: int) -> statx_buf:
    try:
        return kernel.statx(fd)
    except PermissionError as exc:
        raise UntrustedFilesystem(
            "the file's filesystem does not let loopd look at it, as FUSE does unless it is "
            "mounted with allow_root or allow_other: copy the file to a local disk"
        ) from exc


def _identity(buf: statx_buf) -> FileIdentity:
    is_block = stat.S_ISBLK(buf.stx_mode)
    return FileIdentity(
        device=os.makedev(buf.stx_dev_major, buf.stx_dev_minor),
        inode=buf.stx_ino,
        block=block(buf.stx_rdev_major, buf.stx_rdev_minor) if is_block else None,
    )


def block(major: int, minor: int) -> Block:
    """Which disk a block device is, or is a partition of, and where."""
    number = os.makedev(major, minor)
    try:
        start = int(kernel.block_attribute(major, minor, "start"))
        disk_major, _, disk_minor = kernel.block_attribute(major, minor, "../dev").partition(b":")
    except FileNotFoundError:
        return Block(number=number, disk=number, start=0)  # no partition
    disk = os.makedev(int(disk_major), int(disk_minor))
    return Block(number=number, disk=disk, start=start * 512)


def local_filesystem(fd: int) -> str:
    """The type of the filesystem of a regular file, if it is known to be a local one; else empty.

    Never waits, and asks no filesystem before it is known: it is for the event loop. Then `examine`
    does not wait either.
    """
    filesystem = mounts.known(_mount_in_fdinfo(fd))
    return filesystem if filesystem and stat.S_ISREG(os.fstat(fd).st_mode) else ""


def examine(fd: int, filesystem: str = "") -> BackingFile:
    """Check how and on what a passed fd is open; its `filesystem` may be known already.

    Raises UnsupportedFile for what the kernel would take but should not: a loop device over a
    write-only file can be read, one over an append-only file can overwrite it.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise UnsupportedFile("the file is open with O_PATH: open it for reading")
    access = flags & os.O_ACCMODE
    if access not in (os.O_RDONLY, os.O_RDWR):
        raise UnsupportedFile("the file is open for writing only: open it for reading, too")
    if flags & os.O_APPEND:
        raise UnsupportedFile("the file is open with O_APPEND: open it without")
    if unknown := flags & ~_ALLOWED_FLAGS:
        raise UnsupportedFile(f"the file is open with flags ({unknown:#o}) that are not allowed")
    buf = _look(fd)
    identity = _identity(buf)
    if identity.block:
        return BackingFile(
            identity=identity,
            size=kernel.blkgetsize64(fd),
            writable=access == os.O_RDWR,
            sealed=False,
            filesystem="",
        )
    if not stat.S_ISREG(buf.stx_mode):
        raise UnsupportedFile("the passed fd is neither a regular file nor a block device")
    _require_io(fd)
    require_not_swapped_to(fd)
    seals = _seals(fd)
    if seals is not None:
        filesystem = _filesystem_of_memory(fd)
    filesystem = filesystem or _filesystem(fd, buf)
    if filesystem in _PSEUDO_FILESYSTEMS:
        raise UnsupportedFile(f"files on {filesystem} cannot be behind a loop device")
    sealed = bool((seals or 0) & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE))
    writable = access == os.O_RDWR and not sealed
    return BackingFile(
        identity=identity,
        size=buf.stx_size,
        writable=writable,
        sealed=sealed,
        filesystem=filesystem,
        guarded_by=_guard(buf),
        lock=lock_of(fd) if writable and filesystem in mounts.TRUSTED_FILESYSTEMS else Lock.NONE,
    )


def _require_io(fd: int) -> None:
    """Refuse a file that the driver cannot read at all."""
    try:
        vfs.read_nothing(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ESPIPE):
            raise
        raise UnsupportedFile(
            "the file can only be mapped to memory, as one of memfd_secret can: copy it to an "
            "ordinary file"
        ) from exc


def require_not_swapped_to(fd: int) -> None:
    """Refuse an active swap file. An fd that is open for reading only does not tell.

    A device would make holes in it, which the kernel forbids everybody else; its writes fail.
    """
    try:
        vfs.fallocate_nothing(fd)
    except OSError as exc:
        if exc.errno == errno.ETXTBSY:
            raise UnsupportedFile("the file is an active swap file: swapoff it first") from exc


def lock_of(fd: int) -> Lock:
    """Find a lock of a program that writes to the file; asks its filesystem.

    Of fcntl(2)'s locks those of open files count. One of a process may be the client's own.
    """
    exclusive = vfs.ofd_getlk(fd, flock64(l_type=fcntl.F_RDLCK))
    if exclusive.l_type != fcntl.F_UNLCK and exclusive.l_pid == _OPEN_FILE:
        return Lock.WRITER
    qemu = vfs.ofd_getlk(fd, flock64(l_type=fcntl.F_WRLCK, l_start=_QEMU_WRITES, l_len=1))
    # A lock that begins before QEMU's bytes belongs to a program that reads the whole file.
    if qemu.l_type == fcntl.F_UNLCK or qemu.l_pid != _OPEN_FILE or qemu.l_start < _QEMU_FIRST:
        return Lock.NONE
    mode = _look(fd).stx_mode
    readers = mode & (stat.S_IRGRP | stat.S_IROTH)
    writers = mode & (stat.S_IWGRP | stat.S_IWOTH)
    return Lock.READER if readers & ~(writers << 1) else Lock.WRITER


def guarded_by(fd: int) -> str:
    """What keeps an ordinary user's writes from a file or marks them now, as in BackingFile."""
    return _guard(_look(fd))


def _guard(buf: statx_buf) -> str:
    """What write(2) and fallocate(2) of an ordinary user heed, and a worker of the driver's not.

    write(2) takes the set-id bits away, and fallocate(2) refuses to make holes, by an fd from
    before the flag was set, too. The driver calls the filesystem with root's rights, and without
    the checks that come before that: Linux 6.18 discards what is in an immutable file.
    """
    if not stat.S_ISREG(buf.stx_mode):
        return ""
    if buf.stx_attributes & STATX_ATTR_IMMUTABLE:
        return "immutable"
    if buf.stx_attributes & STATX_ATTR_APPEND:
        return "append-only"
    if buf.stx_mode & stat.S_ISUID:
        return "set-user-ID"
    # Without the latter no program gets the group's rights by it.
    if buf.stx_mode & stat.S_ISGID and buf.stx_mode & stat.S_IXGRP:
        return "set-group-ID"
    return ""


def closes_quickly(fd: int) -> bool:
    """Whether closing the fd is sure to end: a regular file of a local filesystem.

    FUSE and network filesystems flush at a close, sockets may linger, terminals drain.
    """
    try:
        buf = kernel.statx(fd)
        if not stat.S_ISREG(buf.stx_mode):
            return False
        if _seals(fd) is not None:
            return True
        return _filesystem(fd, buf) in mounts.TRUSTED_FILESYSTEMS
    except OSError:
        return False


def _seals(fd: int) -> int | None:
    """The seals of a memfd or of any file on tmpfs or hugetlbfs; None for every other file."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return None


def _filesystem_of_memory(fd: int) -> str:
    # Of the two the former alone has blocks of a page. Neither makes anybody wait.
    return "tmpfs" if os.fstatvfs(fd).f_bsize == mmap.PAGESIZE else "hugetlbfs"


def _filesystem(fd: int, buf: statx_buf) -> str:
    device = os.makedev(buf.stx_dev_major, buf.stx_dev_minor)
    if found := mounts.filesystem(_mount_id(fd, buf), device):
        return found
    # Else as it would be for a mount of the same filesystem that is in the tables.
    filesystem = namespaces.device(fd)
    if filesystem is not None:
        return mounts.filesystem(-1, filesystem)
    fsid = namespaces.btrfs(fd)
    return mounts.btrfs(fsid) if fsid else ""


def _mount_id(fd: int, buf: statx_buf) -> int:
    """Which mount a file is in; before Linux 5.8 the fd tells, for the price of a file."""
    if buf.stx_mask & STATX_MNT_ID:
        return buf.stx_mnt_id
    return _mount_in_fdinfo(fd)


def _mount_in_fdinfo(fd: int) -> int:
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = re.search(rb"^mnt_id:\s*(\d+)$", os.read(info, _FDINFO), re.M)
    finally:
        os.close(info)
    return int(found[1]) if found else -1
