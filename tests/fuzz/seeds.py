# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inputs made by hand, from which a fuzzer starts: the usual, and what is just not."""

import struct
from collections.abc import Iterator
from typing import Any

from tests.harness.wire import Variant, build, marshal


def _call(length: int = 0, **fields: Any) -> bytes:
    """A call with a string of so many bytes, as the bus passes it on."""
    given: dict[str, Any] = {
        "serial": 5,
        "path": "/a",
        "interface": "b.c",
        "member": "D",
        "destination": "e.f",
        "signature": "s",
        "body": marshal("s", ["x" * length]),
        "extra_fields": [(7, Variant("s", ":1.7"))],
    }
    return build(**given | fields)


_SMALLEST = bytes.fromhex("42010001000000000000000100000000")


def _streams() -> Iterator[bytes]:
    for cuts in (b"", b"\x05\1\0\2", b"\x20\1\x20\2\x20\3", b"\x3f\1"):
        for messages in (
            _call(),
            _call() + _call(3),
            _call(1500) + _call(),
            _call(800, unix_fds=2) + _call(100) + _call(2000),
            _SMALLEST * 3,
            _call(type=4) + _SMALLEST + _call(flags=1),
            _call(endian=">", body=marshal("s", ["big"], ">")),
            _call() + b"no message at all",
            _call(path="/" + "x" * 2000) + _call(),
        ):
            yield bytes([len(cuts) // 2]) + cuts + messages


def _headers() -> Iterator[bytes]:
    for message in (
        _call(),
        _call(unix_fds=3),
        _call(reply_serial=4, error_name="a.b"),
        _SMALLEST,
        _call(extra_fields=[(10, Variant("u", 3)), (20, Variant("s", "x"))]),
        _call(extra_fields=[(30, Variant("t", 3))]),
        _call(path="/\0", member="\U0010ffff"),
        _call().replace(b"b.c", b"\xff\xfe\xfd"),
    ):
        (fields,) = struct.unpack_from("<I", message, 12)
        for end in ((16 + fields + 7) // 8, 3, 20, 255):
            yield bytes([end]) + message


def _options() -> Iterator[bytes]:
    for given in (
        {},
        {"read-only": Variant("b", True), "offset": Variant("t", 512)},
        {"size-limit": Variant("t", 1 << 63), "sector-size": Variant("u", 4096)},
        {"partition-scan": Variant("b", False), "direct-io": Variant("b", True)},
        {"reference": Variant("s", "name"), "lock": Variant("s", "shared")},
        {"lifetime": Variant("s", "connection"), "allow-overlap": Variant("b", True)},
        {"lifetime": Variant("s", "user"), "number": Variant("u", 7)},
        {"number": Variant("u", 1 << 31)},
        {"reference": Variant("s", "x" * 70)},
        {"reference": Variant("s", "\x85é")},
        {"offset": Variant("t", 1)},
        {"offset": Variant("s", "%d")},
        {"offset": Variant("v", Variant("t", 512))},
        {"offset": Variant("a{sv}", {"offset": Variant("h", 0)})},
        {"size-limit": Variant("as", [])},
        {"sector-size": Variant("u", 0)},
        {"sector-size": Variant("u", 768)},
        {"sector-size": Variant("d", 1.5)},
        {"reference": Variant("ay", b"abc"), "lock": Variant("g", "a{sv}")},
        {"lazy": Variant("b", True)},
        {"force": Variant("b", True), "offset": Variant("t", 0)},
        {"partition": Variant("u", 1)},
        {"x": Variant("(ixo)", (1, -2, "/a"))},
        {"mode": Variant("s", "rw"), "n": Variant("n", -3), "q": Variant("q", 7)},
    ):
        for first, endian in ((b"\0", "<"), (b"\1", ">")):
            yield first + marshal("a{sv}", [given], endian)
    yield b"\0" + bytes(8)
    yield b"\0" + marshal("a{sv}", [{"lazy": Variant("b", True)}])[:-1]


def _gpt(
    size: int = 92, *, revision: int = 0x10000, sector: int = 1, signature: bytes = b"EFI PART"
) -> bytes:
    return struct.pack("<8sII8xQ", signature, revision, size, sector)


def _images() -> Iterator[bytes]:
    def image(start: int, size: int, *patches: tuple[int, bytes]) -> bytes:
        placed = ((start * 512 + place, patch) for place, patch in patches)
        return bytes([start, size]) + b"".join(
            bytes([place // 64, len(patch)]) + patch for place, patch in placed
        )

    for start in (0, 1, 9):
        yield image(start, 0)
        for sector in (512, 1024, 2048, 4096):
            for size in (0, 255, 8):
                yield image(start, size, (sector, _gpt()))
    for wrong in (
        _gpt(91),
        _gpt(4097),
        _gpt(revision=0x10001),
        _gpt(sector=2),
        _gpt(signature=b"EFI PARS"),
        _gpt()[:-8] + b"\1\1\0\0\0\0\0\0",
    ):
        yield image(0, 0, (512, wrong))
    yield image(0, 0, (512, _gpt()), (4096, _gpt()))
    yield image(0, 0, (512, _gpt(sector=9)), (2048, _gpt()))


def _answers() -> Iterator[bytes]:
    sectors = 2048
    for sector_size in (0, 3):
        for answer in (
            b"",
            b"1 8 8 0\n2 16 8 0\n",
            b"1 8 16 1\n5 9 100 0\n6 24 8 0\n",
            b"256 8 8 0\n255 8 8 0\n0 8 8 0\n-1 8 8 0\n",
            b"1 -8 8 0\n2 8 0 0\n3 8 -8 0\n",
            b"1 2040 8 0\n2 2040 9 0\n3 2040 16 0\n4 4096 8 0\n",
            b"1 9 8 0\n2 8 9 0\n",
            b"1 8 8 0\n1 16 8 0\n",
            b"1 2 3\n",
            b"x",
            b"\xff\xfe",
            b"1 " + b"9" * 5000 + b" 1 0\n",
            b"1 99999999999999999999999 2 0\n",
        ):
            yield bytes([sector_size]) + (sectors * 512).to_bytes(6, "little") + answer[:4000]


SEEDS = {
    "stream": [*_streams()],
    "header": [*_headers()],
    "options": [*_options()],
    "gpt": [*_images()],
    "partitions": [*_answers()],
}
"""By the target."""
