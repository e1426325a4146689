# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which filesystem a mount is of, as mount tables say; tests/root has one that changes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd.loop import mounts
from loopd.loop.mounts import LoopFile
from tests.harness.sysfs import Sysfs

MOUNTINFO = (
    b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    b"30 22 0:39 / /home/a\\040-\\040b rw shared:2 master:3 - btrfs /dev/sdb rw\n"
    b"31 22 0:50 / /mnt rw - fuse.sshfs host: rw,user_id=0\n"
    b"32 22 0:51 / /mnt/a\r33\x0c34 rw - fuse x rw\r35 1 0:52 / / rw - ext4 y rw\n"
    b"36 22 8:1 / /again rw - ext3 /dev/sda1 rw\n"
)


@contextmanager
def table(path: Path, sysfs: Path | None = None) -> Iterator[mounts.Table]:
    if sysfs is None:
        # The disks of the tables here are local.
        made_sysfs = Sysfs(path.parent / "sys")
        for number, disk in enumerate(("sda", "sda1", "sda2")):
            made_sysfs.add((8, number), f"pci0/{disk}")
        made_sysfs.btrfs("uuid", "sdb", made_sysfs.add((8, 16), "pci0/sdb"))
        sysfs = made_sysfs.root
    made = mounts.Table(path, sysfs)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("mount", "known"),
    [
        (22, "ext4"),
        (30, "btrfs"),
        (31, ""),  # not to be trusted
        (37, ""),  # on top of others
        (38, ""),  # on a device that nobody has looked at yet
        (99, ""),
    ],
)
def test_what_is_local_for_sure_is_known_without_a_look(
    tmp_path: Path, mount: int, known: str
) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(
        MOUNTINFO
        + b"37 22 0:55 / /over rw - overlay none rw,lowerdir=/home,upperdir=/mnt\n"
        + b"38 22 8:2 / /other rw - ext4 /dev/sda2 rw\n"
    )
    with table(path) as made:
        assert made.known(mount) == ""  # the table was not read yet
        for looked_at, device in ((22, (8, 1)), (30, (0, 40)), (31, (0, 50)), (37, (0, 55))):
            made.filesystem(looked_at, os.makedev(*device))
        assert made.known(mount) == known
        with made._lock:  # a thread is about to read the table again
            assert made.known(mount) == ""


@pytest.mark.parametrize(
    ("mount", "device", "filesystem"),
    [
        (22, (8, 1), "ext4"),
        (30, (0, 40), "btrfs"),  # a subvolume's number stands in no mount
        (31, (0, 50), "fuse"),  # the rest is the server's choice
        (31, (8, 1), "fuse"),  # the mount counts, not the number
        (99, (8, 1), "ext4"),  # a mount that only the client sees, of a device that we do
        (99, (0, 77), ""),
        (2, (0, 77), ""),  # no prefix of a number is the number
        (32, (0, 51), "fuse"),
        (33, (0, 53), ""),  # no line of the kernel's, but what somebody called his mount
        (35, (0, 52), ""),
    ],
)
def test_the_mount_counts_before_the_device_number(
    tmp_path: Path, mount: int, device: tuple[int, int], filesystem: str
) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(MOUNTINFO)
    with table(path) as made:
        assert made.filesystem(mount, os.makedev(*device)) == filesystem


def test_a_table_that_cannot_be_read_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mountinfo"
    with table(path) as made:
        with pytest.raises(FileNotFoundError):
            made.filesystem(22, -1)
        path.write_bytes(MOUNTINFO)
        with monkeypatch.context() as patch:
            patch.setattr(mounts, "_whole", lambda fd: os.pread(-1, 1, fd))
            with pytest.raises(OSError, match="Bad file descriptor"):
                made.filesystem(22, -1)
        assert made.filesystem(22, -1) == "ext4"


def test_an_empty_table_has_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.touch()
    with table(path) as made:
        assert made.filesystem(22, os.makedev(8, 1)) == ""


@pytest.mark.parametrize("text", [b"22 1\n", b"22 1 8:1 / / rw\n", b"22 1 8:1 / / rw -\n", b"x\n"])
def test_what_is_no_table_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    """Nobody's file stays open for that it cannot be told whether its close may hang."""
    path = tmp_path / "mountinfo"
    path.write_bytes(text)
    with table(path) as made:
        monkeypatch.setattr(mounts, "_TABLES", [made])
        assert mounts.filesystem(22, os.makedev(8, 1)) == ""
        path.write_bytes(MOUNTINFO)
        assert mounts.filesystem(22, -1) == "ext4"


def test_of_two_tables_the_second_is_for_what_is_not_in_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "none", tmp_path / "one", tmp_path / "two"]
    paths[1].write_bytes(b"22 1 0:1 / / rw - tmpfs x rw\n")
    paths[2].write_bytes(b"22 1 0:1 / / rw - ramfs x rw\n23 1 0:2 / / rw - nfs x rw\n")
    tables = [mounts.Table(path) for path in paths]
    monkeypatch.setattr(mounts, "_TABLES", tables)
    try:
        mounts.prepare()
        assert [mounts.filesystem(mount, -1) for mount in (22, 23, 24)] == ["tmpfs", "nfs", ""]
    finally:
        for each in tables:
            each.close()


# What a filesystem stands on

STACKS = """\
20 1 8:1 / / rw - ext4 /dev/sda1 rw
21 1 0:30 / /mnt/fuse rw - fuse.x server rw
22 1 7:0 / /mnt/a rw - ext4 /dev/loop0 rw
23 1 7:1 / /mnt/b rw - xfs /dev/loop1 rw
24 1 7:2 / /mnt/c rw - ext4 /dev/loop2 rw
25 1 7:3 / /mnt/d rw - ext4 /dev/loop3 rw
26 1 7:4 / /mnt/e rw - ext4 /dev/loop4 rw
27 1 253:0 / /home rw - ext4 /dev/mapper/home rw
28 1 0:40 / /mnt/btrfs rw - btrfs /dev/mapper/pool rw
29 1 0:41 / /mnt/over rw - overlay overlay rw,lowerdir=/usr:/mnt/a\\040b,upperdir=/up
30 1 0:42 / /mnt/fused rw - overlay overlay rw,lowerdir=/usr:/mnt/fuse/x
31 1 43:0 / /mnt/nbd rw - ext4 /dev/nbd0 rw
32 1 0:43 / /mnt/erofs rw - erofs /mnt/fuse/x rw
33 1 0:44 / / rw - overlay overlay rw,lowerdir=/run/gone
34 1 7:5 / /mnt/f rw - ext4 /dev/loop5 rw
35 1 0:45 / /mnt/btrfs2 rw - btrfs /dev/root rw
"""
FILES = {
    0: LoopFile(os.makedev(0, 30), is_block=False, vouched_for=False),
    1: LoopFile(os.makedev(8, 1), is_block=False, vouched_for=False),
    2: LoopFile(os.makedev(0, 99), is_block=False, vouched_for=False),
    3: LoopFile(os.makedev(7, 0), is_block=False, vouched_for=False),
    4: LoopFile(os.makedev(0, 99), is_block=False, vouched_for=True),
    5: LoopFile(os.makedev(43, 0), is_block=True, vouched_for=False),
}


@pytest.mark.parametrize(
    ("mount", "filesystem"),
    [
        (20, "ext4"),
        (21, "fuse"),
        (22, "fuse"),  # a loop device over a file there
        (23, "xfs"),  # over one on a local disk
        (24, "loop"),  # over one on what no mount is of
        (25, "fuse"),  # over one on the first
        (26, "ext4"),  # over one that loopd saw to be harmless
        (27, "loop"),  # device-mapper over a disk and the third
        (28, "loop"),  # a btrfs with that
        (29, "overlay"),
        (30, "fuse"),
        (31, "nbd"),
        (32, ""),  # of a file, which nobody says which it is
        (33, "overlay"),  # a path that means nothing any more
        (34, "nbd"),  # a loop device over a block device
        (35, "loop"),  # which of all btrfs is not told
    ],
)
def test_a_filesystem_is_trusted_no_more_than_what_it_stands_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: int, filesystem: str
) -> None:
    """Trust by type."""
    sysfs = Sysfs(tmp_path / "sys")
    disk = sysfs.add((8, 1), "pci0/sda1")
    loops = [sysfs.add((7, each), f"virtual/block/loop{each}") for each in range(6)]
    pool = sysfs.add((253, 0), "virtual/block/dm-0", slaves=[disk, loops[2]], name="pool")
    sysfs.add((43, 0), "virtual/block/nbd0")
    sysfs.btrfs("one", "dm-0", pool)
    monkeypatch.setattr(mounts, "_loop_files", FILES.get)
    path = tmp_path / "mountinfo"
    path.write_text(STACKS)
    with table(path, sysfs.root) as made:
        for _ in range(2):  # the second time by what was kept
            assert made.filesystem(mount, -1) == filesystem


@pytest.mark.parametrize(
    ("root", "kind"),
    [
        ("0:50 / / rw - overlay overlay rw,lowerdir=/run/live", "overlay"),
        ("253:0 / / rw - ext4 /dev/mapper/live-rw rw", "ext4"),
        ("43:0 / / rw - ext4 /dev/nbd0 rw", "ext4"),
        ("0:60 / / rw - nfs server:/ rw", "nfs"),
    ],
)
def test_what_the_machine_itself_stands_on_is_trusted(tmp_path: Path, root: str, kind: str) -> None:
    """Trust by type: a live system, whose loop devices are over files that no mount shows; and a
    filesystem beside it on the same device is none of it.
    """
    sysfs = Sysfs(tmp_path / "sys")
    loop = sysfs.add((7, 0), "virtual/block/loop0")
    sysfs.add((253, 0), "virtual/block/dm-0", slaves=[loop])
    sysfs.add((43, 0), "virtual/block/nbd0")
    path = tmp_path / "mountinfo"
    path.write_text(
        f"19 1 0:2 / / rw - ramfs x rw\n20 1 {root}\n21 20 7:0 / /run/live ro - squashfs x ro\n"
    )
    with table(path, sysfs.root) as made:
        assert made.filesystem(20, -1) == kind
        assert made.filesystem(21, -1) == "loop"


def test_what_becomes_known_of_a_loop_device_counts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trust by type."""
    sysfs = Sysfs(tmp_path / "sys")
    sysfs.add((8, 1), "pci0/sda1")
    sysfs.add((7, 1), "virtual/block/loop1")
    path = tmp_path / "mountinfo"
    path.write_text(STACKS)
    files: dict[int, LoopFile] = {}
    monkeypatch.setattr(mounts, "_loop_files", files.get)
    with table(path, sysfs.root) as made:
        assert made.filesystem(23, -1) == "loop"
        files[1] = FILES[1]
        assert made.filesystem(23, -1) == "xfs"
        files.clear()
        assert made.filesystem(23, -1) == "loop"


def test_a_sysfs_that_cannot_be_read_now_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(MOUNTINFO)
    with table(path) as made:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", lambda _: (_ for _ in ()).throw(OSError(24, "full")))
            with pytest.raises(OSError, match="full"):
                made.filesystem(30, -1)
        assert made.filesystem(30, -1) == "btrfs"
