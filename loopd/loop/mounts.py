# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which filesystem a mount is of, or what it is at the mercy of, by mount tables and by sysfs.

Every attach looks, so the tables are read again only when they have changed. Where sixteen clients
attached at once, reading a table of 24 mounts each time was a seventh of the daemon's processor
time; the kernel takes 1.5 µs for each mount.
"""

import os
import re
import select
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from . import storage

# Local filesystems, whose calls end as long as their devices answer.
TRUSTED_FILESYSTEMS = frozenset(
    "bcachefs btrfs erofs exfat ext2 ext3 ext4 f2fs hfsplus iso9660 jfs nilfs2 ntfs3 overlay ramfs "
    "reiserfs squashfs tmpfs udf ufs vfat xfs zfs".split()
)
# Of these without a device. The pools of ZFS are not in sysfs, and are taken to be on disks.
_WITHOUT_DEVICE = frozenset("btrfs overlay ramfs tmpfs zfs".split())
# Of these with a journal that may be on another device.
_WITH_JOURNALS = frozenset("ext3 ext4".split())

_CHUNK = 1 << 16


class LoopFile(NamedTuple):
    """What is known of the file behind a loop device."""

    device: int
    """The device number of its filesystem, or its own if it is a block device."""
    is_block: bool
    vouched_for: bool
    """Whether loopd attached it and saw that it does not hang."""


LoopFiles = Callable[[int], LoopFile | None]


class _Mount(NamedTuple):
    kind: str
    device: int
    point: str
    source: str
    options: str


class Table:
    """A mount table as in proc_pid_mountinfo(5), kept open; for threads."""

    def __init__(self, path: Path, sysfs: Path = storage.SYSFS) -> None:
        self._path = path
        self._sysfs = sysfs
        self._lock = Lock()
        self._fd: int | None = None
        self._changed = select.poll()
        self._stale = False
        """Whether the kernel has told of a change since the table was read."""
        self._by_mount: dict[int, _Mount] = {}
        self._by_device: dict[int, _Mount] = {}
        self._below: dict[int, frozenset[int | str | _Mount]] = {}
        self._root: _Mount | None = None

    def filesystem(self, mount: int, device: int) -> str:
        """The type of the filesystem of a mount, else of a device number as os.makedev makes it.

        For one that is trusted by its type, but stands on something that is not, it is the type or
        the name of that: "fuse" for an ext4 on a loop device over a file on FUSE, "nbd" for one on
        a network block device, "loop" for one on a loop device over a file that is not known. Empty
        if neither is in the table, or sysfs does not have the device. The root filesystem goes by
        its type alone. Raises OSError, and ValueError for what is no table.
        """
        with self._lock:
            self._refresh()
            # The mount first: files on btrfs and overlay carry a device number that no mount has.
            # The number second: a client in a mount namespace of its own has mounts that only it
            # can see.
            found = self._by_mount.get(mount) or self._by_device.get(device)
            return next(self._doubts(found, ()), found.kind) if found else ""

    def known(self, mount: int) -> str:
        """The type of a mount's filesystem if that is trusted, and known without reading anything.

        Empty where `filesystem` has to be asked. Never waits: it is for the event loop.
        """
        if not self._lock.acquire(blocking=False):
            return ""  # a thread reads the table
        try:
            if self._fd is None or self._is_stale():
                return ""
            found = self._by_mount.get(mount)
            if found is None or found.kind not in TRUSTED_FILESYSTEMS:
                return ""
            stands_on_nothing = self._below.get(found.device) == frozenset()
            return found.kind if stands_on_nothing or self._is_root(found) else ""
        finally:
            self._lock.release()

    def _is_stale(self) -> bool:
        # The kernel's word for a change; it says so once.
        self._stale = self._stale or bool(self._changed.poll(0))
        return self._stale

    def btrfs(self, fsid: str) -> str:
        """The same for the btrfs with this UUID, which need not be in the table."""
        with self._lock:
            self._refresh()
            below = storage.foundations_of_btrfs_with(fsid, self._sysfs)
            return next(self._doubts_below(below, ()), "btrfs")

    def _doubts(self, mount: _Mount, above: tuple[int, ...]) -> Iterator[str]:
        """What a mount depends on, itself included, that is not trusted."""
        if mount.kind not in TRUSTED_FILESYSTEMS:
            yield mount.kind
        elif mount.device not in above and not self._is_root(mount):
            below = self._below.get(mount.device)
            if below is None:
                # Kept until the table changes. What root adds to a mounted device later is missed.
                below = self._below[mount.device] = frozenset(self._look_below(mount))
            yield from self._doubts_below(below, (*above, mount.device))

    def _is_root(self, mount: _Mount) -> bool:
        # No user has chosen what it is on, and if it hangs so does the machine. A live system has
        # it on loop devices whose files no mount shows any more, others have it on iSCSI.
        return self._root is not None and mount.device == self._root.device

    def _doubts_below(
        self, below: Iterable[int | str | _Mount], above: tuple[int, ...]
    ) -> Iterator[str]:
        for each in below:
            if isinstance(each, str):
                yield each
            elif isinstance(each, _Mount):
                yield from self._doubts(each, above)
            else:
                yield from self._doubts_of_loop(each, above)

    def _doubts_of_loop(self, number: int, above: tuple[int, ...]) -> Iterator[str]:
        # Not by the path in sysfs: it is as the file was called where it was opened, and a user may
        # have mounted FUSE there in a namespace of its own. Not by GET_STATUS64, which may hang:
        # the registry has asked it, in a thread that nobody waits for. The answer is compared by
        # device number, so a file on a btrfs, which has numbers of its own, is not known.
        file = _loop_files(number)
        if file and file.vouched_for:
            return
        if file and file.is_block:
            below = storage.foundations(file.device, self._sysfs)
            yield from self._doubts_below(below - {number}, above)
        elif file and (mount := self._by_device.get(file.device)):
            yield from self._doubts(mount, above)
        else:
            yield "loop"

    def _look_below(self, mount: _Mount) -> Iterable[int | str | _Mount]:
        """What sysfs and the table tell of where a mount's data are."""
        if os.major(mount.device):
            below = storage.foundations(mount.device, self._sysfs)
            if mount.kind in _WITH_JOURNALS:
                below |= storage.foundations_of_journal(mount.device, self._sysfs)
            return below
        if mount.kind == "btrfs":
            return storage.foundations_of_btrfs(mount.source, self._sysfs)
        if mount.kind == "overlay":
            # The paths are those of whoever mounted it, in an initramfs perhaps, and may mean
            # nothing by now. Only root's overlays are in this table; what is plainly on FUSE or on
            # a network counts, and a path that leads back here does not.
            return filter(None, map(self._mounted_at, _layers(mount.options)))
        return () if mount.kind in _WITHOUT_DEVICE else (storage.UNKNOWN,)

    def _mounted_at(self, path: str) -> _Mount | None:
        """The mount that an absolute path is on."""
        found = None
        for mount in self._by_mount.values():  # the later ones cover the former
            inside = f"{path}/".startswith(f"{mount.point.rstrip('/')}/")
            if inside and (found is None or len(mount.point) >= len(found.point)):
                found = mount
        return found

    def _refresh(self) -> None:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            self._changed.register(self._fd, select.POLLPRI)
        elif not self._is_stale():
            return
        try:
            self._stale = False
            self._below.clear()
            self._by_mount, self._by_device = _parsed(_whole(self._fd))
            self._root = self._mounted_at("/")
        except BaseException:
            self.close()  # for the change would not be told again
            raise

    def close(self) -> None:
        """Close it until it is asked again."""
        if self._fd is not None:
            self._changed.unregister(self._fd)
            os.close(self._fd)
            self._fd = None


# Pid 1 sees what a client sees, as far as anybody does: our sandbox hides mounts from us. Where pid
# 1 is hidden, or is in another container than we are, our own mounts are what there is.
_TABLES = (Table(Path("/proc/1/mountinfo")), Table(Path("/proc/self/mountinfo")))


def _no_loop_files(_: int) -> LoopFile | None:
    return None


_loop_files: LoopFiles = _no_loop_files


def ask_for_loops(loop_files: LoopFiles) -> None:
    """Have the file behind a loop number told by this, in threads; None if it is not known."""
    global _loop_files
    _loop_files = loop_files


def prepare() -> None:
    """Open the tables, which otherwise the first look at a file does."""
    filesystem(-1, -1)


def filesystem(mount: int, device: int) -> str:
    """The type of the filesystem of a mount, else of a device number; empty if none can be seen."""
    return _asked(lambda table: table.filesystem(mount, device))


def btrfs(fsid: str) -> str:
    """The same for the btrfs with this UUID."""
    return _asked(lambda table: table.btrfs(fsid))


def _asked(ask: Callable[[Table], str]) -> str:
    for table in _TABLES:
        with suppress(OSError, ValueError):
            if found := ask(table):
                return found
    return ""


def known(mount: int) -> str:
    """The type of a mount's filesystem if that is sure to be local, see `Table.known`."""
    return next(filter(None, (table.known(mount) for table in _TABLES)), "")


def _parsed(text: bytes) -> tuple[dict[int, _Mount], dict[int, _Mount]]:
    """The mounts by their numbers, and by their filesystems' device numbers."""
    by_mount: dict[int, _Mount] = {}
    by_device: dict[int, _Mount] = {}
    # At these alone: whoever mounts may have any other white space in a name.
    for line in filter(None, os.fsdecode(text).split("\n")):
        number, _, numbers, _, point, *others = line.split(" ")
        # After the optional fields; what follows a dot is the subtype that a FUSE server chose for
        # itself.
        name, source, options, *_ = others[others.index("-") + 1 :] + [""] * 2
        major, _, minor = numbers.partition(":")
        mount = _Mount(
            kind=os.fsencode(name.partition(".")[0]).decode(errors="replace"),
            device=os.makedev(int(major), int(minor)),
            point=_plain(point),
            source=_plain(source),
            options=_plain(options),
        )
        by_mount[int(number)] = mount
        by_device.setdefault(mount.device, mount)
    return by_mount, by_device


def _plain(field: str) -> str:
    """A field without the escapes for white space and backslashes."""
    return (
        re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), field) if "\\" in field else field
    )


def _layers(options: str) -> Iterator[str]:
    """The directories of an overlay, by the options that it was mounted with."""
    for option in options.split(","):
        key, _, value = option.partition("=")
        if key in ("lowerdir", "lowerdir+", "datadir+", "upperdir"):
            yield from filter(None, value.split(":"))


def _whole(fd: int) -> bytes:
    text = b""
    while chunk := os.pread(fd, _CHUNK, len(text)):
        text += chunk
    return text
