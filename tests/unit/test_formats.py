# SPDX-License-Identifier: LGPL-2.1-or-later
"""Formats that are no images of a disk: what the real tools write is known, and an image is not."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from loopd.cli.formats import recognized
from loopd.loop import block_device
from tests.harness.images import MIB, make_ext4, make_gpt, make_mbr, make_plain, make_sparse


def beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return block_device.beginning(file.fileno())


def run(*command: str | Path) -> bytes:
    """Run a tool; returns what it writes."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"not installed: {command[0]}")
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    ("packer", "remedy"),
    [
        ("gzip", "gunzip"),
        ("xz", "unxz"),
        ("xz --format=lzma", "unlzma"),
        ("zstd", "unzstd"),
        ("bzip2", "bunzip2"),
        ("lz4", "unlz4"),
        ("lz4 -l", "unlz4"),
    ],
)
def test_what_is_compressed_is_known_and_its_remedy_makes_the_image(
    area: Path, packer: str, remedy: str
) -> None:
    image, packed = make_plain(area / "disk.img", 8192), area / "packed"
    packed.write_bytes(run(*packer.split(), "-c", image))
    found = recognized(beginning(packed))
    assert found is not None
    assert found.remedy == remedy
    with packed.open("rb") as file:
        unpacked = subprocess.run([remedy, "-c"], stdin=file, check=True, capture_output=True)
    assert unpacked.stdout == image.read_bytes()


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        (["qcow2"], "a qcow2 image"),
        (["qed"], "a QED image"),
        (["vmdk"], "a VMDK image"),
        (["vmdk", "-o", "subformat=monolithicFlat"], "the description of a VMDK image"),
        (["vhdx"], "a VHDX image"),
        (["vpc"], "a VHD image"),
        (["vdi"], "a VDI image"),
        (["parallels"], "a Parallels image"),
    ],
    ids=lambda value: "-".join(value[::2]) if isinstance(value, list) else None,
)
def test_the_formats_of_virtual_machines_are_known_and_converted(
    area: Path, format_: list[str], name: str
) -> None:
    image, raw = make_gpt(area / "disk.img"), area / "raw.img"
    run("qemu-img", "convert", "-f", "raw", "-O", *format_, image, area / "packed")
    found = recognized(beginning(area / "packed"))
    assert found is not None
    assert found.name == name
    run(*found.remedy.split(), area / "packed", raw)
    assert raw.read_bytes()[: 4 * MIB] == image.read_bytes()
    assert recognized(beginning(raw)) is None


def test_a_tar_archive_is_known(area: Path) -> None:
    make_plain(area / "disk.img")
    run("tar", "-C", area, "-cf", area / "disk.tar", "disk.img")
    found = recognized(beginning(area / "disk.tar"))
    assert found is not None
    assert found.remedy == "tar -x"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        # As in AOSP's libsparse: magic, version, lengths of the headers, of a block, numbers.
        (
            struct.pack("<IHHHHIIII", 0xED26FF3A, 1, 0, 28, 12, 4096, 8, 1, 0),
            "an Android sparse image",
        ),
        # As in PKWARE's APPNOTE, of a file that is stored.
        (struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, 0, 0, 0, 8, 0), "a zip archive"),
        # As in 7zFormat.txt.
        (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24), "a 7z archive"),
        (b"Rar!\x1a\x07\x01\0", "a rar archive"),
        # As in the manual of lzip.
        (b"LZIP\x01\x17", "compressed by lzip"),
        (b"\x89LZO\0\r\n\x1a\n", "compressed by lzop"),
        # As VMware's technical note has it, of a sparse disk of an ESX server.
        (b"COWD" + struct.pack("<II", 1, 3), "a VMDK image"),
        (b"WithoutFreeSpace" + struct.pack("<I", 2), "a Parallels image"),
        (b"partclone-image0002", "a partclone image"),
        (b"EVF\x09\x0d\x0a\xff\0\1\1\0\0\0", "an EnCase image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_known_by_their_documented_headers(header: bytes, name: str) -> None:
    found = recognized(header.ljust(8192, b"\0"))
    assert found is not None
    assert found.name == name


def test_images_are_taken_for_nothing_else(area: Path) -> None:
    for make in (make_plain, make_gpt, make_mbr, make_ext4):
        assert recognized(beginning(make(area / make.__name__))) is None
    assert recognized(beginning(make_sparse(area / "sparse", MIB))) is None
    assert recognized(b"") is None
    # A VHD of a fixed size has its magic at its end only, and is an image as it is.
    image = make_gpt(area / "fixed.vhd")
    with image.open("ab") as file:
        file.write(b"conectix".ljust(512, b"\0"))
    assert recognized(beginning(image)) is None
