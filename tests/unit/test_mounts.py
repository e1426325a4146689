# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which filesystem a mount is of, as mount tables say; tests/root has one that changes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd import mounts

MOUNTINFO = (
    b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    b"30 22 0:39 / /home/a\\040-\\040b rw shared:2 master:3 - btrfs /dev/sdb rw\n"
    b"31 22 0:50 / /mnt rw - fuse.sshfs host: rw,user_id=0\n"
    b"32 22 0:51 / /mnt/a\r33\x0c34 rw - fuse x rw\r35 1 0:52 / / rw - ext4 y rw\n"
    b"36 22 8:1 / /again rw - ext3 /dev/sda1 rw\n"
)


@contextmanager
def table(path: Path) -> Iterator[mounts.Table]:
    made = mounts.Table(path)
    try:
        yield made
    finally:
        made.close()


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
    paths[1].write_bytes(b"22 1 8:1 / / rw - ext4 x rw\n")
    paths[2].write_bytes(b"22 1 8:1 / / rw - xfs x rw\n23 1 8:2 / / rw - btrfs x rw\n")
    tables = [mounts.Table(path) for path in paths]
    monkeypatch.setattr(mounts, "_TABLES", tables)
    try:
        mounts.prepare()
        assert [mounts.filesystem(mount, -1) for mount in (22, 23, 24)] == ["ext4", "btrfs", ""]
    finally:
        for each in tables:
            each.close()
