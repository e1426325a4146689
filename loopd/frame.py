# SPDX-License-Identifier: LGPL-2.1-or-later
"""The byte stream from the bus, cut into messages whose headers are read and whose fds are theirs.

Pure: it reads no socket and parses no body. A message over the size cap is judged by its header
and skipped, so that no client can make the daemon hold or parse it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED = 0x1
ALLOW_INTERACTIVE_AUTHORIZATION = 0x4

_FIXED = 16
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
    """None if even the header is over the cap or malformed."""
    data: bytes
    """The whole message; empty if it is over the cap."""
    fds: list[int] = field(default_factory=list)
    fds_lost: bool = False
    """The fds did not all arrive: our table of open files is full."""


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
    """Cuts the stream. Feed it what recvmsg gave, in order."""

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._buffer = bytearray()
        self._skip = 0
        self._skipped = Frame(None, b"")
        self._fds: list[int] = []
        self._fds_lost = False

    def feed(self, data: bytes, fds: list[int], *, fds_lost: bool = False) -> list[Frame]:
        """Take a piece of the stream and give the messages that are complete now.

        The kernel ends a read after the piece that carries fds, so they belong to the message
        that begins last in it. Raises MalformedStream.
        """
        complete = [*self._cut(data)]
        if self._buffer or self._skip or not complete:
            # The last message is incomplete: they wait for it.
            self._fds += fds
            self._fds_lost |= fds_lost
        else:
            complete[-1].fds += fds
            complete[-1].fds_lost |= fds_lost
        return complete

    def take_fds(self) -> list[int]:
        """The fds of a message that will never be complete, to be closed."""
        fds, self._fds = self._fds, []
        return fds

    def _cut(self, data: bytes) -> Iterator[Frame]:
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
            if self._skip:
                return
            yield self._finish_skipped()
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _FIXED:
            if buffer[start] not in (0x6C, 0x42) or buffer[start + 3] != 1:
                raise MalformedStream("not a D-Bus message")
            order = "<" if buffer[start] == 0x6C else ">"
            body, fields = struct.unpack_from(order + "I4xI", buffer, start + 4)
            end_of_fields = _FIXED + fields
            total = ((end_of_fields + 7) & ~7) + body
            if total > 1 << 27:
                raise MalformedStream("a message is longer than D-Bus allows")
            available = len(buffer) - start
            if total > self._max_message:
                known = fields <= _MAX_FIELDS
                if known and available < end_of_fields:
                    break
                self._skipped = Frame(self._header(start, end_of_fields) if known else None, b"")
                self._skip = max(total - available, 0)
                start += min(total, available)
                if self._skip:
                    break
                yield self._finish_skipped()
                continue
            if available < total:
                break
            message = bytes(buffer[start : start + total])
            start += total
            yield self._with_fds(Frame(self._parse_header(message, end_of_fields), message))
        del buffer[:start]

    def _header(self, start: int, length: int) -> Header | None:
        return self._parse_header(bytes(self._buffer[start : start + length]), length)

    @staticmethod
    def _parse_header(data: bytes, end: int) -> Header | None:
        try:
            return read_header(data, end)
        except MalformedHeader:
            return None

    def _finish_skipped(self) -> Frame:
        frame, self._skipped = self._skipped, Frame(None, b"")
        return self._with_fds(frame)

    def _with_fds(self, frame: Frame) -> Frame:
        frame.fds, self._fds = self._fds, []
        frame.fds_lost, self._fds_lost = self._fds_lost, False
        return frame
