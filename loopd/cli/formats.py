# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that are no images as they are, but compressed, packed or in a virtual machine's format.

Pure: a table of the bytes that such files begin with, and of what makes an image of them.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """A format whose bytes are not those of a disk."""

    name: str
    """To follow "seems to be"."""
    remedy: str
    """The command that makes an image of such a file."""


_CONVERT = "qemu-img convert -O raw"
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b\x08", "compressed by gzip", "gunzip"),
    (0, b"\xfd7zXZ\0", "compressed by xz", "unxz"),
    (0, b"\x5d\0\0\x80\0" + b"\xff" * 8, "compressed by lzma", "unlzma"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd"),
    (4, b"1AY&SY", "compressed by bzip2", "bunzip2"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4", "unlz4"),
    (0, b"\x02\x21\x4c\x18", "compressed by lz4", "unlz4"),
    (0, b"LZIP\x01", "compressed by lzip", "lzip -d"),
    (0, b"\x89LZO\0\r\n\x1a\n", "compressed by lzop", "lzop -d"),
    (0, b"PK\x03\x04", "a zip archive", "unzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
    (0, b"Rar!\x1a\x07", "a rar archive", "unrar x"),
    (257, b"ustar", "a tar archive", "tar -x"),
    (0, b"QFI\xfb", "a qcow2 image", _CONVERT),
    (0, b"QED\0", "a QED image", _CONVERT),
    (0, b"KDMV", "a VMDK image", _CONVERT),
    (0, b"COWD", "a VMDK image", _CONVERT),
    (0, b"# Disk DescriptorFile", "the description of a VMDK image", _CONVERT),
    (0, b"vhdxfile", "a VHDX image", _CONVERT),
    # A dynamic one. One of a fixed size has this at its end only, and can be used as it is.
    (0, b"conectix", "a VHD image", _CONVERT),
    (64, b"\x7f\x10\xda\xbe", "a VDI image", _CONVERT),
    (0, b"WithoutFreeSpace", "a Parallels image", _CONVERT),
    (0, b"WithouFreSpacExt", "a Parallels image", _CONVERT),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image", "simg2img"),
    (0, b"partclone-image", "a partclone image", "partclone.restore -C"),
    (0, b"EVF\x09\x0d\x0a\xff\0", "an EnCase image", "ewfexport"),
)


def recognized(beginning: bytes) -> Format | None:
    """The format of a file that begins with these bytes; None if it may be an image as it is."""
    for offset, magic, name, remedy in _MAGIC:
        if beginning.startswith(magic, offset):
            return Format(name, remedy)
    return None
