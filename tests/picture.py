# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draws docs/window.png: `python -m tests.picture`, as root, with the packages of `make check`."""

import os
import shutil
import struct
import zlib

from tests.harness.area import CHECKOUT, area
from tests.harness.images import MIB, make_ext4, make_gpt, make_sparse
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.window import Window, x_server
from tests.harness.world import USER, make_world

PICTURE = CHECKOUT / "docs" / "window.png"


def main() -> None:
    """Show some images, one of which cannot be written to."""
    with (
        area("pictures") as images,
        make_world(authority=RULES_ALLOW_ALL) as world,
        world.test(),
        x_server(images) as display,
    ):
        shutil.chown(images, USER)
        os.truncate(make_gpt(images / "raspberry-pi.img", owner=USER), 1900 * MIB)
        make_ext4(images / "backup.ext4", 768 * MIB, owner=USER)
        make_sparse(images / "debian-12.iso", 650 * MIB, mode=0o444)
        names = ["raspberry-pi.img", "backup.ext4", "debian-12.iso"]
        with Window(world.bus, display, USER, images, *(images / each for each in names)) as window:
            for name in names:
                window.do("wait", name)
            width, height = window.do("drawn")
            PICTURE.write_bytes(png((images / "Xvfb_screen0").read_bytes(), width, height))


def png(xwd: bytes, width: int, height: int) -> bytes:
    """The upper left part of a screen that Xvfb has written down."""
    header = struct.unpack_from(">25I", xwd)
    size, line, colours = header[0], header[12], header[19]
    start = size + 12 * colours
    rows = bytearray()
    for y in range(height):
        row = xwd[start + y * line :][: 4 * width]
        colour = bytearray(3 * width)
        colour[0::3], colour[1::3], colour[2::3] = row[2::4], row[1::4], row[0::4]
        rows += b"\0" + colour
    chunks = {
        b"IHDR": struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(rows), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


if __name__ == "__main__":
    main()
