# SPDX-License-Identifier: LGPL-2.1-or-later
"""The targets: each takes any bytes, and does to loopd what a hostile sender could.

An input is mostly the bytes that loopd is to read; how they are cut or where they are put is in the
first few, so that a mutation changes one thing at a time.
"""

import contextlib
import gc
import itertools
import os
import struct
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from loopd.bus import codec, frame
from loopd.daemon.server import options
from loopd.errors import Failed, InvalidArgs, LoopError
from loopd.loop import block_device, kernel, partition_table
from tests.fuzz.validity import is_valid

# --- the byte stream from the bus ---------------------------------------------------------------

CAP = 1024
"""The size cap of the reader, small so that small inputs pass it."""
_PIECES = 16
# No two messages end in one of these, so that a reader fed by them has told of every message
# before it finds the stream malformed.
_SMALL_PIECE = 16
# A header may be longer than a message is allowed to be, and is kept until it is whole.
_MOST_KEPT = 16 * 1024 + 16
_TAIL_PIECE = 8192
_SLACK = 4096


def stream(data: bytes) -> None:
    """The stream reader: a count, so many cuts with a number of fds each, and the stream."""
    count, data = _first(data) % _PIECES, data[1:]
    cuts, bytes_in = data[: 2 * count], data[2 * count :]
    pieces = list(_pieces(bytes_in, cuts))
    expected, malformed = _read([(each, []) for each in _equal_pieces(bytes_in)])[:2]

    seen, malformed_too, left = _read(pieces)
    # What comes before the fault in one piece with it is lost, like the connection.
    assert malformed_too == malformed, "how it is cut decides whether it is malformed"
    assert len(seen) == len(expected) or malformed, "how it is cut decides how many messages are in"
    for found, wanted in zip(seen, expected, strict=False):
        assert (found.header, found.data) == (wanted.header, wanted.data), "a cut changes a message"
    _check_fds(seen, left, pieces, malformed)


def header(data: bytes) -> None:
    """A header alone, and a length that may lie."""
    end, message = _first(data) * 8, data[1:]
    if len(message) < 16:
        return
    try:
        read = frame.read_header(message, end)
    except frame.MalformedHeader:
        return
    for name in ("path", "interface", "member", "error_name", "destination", "sender", "signature"):
        text = getattr(read, name)
        assert isinstance(text, str)
        # It is put into answers and logs.
        text.encode()
    assert 0 <= read.reply_serial < 1 << 32
    assert 0 <= read.unix_fds < 1 << 32


def _first(data: bytes) -> int:
    return data[0] if data else 0


def _pieces(stream: bytes, cuts: bytes) -> Iterator[tuple[bytes, list[int]]]:
    """The stream as recvmsg might give it, fds with each piece by its cut."""
    numbers = itertools.count(1000)
    for length, fds in zip(cuts[::2], cuts[1::2], strict=False):
        piece, stream = stream[: 4 * length + 1], stream[4 * length + 1 :]
        if piece:
            yield piece, [next(numbers) for _ in range(fds % 4)]
    if stream:
        yield stream, [next(numbers)]


def _equal_pieces(stream: bytes) -> Iterator[bytes]:
    for start in range(0, len(stream), _SMALL_PIECE):
        yield stream[start : start + _SMALL_PIECE]


def _read(
    pieces: list[tuple[bytes, list[int]]],
) -> tuple[list[frame.Frame], bool, list[int]]:
    """The messages in the pieces, whether these are malformed, and the fds of what is not whole."""
    reader = frame.Reader(CAP)
    frames: list[frame.Frame] = []
    try:
        for piece, fds in pieces:
            frames += reader.feed(piece, list(fds))
            _require_small(reader, len(piece))
    except frame.MalformedStream:
        return frames, True, reader.take_fds()
    left = reader.take_fds()
    assert reader.take_fds() == [], "the fds of an incomplete message can be taken twice"
    # Whatever has been begun, what comes now is not kept for ever.
    with contextlib.suppress(frame.MalformedStream):
        for _ in range(8):
            reader.feed(bytes(_TAIL_PIECE), [])
            _require_small(reader, _TAIL_PIECE)
    return frames, False, left


def _require_small(reader: frame.Reader, piece: int) -> None:
    assert _held(reader) <= max(CAP, _MOST_KEPT) + piece + _SLACK, (
        "more is kept than the cap allows"
    )


def _held(thing: object) -> int:
    """The bytes of what an object keeps alive, whatever it calls that."""
    seen: set[int] = set()
    waiting, size = [thing], 0
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | ModuleType):
            continue
        seen.add(id(each))
        if isinstance(each, bytes | bytearray):
            # What was freed at the front of a bytearray may still be allocated.
            size += len(each)
        else:
            size += sys.getsizeof(each, 0)
            waiting += gc.get_referents(each)
    return size


def _check_fds(
    frames: list[frame.Frame],
    left: list[int],
    pieces: list[tuple[bytes, list[int]]],
    malformed: bool,
) -> None:
    """Fail unless each fd is with the message that the last byte of its piece belongs to."""
    given = [fd for each in frames for fd in each.fds] + left
    assert len(given) == len(set(given)), "an fd is there twice"
    if malformed:
        return
    stream = b"".join(piece for piece, _ in pieces)
    ends = list(_ends(stream))
    wanted: list[list[int]] = [[] for _ in range(len(ends) + 1)]
    position = 0
    for piece, fds in pieces:
        position += len(piece)
        owner = next((index for index, end in enumerate(ends) if position <= end), len(ends))
        wanted[owner] += fds
    assert [each.fds for each in frames] == wanted[:-1], "an fd is with another message"
    assert left == wanted[-1], "an fd of an incomplete message is lost"


def _ends(stream: bytes) -> Iterator[int]:
    """Where the whole messages of a stream end, by the specification."""
    at = 0
    while len(stream) - at >= 16:
        order = "<" if stream[at : at + 1] == b"l" else ">"
        body, _, fields = struct.unpack_from(f"{order}III", stream, at + 4)
        at += 16 + fields + -fields % 8 + body
        if at > len(stream):
            return
        yield at


# --- options ------------------------------------------------------------------------------------

_SIGNATURE = "a{sv}"
_DECODERS: tuple[Callable[[dict[str, Any]], object], ...] = (
    options.attach_options,
    options.resize_options,
    options.detach_options,
    options.no_options,
    lambda given: options.open_options("r", given),
)


def decoder(data: bytes) -> None:
    """The options of each method: a byte for the byte order, and the body of the message."""
    big, body = _first(data) % 2 == 1, data[1:]
    message = _message(body, big=big)
    (read,) = frame.Reader(1 << 20).feed(message, [])
    assert read.header is not None
    assert read.header.signature == _SIGNATURE
    valid = is_valid(_SIGNATURE, body, big=big)
    if not valid and codec.LIBRARY == "dbus_fast":
        # A variant of no type, which no bus lets through, ends the interpreter.
        return
    try:
        arguments = codec.parse(message).body
    except codec.MalformedMessage:
        assert not valid, "what a bus lets through cannot be read"
        return
    if not body:
        # Both libraries say so, whatever the signature is.
        assert arguments == []
        return
    (given,) = arguments
    for decode in _DECODERS:
        with contextlib.suppress(LoopError):
            decode(dict(given))
    for value in given.values():
        _decode_argument(value.value)


def _decode_argument(value: object) -> None:
    """The arguments that are checked as options are."""
    if isinstance(value, str):
        for check in (options.lock_kind, options.reference):
            with contextlib.suppress(LoopError):
                check(value)
        with contextlib.suppress(LoopError):
            options.open_options(value, {})
    elif isinstance(value, int) and 0 <= value < 1 << 32:
        with contextlib.suppress(LoopError):
            size = options.sector_size(value)
            assert size is None or (size >= 512 and size & (size - 1) == 0)


def _message(body: bytes, *, big: bool) -> bytes:
    """A call whose body is said to be an a{sv}."""
    order = ">" if big else "<"
    fields = b"\x08\x01g\0" + bytes([len(_SIGNATURE)]) + _SIGNATURE.encode() + b"\0"
    for code, kind, text in ((1, "o", "/"), (3, "s", "M"), (2, "s", "a.b"), (7, "s", ":1.1")):
        fields += bytes(-len(fields) % 8) + bytes([code, 1]) + kind.encode() + b"\0"
        fields += struct.pack(order + "I", len(text)) + text.encode() + b"\0"
    start = struct.pack(
        f"{order}cBBBIII", b"B" if big else b"l", 1, 0, 1, len(body), 1, len(fields)
    )
    return start + fields + bytes(-len(fields) % 8) + body


# --- the sector size of an image ----------------------------------------------------------------

_IMAGE = 16 * 1024
_STEP = 64
_PAGE = os.sysconf("SC_PAGE_SIZE")


def gpt(data: bytes) -> None:
    """The probe for a GPT: where the image starts, its size, and patches on what is all zeroes.

    A patch is a place, a length and so many bytes.
    """
    start, size, patches = _first(data) % 16 * 512, _first(data[1:2]) * _STEP, data[2:]
    image = bytearray(_IMAGE)
    while patches:
        place, length = _first(patches) * _STEP, _first(patches[1:2])
        patch = patches[2 : 2 + length][: _IMAGE - place]
        image[place : place + len(patch)] = patch
        patches = patches[2 + length :]
    content = bytes(image)[: size or _IMAGE]
    reads: list[tuple[int, int]] = []

    def preadv(fd: int, buffer: Any, offset: int) -> int:
        reads.append((offset, offset + len(buffer)))
        return os.preadv(fd, [buffer], offset)

    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, content, 0)
        with mock.patch.object(kernel, "preadv", preadv):
            wanted = _gpt_sizes(content[start:])
            try:
                found = block_device.probe_sector_size(fd, start)
            except InvalidArgs:
                assert len(wanted) > 1, "refused for no reason"
            else:
                assert wanted == ([] if found is None else [found]), "another sector size is right"
    finally:
        os.close(fd)
    for begin, end in reads:
        # The two sectors of the largest size, widened to whole pages.
        assert start - _PAGE < begin, "reads before the image"
        assert end < start + 2 * 4096 + _PAGE, "reads more than the headers"


def _gpt_sizes(image: bytes) -> list[int]:
    """The sector sizes for which the second sector is a GPT header, by the UEFI specification."""
    found = []
    for size in (512, 1024, 2048, 4096):
        at = image[size : size + 32]
        if (
            len(at) == 32
            and at[:12] == b"EFI PART\0\0\1\0"
            and 92 <= int.from_bytes(at[12:16], "little") <= 4096
            and int.from_bytes(at[24:32], "little") == 1
        ):
            found.append(size)
    return found


# --- what the child that reads partition tables says --------------------------------------------


def partitions(data: bytes) -> None:
    """The check of the child's answer: the sector size, the size of the device, the answer."""
    sector_size, size = 512 << _first(data) % 4, int.from_bytes(data[1:7], "little")
    try:
        found = partition_table.check(data[7:], size=size, sector_size=sector_size)
    except Failed:
        return
    assert list(found) == sorted(found), "they are in no order"
    assert all(1 <= number <= 255 for number in found), "the kernel has no such number"
    for number, each in found.items():
        if each is None:
            continue
        assert each.number == number, "it has another number"
        assert each.start >= 0, "begins before the device"
        assert each.size > 0, "is empty"
        assert each.start + each.size <= size, "ends behind the device"
        assert each.start % sector_size == each.size % sector_size == 0, "is between sectors"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "stream": stream,
    "header": header,
    "options": decoder,
    "gpt": gpt,
    "partitions": partitions,
}
