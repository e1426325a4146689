# SPDX-License-Identifier: LGPL-2.1-or-later
"""The byte stream from the bus, cut into messages whose headers are read and whose fds are theirs.

Pure: it reads no socket and parses no body. A message over the size cap is judged by its header
and skipped, so that no client can make the daemon hold or parse it; one of a muted sender is
skipped before anything but the sender is looked at.
"""

import re
import struct
from collections.abc import Collection
from dataclasses import dataclass, field

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED = 0x1
ALLOW_INTERACTIVE_AUTHORIZATION = 0x4

Bytes = bytes | memoryview

_FIXED = 16
_LONGEST = 1 << 27
_LITTLE = struct.Struct("<3xBI4xI").unpack_from
_BIG = struct.Struct(">3xBI4xI").unpack_from
# The sender, after fields of any meaning with the types that fields have. The lengths of strings
# need no reading, because the bus lets no NUL into one. Matched in C: 0.7 us, against 3.7 us to
# read the header, while a bus passes on up to 240,000 messages a second of whoever floods it.
_VALUE = rb"\x01(?:[so]\0.{4}[^\0]*+\0++|g\0.[^\0]*+\0++|u\0.{4})"
_SENDER = re.compile(
    rb"(?:[\x01-\x06\x08-\xff]" + _VALUE + rb")*\x07\x01s\0.{4}([^\0]*+)", re.DOTALL
)
# All fields of a message that is sent to no one connection.
_BROADCAST = re.compile(rb"(?:[\x01-\x05\x07-\xff]" + _VALUE + rb")*+", re.DOTALL)
# Names have at most 255 bytes each; only a hostile path makes a header longer than this.
_MAX_FIELDS = 16 * 1024
_STRING_FIELDS = {
    1: "path",
    2: "interface",
    3: "member",
    4: "error_name",
    6: "destination",
    7: "sender",
    8: "signature",
}
_NUMBER_FIELDS = {5: "reply_serial", 9: "unix_fds"}


class MalformedHeader(Exception):
    """The header is not one that a bus lets through."""


class MalformedStream(Exception):
    """The stream cannot be cut any further; the connection is lost."""


@dataclass(slots=True)
class Header:
    """What stands in a message's header."""

    type: int
    flags: int
    serial: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    unix_fds: int = 0


@dataclass(slots=True)
class Frame:
    """A message as it came in."""

    header: Header | None
    """None if even the header is over the cap or malformed, or nobody wants to hear the sender."""
    data: bytes
    """The whole message; empty if it is over the cap."""
    fds: list[int] = field(default_factory=list)
    fds_lost: bool = False
    """The fds did not all arrive: our table of open files is full, or they were not wanted."""
    sender: str = ""
    """As in the header, known also where that is none for being muted."""
    muted: bool = False
    """It is there for its fds only."""


def read_header(data: bytes | bytearray, end: int) -> Header:
    """Read the header of a message whose header fields end at `end`.

    Raises MalformedHeader.
    """
    order = "<" if data[0] == 0x6C else ">"
    unpack_u32 = struct.Struct(order + "I").unpack_from
    header = Header(type=data[1], flags=data[2], serial=unpack_u32(data, 8)[0])
    position = _FIXED
    try:
        while position < end:
            position = (position + 7) & ~7
            code, length = data[position], data[position + 1]
            kind = data[position + 2 : position + 2 + length]
            position += 3 + length
            if kind == b"g":
                size, position = data[position], position + 1
                text = data[position : position + size]
                position += size + 1
            elif kind in (b"s", b"o"):
                position = (position + 3) & ~3
                size = unpack_u32(data, position)[0]
                position += 4
                text = data[position : position + size]
                position += size + 1
            elif kind == b"u":
                position = (position + 3) & ~3
                if code in _NUMBER_FIELDS:
                    setattr(header, _NUMBER_FIELDS[code], unpack_u32(data, position)[0])
                position += 4
                continue
            else:
                raise MalformedHeader(f"field {code} has the type {kind!r}")
            if code in _STRING_FIELDS:
                setattr(header, _STRING_FIELDS[code], text.decode())
    except (IndexError, struct.error, UnicodeDecodeError) as exc:
        raise MalformedHeader(str(exc)) from exc
    if position > end:
        raise MalformedHeader("the last field is cut off")
    return header


class Reader:
    """Cuts the stream. Feed it what recvmsg gave, in order.

    Messages of a sender in `muted` are skipped whole; the set may change at any time. So are those
    of types that are not in `types`, and signals that are sent to one connection if it hears only
    `broadcasts`.
    """

    def __init__(
        self,
        max_message: int,
        muted: Collection[bytes] = frozenset(),
        types: Collection[int] = (METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL),
        *,
        broadcasts: bool = False,
    ) -> None:
        self._max_message = max_message
        self._muted = muted
        self._types = types
        self._broadcasts = broadcasts
        self._buffer = bytearray()
        self._skip = 0
        self._skipped = Frame(None, b"")
        self._fds: list[int] = []
        self._fds_lost = False

    def feed(self, data: Bytes, fds: list[int], *, fds_lost: bool = False) -> list[Frame]:
        """Take a piece of the stream and give the messages that are complete now.

        The kernel ends a read after the piece that carries fds, so they belong to the message that
        begins last in it. Raises MalformedStream.
        """
        frames: list[Frame] = []
        try:
            last = self._cut(data, frames)
        except MalformedStream:
            # The messages before it are lost with the connection, and somebody has to close these.
            self._fds += [fd for frame in frames for fd in frame.fds] + fds
            raise
        if last is None:
            self._fds += fds
            self._fds_lost |= fds_lost
        else:
            last.fds += fds
            last.fds_lost |= fds_lost
        return [frame for frame in frames if frame.fds or not frame.muted]

    def take_fds(self) -> list[int]:
        """The fds of a message that will never be complete, to be closed."""
        fds, self._fds = self._fds, []
        if self._skip:
            fds, self._skipped.fds = self._skipped.fds, []
        return fds

    def last_sender(self, data: Bytes) -> str:
        """Who sends the message that begins last, if this piece comes next; empty if unknown."""
        start, size = self._skip, len(data)
        if start >= size:
            return self._skipped.sender
        if self._buffer:
            data = bytes(self._buffer) + data
            size = len(data)
        begun, end = -1, 0
        while size - start >= _FIXED and data[start] in (0x6C, 0x42):
            _, body, fields = (_LITTLE if data[start] == 0x6C else _BIG)(data, start)
            begun, end = start, start + _FIXED + fields
            start += ((_FIXED + fields + 7) & ~7) + body
        if start < size or begun < 0 or end > size:
            return ""
        return _name(_SENDER.match(data, begun + _FIXED, end))

    def _cut(self, data: Bytes, frames: list[Frame]) -> Frame | None:
        """Append the frames that are complete, and return that of the message which began last.

        None means that this one is still to come. Of muted senders there are only frames that have
        fds, and the last. Every message that anybody sends comes by here, and a flood of them is
        only as harmless as this loop is quick.
        """
        last: Frame | None = None
        if self._skip:
            last, skipped = self._skipped, min(self._skip, len(data))
            self._skip -= skipped
            if self._skip:
                return last
            data = data[skipped:]
            frames.append(last)
        buffer, muted, types = self._buffer, self._muted, self._types
        buffer += data
        start, size = 0, len(buffer)
        unheard = (0, 0)
        while size - start >= _FIXED:
            if buffer[start] == 0x6C:
                version, body, fields = _LITTLE(buffer, start)
            elif buffer[start] == 0x42:
                version, body, fields = _BIG(buffer, start)
            else:
                raise MalformedStream("not a D-Bus message")
            if version != 1:
                raise MalformedStream("not a D-Bus message")
            end = start + _FIXED + fields
            total = ((_FIXED + fields + 7) & ~7) + body
            if total > _LONGEST:
                raise MalformedStream("a message is longer than D-Bus allows")
            if size < end and (fields <= _MAX_FIELDS or total <= self._max_message):
                break  # its sender may still be to come
            span, kind = (start + _FIXED, min(end, size)), buffer[start + 1]
            skips = kind not in types
            if kind == SIGNAL and self._broadcasts and not skips:
                skips = not _BROADCAST.fullmatch(buffer, *span)
            # Only while somebody is muted: the search costs as much as the rest of this loop.
            if muted and not skips:
                sender = _SENDER.match(buffer, *span)
                # A bus always says who sends, or the header is one that nobody can read.
                skips = sender is None or sender[1] in muted
            if skips:
                last, unheard = None, span
                if self._fds or self._fds_lost:
                    frames.append(self._with_fds(_unheard(buffer, span)))
            elif total > self._max_message:
                known = fields <= _MAX_FIELDS
                last = self._with_fds(_framed(self._header(start, end) if known else None, b""))
                frames.append(last)
            elif size - start < total:
                break
            else:
                message = bytes(buffer[start : start + total])
                last = self._with_fds(_framed(_parsed(message, end - start), message))
                frames.append(last)
            start += total
        if start < size:
            del buffer[:start]
            return None
        if last is None:
            last = _unheard(buffer, unheard)
            frames.append(last)
        buffer.clear()
        if start > size:
            self._skip, self._skipped = start - size, last
            frames.pop()
        return last

    def _header(self, start: int, end: int) -> Header | None:
        return _parsed(bytes(self._buffer[start:end]), end - start)

    def _with_fds(self, frame: Frame) -> Frame:
        frame.fds, self._fds = self._fds, []
        frame.fds_lost, self._fds_lost = self._fds_lost, False
        return frame


def _framed(header: Header | None, data: bytes) -> Frame:
    return Frame(header, data, sender=header.sender if header else "")


def _unheard(buffer: bytearray, fields: tuple[int, int]) -> Frame:
    return Frame(None, b"", sender=_name(_SENDER.match(buffer, *fields)), muted=True)


def _name(sender: re.Match[bytes] | None) -> str:
    return sender[1].decode(errors="replace") if sender else ""


def _parsed(data: bytes, end: int) -> Header | None:
    try:
        return read_header(data, end)
    except MalformedHeader:
        return None
