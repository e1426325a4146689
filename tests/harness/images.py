# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images to attach: patterns, filesystems, partition tables, memfds.

All are small, sparse where they can be, and readable by everyone unless told otherwise; `owner`
makes one a user's own.
"""

import array
import os
import shutil
import struct
import subprocess
import uuid as uuids
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.harness.area import TOKEN

MIB = 1024 * 1024
LINUX_DATA = uuids.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def pattern(offset: int, length: int) -> bytes:
    """Return what a patterned file holds there: each 8 bytes say where they are."""
    first = offset // 8
    words = array.array("Q", range(first * 8, (offset + length + 7) // 8 * 8, 8))
    data = words.tobytes()
    return data[offset - first * 8 :][:length]


def make_plain(path: Path, size: int = MIB, *, owner: str | None = None, mode: int = 0o644) -> Path:
    """Make a file filled with the pattern."""
    path.write_bytes(pattern(0, size))
    return _finish(path, owner, mode)


def make_sparse(path: Path, size: int, *, owner: str | None = None, mode: int = 0o644) -> Path:
    """Make a file that is one hole."""
    with path.open("wb") as file:
        file.truncate(size)
    return _finish(path, owner, mode)


def make_ext4(
    path: Path,
    size: int = 4 * MIB,
    *,
    label: str = "loopd-test",
    uuid: str | None = None,
    owner: str | None = None,
    mode: int = 0o644,
) -> Path:
    """Make an ext4 filesystem in a sparse file."""
    make_sparse(path, size)
    command = ["mkfs.ext4", "-q", "-F", "-L", label, "-O", "^has_journal", "-m", "0"]
    command += ["-E", "nodiscard,lazy_itable_init=1"]
    command += ["-U", uuid] if uuid else []
    # mkfs lives where an ordinary user's PATH does not lead.
    environment = os.environ | {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    subprocess.run([*command, path], check=True, env=environment, stdin=subprocess.DEVNULL)
    return _finish(path, owner, mode)


def ext4_label(superblock: bytes) -> str:
    """Return the label in the first 2 KiB of an ext4 filesystem."""
    if superblock[1080:1082] != b"\x53\xef":
        raise ValueError("no ext4 here")
    return superblock[1144:1160].rstrip(b"\0").decode()


def make_gpt(
    path: Path,
    parts: Sequence[tuple[int, int]] = ((2048, 2048), (4096, 2048)),
    size: int = 4 * MIB,
    *,
    sector_size: int = 512,
    sparse: bool = False,
    owner: str | None = None,
    mode: int = 0o644,
) -> Path:
    """Make a patterned file with a GPT, or a sparse one; a part is its first sector and count."""
    last = size // sector_size - 1
    table = bytearray(128 * 128)
    disk = uuids.uuid5(uuids.NAMESPACE_URL, str(path))
    for index, (start, count) in enumerate(parts):
        unique = uuids.uuid5(disk, str(index))
        entry = struct.pack(
            "<16s16sQQQ72s",
            LINUX_DATA.bytes_le,
            unique.bytes_le,
            start,
            start + count - 1,
            0,
            f"part{index + 1}".encode("utf-16-le"),
        )
        table[index * 128 : (index + 1) * 128] = entry
    table_sectors = -(-len(table) // sector_size)

    def header(mine: int, other: int, table_at: int) -> bytes:
        fields = (
            *(b"EFI PART", 0x10000, 92),
            *(mine, other, 2 + table_sectors, last - table_sectors - 1),
            *(disk.bytes_le, table_at, 128, 128, zlib.crc32(table)),
        )
        form = "<8sIIIIQQQQ16sQIII"
        unsigned = struct.pack(form, *fields[:3], 0, 0, *fields[3:])
        return struct.pack(form, *fields[:3], zlib.crc32(unsigned), 0, *fields[3:])

    protective = bytearray(512)
    struct.pack_into(
        "<B3sB3sII", protective, 446, 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(last, 0xFFFFFFFF)
    )
    protective[510:] = b"\x55\xaa"

    if sparse:
        make_sparse(path, size)
    else:
        path.write_bytes(pattern(0, size))
    with path.open("r+b") as file:
        for sector, data in (
            (0, bytes(protective)),
            (1, header(1, last, 2)),
            (2, bytes(table)),
            (last - table_sectors, bytes(table)),
            (last, header(last, 1, last - table_sectors)),
        ):
            file.seek(sector * sector_size)
            file.write(data)
    return _finish(path, owner, mode)


def make_mbr(
    path: Path,
    primaries: Sequence[tuple[int, int]] = ((2048, 2048),),
    extended: tuple[int, int] | None = None,
    logicals: Sequence[tuple[int, int]] = (),
    size: int = 8 * MIB,
    *,
    sector_size: int = 512,
    owner: str | None = None,
    mode: int = 0o644,
) -> Path:
    """Make a patterned file with an MBR; a part is its first sector and its count of sectors.

    The extended partition comes after the primaries. The first logical partition is told of in its
    first sector, each of the others in the sector before it.
    """
    linux, chain = 0x83, 0x05
    path.write_bytes(pattern(0, size))
    parts = [(linux, *part) for part in primaries]
    if extended:
        parts.append((chain, *extended))
    with path.open("r+b") as file:

        def write(sector: int, entries: Sequence[tuple[int, int, int]]) -> None:
            data = bytearray(pattern(sector * sector_size, 512))
            data[440:510] = bytes(70)
            for index, (kind, start, count) in enumerate(entries):
                struct.pack_into(
                    "<B3sB3sII", data, 446 + 16 * index, 0, b"", kind, b"", start, count
                )
            data[510:] = b"\x55\xaa"
            file.seek(sector * sector_size)
            file.write(data)

        write(0, parts)
        if extended and logicals:
            first, _ = extended
            tables = [first, *(start - 1 for start, _ in logicals[1:])]
            for index, (at, (start, count)) in enumerate(zip(tables, logicals, strict=True)):
                entries = [(linux, start - at, count)]
                if index + 1 < len(logicals):
                    following, length = logicals[index + 1]
                    entries.append(
                        (chain, tables[index + 1] - first, following + length - tables[index + 1])
                    )
                write(at, entries)
    return _finish(path, owner, mode)


@contextmanager
def memfd(size: int = MIB, flags: int = os.MFD_CLOEXEC) -> Iterator[int]:
    """Yield the fd of a patterned memfd, which the leak check knows for this process's own."""
    fd = os.memfd_create(f"{TOKEN}memfd", flags)
    try:
        os.write(fd, pattern(0, size))
        yield fd
    finally:
        os.close(fd)


def _finish(path: Path, owner: str | None, mode: int) -> Path:
    path.chmod(mode)
    if owner is not None:
        shutil.chown(path, owner)
    return path
