# SPDX-License-Identifier: LGPL-2.1-or-later
"""D-Bus messages as bytes: marshalling of our own, independent of the libraries under test.

marshal() and unmarshal() know every type; an `h` is any unsigned number, nothing checks it.  Arrays
of bytes are bytes, dictionaries dict, structs tuple, variants Variant.  build() makes a message
whose header says exactly what it is told, true or not; parse() reads one back.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED, NO_AUTO_START, ALLOW_INTERACTIVE_AUTHORIZATION = 1, 2, 4
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE, UNIX_FDS = range(
    1, 10
)

_FIXED = {
    "y": "B",
    "b": "I",
    "n": "h",
    "q": "H",
    "i": "i",
    "u": "I",
    "x": "q",
    "t": "Q",
    "d": "d",
    "h": "I",
}
_ALIGNMENT = {"y": 1, "n": 2, "q": 2, "x": 8, "t": 8, "d": 8, "(": 8, "{": 8, "g": 1, "v": 1}
_HEADER_TYPES = {
    PATH: "o",
    INTERFACE: "s",
    MEMBER: "s",
    ERROR_NAME: "s",
    REPLY_SERIAL: "u",
    DESTINATION: "s",
    SENDER: "s",
    SIGNATURE: "g",
    UNIX_FDS: "u",
}


@dataclass(frozen=True)
class Variant:
    """A value with its type, for a `v`."""

    signature: str
    value: Any


class CallError(Exception):
    """The error that answered a call."""

    def __init__(self, name: str, message: str) -> None:
        """Keep the bus name of the error and its text."""
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


def plain(value: Any) -> Any:
    """Return the value with the types of its variants left out."""
    match value:
        case Variant():
            return plain(value.value)
        case dict():
            return {plain(key): plain(each) for key, each in value.items()}
        case list():
            return [plain(each) for each in value]
        case tuple():
            return tuple(plain(each) for each in value)
    return value


def split(signature: str) -> list[str]:
    """Return the complete types that a signature is made of."""
    types, rest = [], signature
    while rest:
        length = _type_length(rest)
        types.append(rest[:length])
        rest = rest[length:]
    return types


def _type_length(signature: str) -> int:
    if signature[0] == "a":
        return 1 + _type_length(signature[1:])
    if signature[0] in "({":
        depth = 0
        for index, letter in enumerate(signature):
            depth += (letter in "({") - (letter in ")}")
            if depth == 0:
                return index + 1
        raise ValueError(f"unbalanced signature {signature!r}")
    return 1


def _padding(length: int, kind: str) -> int:
    return -length % _ALIGNMENT.get(kind, 4)


def marshal(signature: str, values: Sequence[Any], endian: str = "<") -> bytes:
    """Return the bytes of `values`, as they stand at the start of a body."""
    out = bytearray()
    for kind, value in zip(split(signature), values, strict=True):
        _put(out, kind, value, endian)
    return bytes(out)


def _put(out: bytearray, kind: str, value: Any, endian: str) -> None:
    out += bytes(_padding(len(out), kind[0]))
    match kind[0]:
        case "s" | "o":
            data = value.encode()
            out += struct.pack(endian + "I", len(data)) + data + b"\0"
        case "g":
            data = value.encode()
            out += struct.pack("B", len(data)) + data + b"\0"
        case "v":
            _put(out, "g", value.signature, endian)
            _put(out, value.signature, value.value, endian)
        case "(":
            for part, each in zip(split(kind[1:-1]), value, strict=True):
                _put(out, part, each, endian)
        case "{":
            key, content = split(kind[1:-1])
            _put(out, key, value[0], endian)
            _put(out, content, value[1], endian)
        case "a":
            at = len(out)
            out += bytes(4)
            out += bytes(_padding(len(out), kind[1]))
            start = len(out)
            for each in value.items() if isinstance(value, Mapping) else value:
                _put(out, kind[1:], each, endian)
            struct.pack_into(endian + "I", out, at, len(out) - start)
        case letter:
            out += struct.pack(endian + _FIXED[letter], value)


def unmarshal(signature: str, data: bytes, endian: str = "<") -> tuple[Any, ...]:
    """Return the values in a body."""
    reader = _Reader(data, endian)
    return tuple(reader.take(kind) for kind in split(signature))


class _Reader:
    def __init__(self, data: bytes, endian: str) -> None:
        self.data, self.endian, self.at = data, endian, 0

    def align(self, kind: str) -> None:
        self.at += _padding(self.at, kind)

    def fixed(self, letter: str) -> Any:
        (value,) = struct.unpack_from(self.endian + letter, self.data, self.at)
        self.at += struct.calcsize(letter)
        return value

    def text(self, length: int) -> str:
        value = self.data[self.at : self.at + length].decode()
        self.at += length + 1
        return value

    def take(self, kind: str) -> Any:
        self.align(kind[0])
        match kind[0]:
            case "s" | "o":
                return self.text(self.fixed("I"))
            case "g":
                return self.text(self.fixed("B"))
            case "v":
                signature = self.take("g")
                return Variant(signature, self.take(signature))
            case "(" | "{":
                return tuple(self.take(part) for part in split(kind[1:-1]))
            case "a":
                return self.array(kind[1:])
            case "b":
                return bool(self.fixed("I"))
            case letter:
                return self.fixed(_FIXED[letter])

    def array(self, kind: str) -> Any:
        length = self.fixed("I")
        self.align(kind[0])
        end = self.at + length
        if kind == "y":
            value = self.data[self.at : end]
            self.at = end
            return value
        items = []
        while self.at < end:
            items.append(self.take(kind))
        return dict(items) if kind[0] == "{" else items


@dataclass(kw_only=True)
class Message:
    """A message as it was read; its fds belong to whoever holds it."""

    type: int
    flags: int
    serial: int
    fields: dict[int, Any]
    body: tuple[Any, ...]
    fds: list[int] = field(default_factory=list)

    @property
    def path(self) -> str | None:
        """The object it is from or for."""
        return self.fields.get(PATH)

    @property
    def interface(self) -> str | None:
        """The interface of its member."""
        return self.fields.get(INTERFACE)

    @property
    def member(self) -> str | None:
        """The method or signal."""
        return self.fields.get(MEMBER)

    @property
    def sender(self) -> str | None:
        """The unique name of its sender, as the bus says."""
        return self.fields.get(SENDER)

    @property
    def error_name(self) -> str | None:
        """The name of the error that it is."""
        return self.fields.get(ERROR_NAME)

    @property
    def reply_serial(self) -> int | None:
        """The serial of the call that it answers."""
        return self.fields.get(REPLY_SERIAL)

    @property
    def signature(self) -> str:
        """The signature of its body."""
        return str(self.fields.get(SIGNATURE, ""))


def build(
    *,
    serial: int,
    type: int = METHOD_CALL,  # noqa: A002 - the specification's word
    flags: int = 0,
    path: str | None = None,
    interface: str | None = None,
    member: str | None = None,
    destination: str | None = None,
    error_name: str | None = None,
    reply_serial: int | None = None,
    signature: str = "",
    body: bytes = b"",
    unix_fds: int | None = None,
    extra_fields: Sequence[tuple[int, Variant]] = (),
    endian: str = "<",
) -> bytes:
    """Return a message that says what it is told; a field that is None is left out."""
    values = {
        PATH: path,
        INTERFACE: interface,
        MEMBER: member,
        ERROR_NAME: error_name,
        REPLY_SERIAL: reply_serial,
        DESTINATION: destination,
        SIGNATURE: signature or None,
        UNIX_FDS: unix_fds,
    }
    fields = [
        (code, Variant(_HEADER_TYPES[code], value))
        for code, value in values.items()
        if value is not None
    ]
    header = marshal(
        "yyyyuua(yv)",
        [
            ord("l" if endian == "<" else "B"),
            type,
            flags,
            1,
            len(body),
            serial,
            [*fields, *extra_fields],
        ],
        endian,
    )
    return header + bytes(-len(header) % 8) + body


def frame_length(start: bytes) -> int:
    """Return the length of the whole message whose first 16 bytes these are."""
    endian = "<" if start[0] == ord("l") else ">"
    body, _, fields = struct.unpack_from(endian + "III", start, 4)
    header = 16 + fields
    return int(header + -header % 8 + body)


def parse(data: bytes, fds: Sequence[int] = ()) -> Message:
    """Return the message that `data` is, owning `fds`."""
    endian = "<" if data[0] == ord("l") else ">"
    (body_length,) = struct.unpack_from(endian + "I", data, 4)
    _, kind, flags, _, _, serial, fields = unmarshal("yyyyuua(yv)", data, endian)
    named = {code: variant.value for code, variant in fields}
    body = data[len(data) - body_length :]
    return Message(
        type=kind,
        flags=flags,
        serial=serial,
        fields=named,
        body=unmarshal(named.get(SIGNATURE, ""), body, endian),
        fds=list(fds),
    )
