# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files whose mount no table shows, on kernels of several ages; tests/root has real ones."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from loopd.loop import backing_file, kernel, mounts, namespaces, vfs
from loopd.loop.uapi import (
    FILEID_BTRFS,
    NS_MNT_GET_NEXT,
    NS_MNT_GET_PREV,
    STATX_MNT_ID_UNIQUE,
    statmount_buf,
    statx_buf,
)

FSID = "0fc63daf-8483-4772-8e79-3d69d8477de4"
FUSE_HANDLE = 0x81


@dataclass
class Machine:
    """The mount namespaces beside ours, from the one that was made before it last."""

    former: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    later: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    unique: bool = True
    """Mounts have unique ids (Linux 6.8)."""
    iterates: bool = True
    """There are NS_MNT_GET_NEXT and _PREV (Linux 6.12)."""
    handle: int = FUSE_HANDLE
    looks: int = 0

    def __post_init__(self) -> None:
        self._ids: dict[int, dict[int, tuple[int, int]]] = {}
        self._at: dict[int, int] = {}

    def statx(self, fd: int, *_: int, mask: int = 0) -> statx_buf:
        assert mask == STATX_MNT_ID_UNIQUE
        return statx_buf(stx_mask=mask if self.unique else 0, stx_mnt_id=fd)

    def ours(self) -> int:
        self._at.clear()
        return os.open(os.devnull, os.O_RDONLY)

    def beside(self, fd: int, request: int) -> tuple[int, int]:
        if not self.iterates:
            refuse(errno.ENOTTY)
        row = {NS_MNT_GET_NEXT: self.later, NS_MNT_GET_PREV: self.former}[request]
        at = self._at.pop(fd, 0)
        if at == len(row):
            refuse(errno.ENOENT)
        beside = os.open(os.devnull, os.O_RDONLY)
        self._at[beside] = at + 1
        self._ids[beside] = row[at]
        return beside, beside

    def statmount(self, mount: int, namespace: int) -> statmount_buf:
        self.looks += 1
        if mount not in self._ids[namespace]:
            refuse(errno.ENOENT)
        major, minor = self._ids[namespace][mount]
        return statmount_buf(sb_dev_major=major, sb_dev_minor=minor)

    def fsid(self, fd: int) -> str:
        assert self.handle in FILEID_BTRFS, "a server would be asked"
        return FSID


def refuse(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setattr(kernel, "statx", made.statx)
    monkeypatch.setattr(vfs, "open_mount_namespace", made.ours)
    monkeypatch.setattr(vfs, "mount_namespace_beside", made.beside)
    monkeypatch.setattr(vfs, "statmount", made.statmount)
    monkeypatch.setattr(vfs, "file_handle_type", lambda _: made.handle)
    monkeypatch.setattr(vfs, "btrfs_fsid", made.fsid)
    fds = len(os.listdir("/proc/self/fd"))
    namespaces._device.cache_clear()
    yield made
    namespaces._device.cache_clear()
    opened = len(os.listdir("/proc/self/fd")) - fds
    assert opened == 0


@pytest.mark.parametrize("where", ["former", "later"])
def test_the_namespace_may_be_any(machine: Machine, where: str) -> None:
    """Another mount namespace."""
    setattr(machine, where, [{1: (0, 40)}, {2: (0, 41)}, {3: (0, 42)}])
    assert namespaces.device(2) == os.makedev(0, 41)
    assert namespaces.device(4) is None


def test_of_each_mount_all_namespaces_are_looked_at_once(machine: Machine) -> None:
    """Another mount namespace: a user may have many, and send many files."""
    machine.later = [{}] * 100
    for _ in range(50):
        assert namespaces.device(7) is None
    assert machine.looks == 100


def test_so_many_namespaces_are_looked_at_and_no_more(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mount namespace."""
    monkeypatch.setattr(namespaces, "_MOST", 10)
    machine.later = [{}] * 10 + [{7: (0, 40)}]
    assert namespaces.device(7) is None
    assert machine.looks == 10


@pytest.mark.parametrize(("unique", "iterates"), [(False, False), (True, False)])
def test_before_linux_6_12_a_btrfs_is_known_by_its_handle(
    machine: Machine, unique: bool, iterates: bool
) -> None:
    """Another mount namespace: and nothing else is asked what only btrfs answers by itself."""
    machine.unique, machine.iterates = unique, iterates
    assert namespaces.device(7) is None
    assert namespaces.btrfs(7) == ""
    for machine.handle in FILEID_BTRFS:
        assert namespaces.btrfs(7) == FSID


@pytest.mark.parametrize(
    ("mount", "device", "handle", "filesystem"),
    [
        (True, (0, 40), FUSE_HANDLE, "overlay"),
        (True, (0, 99), FUSE_HANDLE, ""),  # an overlay, or FUSE, of the client's own
        (True, (0, 99), min(FILEID_BTRFS), ""),  # as it would be in a table
        (False, None, min(FILEID_BTRFS), "btrfs"),
        (False, None, FUSE_HANDLE, ""),
    ],
)
def test_a_file_is_on_what_its_mount_is_of(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mount: bool,
    device: tuple[int, int] | None,
    handle: int,
    filesystem: str,
) -> None:
    """Another mount namespace: the answer is that of pid 1's table for the same filesystem."""
    disk = tmp_path / "sys/devices/pci0/sdb"
    disk.mkdir(parents=True)
    devices = tmp_path / "sys/fs/btrfs" / FSID / "devices"
    devices.mkdir(parents=True)
    (devices / "sdb").symlink_to(disk)
    path = tmp_path / "mountinfo"
    path.write_text("22 1 0:40 / / rw - overlay overlay rw,lowerdir=/usr\n")
    table = mounts.Table(path, tmp_path / "sys")
    number = None if device is None else os.makedev(*device)
    monkeypatch.setattr(mounts, "_TABLES", [table])
    monkeypatch.setattr(namespaces, "device", lambda _: number if mount else None)
    monkeypatch.setattr(vfs, "file_handle_type", lambda _: handle)
    monkeypatch.setattr(vfs, "btrfs_fsid", lambda _: FSID)
    try:
        buf = statx_buf(stx_mask=0x1000, stx_mnt_id=1234, stx_dev_minor=77)
        assert backing_file._filesystem(-1, buf) == filesystem
    finally:
        table.close()
