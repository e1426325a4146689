# SPDX-License-Identifier: LGPL-2.1-or-later
"""What udev is told of a device: that it is spelled as udev's own blkid would spell it."""

import ctypes
import os

import pytest

from loopd.daemon.host.udev_links import describe, encode, renamed
from loopd.loop.backing_file import FileIdentity

FILE = FileIdentity(device=os.makedev(254, 1), inode=1234)
WITHOUT_A_NAME = "LOOPD_LINKS=1\nID_LOOP_BACKING_DEVICE=254:1\nID_LOOP_BACKING_INODE=1234\n"


def test_a_name_is_spelled_as_libblkid_spells_it() -> None:
    library = ctypes.CDLL("libblkid.so.1")
    wrong = []
    for char in filter(str.isprintable, map(chr, (*range(0x11000), 0x1F600))):
        buffer = ctypes.create_string_buffer(64)
        library.blkid_encode_string(char.encode(), buffer, ctypes.c_size_t(64))
        if buffer.value.decode() != encode(char):
            wrong.append(char)
    assert wrong == []


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (b"disk", 'ID_LOOP_BACKING_FILENAME="disk"\nID_LOOP_BACKING_FILENAME_ENC=disk\n'),
        (
            b'"a" b/c\\',
            r"""ID_LOOP_BACKING_FILENAME=""a" b/c\"
ID_LOOP_BACKING_FILENAME_ENC=\x22a\x22\x20b\x2fc\x5c
""",
        ),
        (
            "größe".encode(),
            'ID_LOOP_BACKING_FILENAME="größe"\nID_LOOP_BACKING_FILENAME_ENC=größe\n',
        ),
        *(
            (reference, "")
            for reference in (b"", b".", b"..", b"\xff", b"a\nb", "a\u2028b".encode(), b"\0")
        ),
    ],
)
def test_a_device_is_described_by_its_file_and_a_name_that_may_be_one(
    reference: bytes, name: str
) -> None:
    assert describe(FILE, reference) == WITHOUT_A_NAME + name
    assert renamed(describe(FILE, b"former"), reference) == WITHOUT_A_NAME + name
