# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every bus checks of a body before it lets a message through, by the specification."""

import re
import struct

_FIXED = {"y": 1, "b": 4, "n": 2, "q": 2, "i": 4, "u": 4, "x": 8, "t": 8, "d": 8, "h": 4}
_BASIC = "ybnqiuxtdhsog"
_ALIGNMENT = {**_FIXED, "s": 4, "o": 4, "g": 1, "v": 1, "a": 4, "(": 8, "{": 8}
_PATH = re.compile(r"/|(/[A-Za-z0-9_]+)+", re.ASCII)
_MAX_ARRAY = 1 << 26
_MAX_DEPTH = 64
_MAX_CONTAINERS = 32


class InvalidError(Exception):
    """No bus lets it through."""


def is_valid(signature: str, body: bytes, *, big: bool) -> bool:
    """Whether a body is one of this signature, which is a valid one, and nothing more."""
    reader = _Reader(body, ">" if big else "<")
    try:
        for kind in split(signature):
            reader.take(kind, 0)
    except (InvalidError, struct.error, UnicodeDecodeError):
        return False
    return reader.at == len(body)


def split(signature: str) -> list[str]:
    """The complete types of a signature; InvalidError if it has others."""
    if len(signature) > 255:
        raise InvalidError
    types, at = [], 0
    while at < len(signature):
        end = _end(signature, at, 0, 0)
        types.append(signature[at:end])
        at = end
    return types


def _end(signature: str, at: int, arrays: int, structs: int) -> int:
    letter = signature[at : at + 1]
    if not letter or arrays > _MAX_CONTAINERS or structs > _MAX_CONTAINERS:
        raise InvalidError
    if letter in _BASIC + "v":
        return at + 1
    if letter == "(":
        at = _end(signature, at + 1, arrays, structs + 1)
        while signature[at : at + 1] != ")":
            at = _end(signature, at, arrays, structs + 1)
        return at + 1
    if letter != "a":
        raise InvalidError
    if signature[at + 1 : at + 2] != "{":
        return _end(signature, at + 1, arrays + 1, structs)
    if signature[at + 2 : at + 3] not in _BASIC:
        raise InvalidError
    at = _end(signature, at + 3, arrays + 1, structs + 1)
    if signature[at : at + 1] != "}":
        raise InvalidError
    return at + 1


class _Reader:
    def __init__(self, data: bytes, order: str) -> None:
        self.data, self.order, self.at = data, order, 0

    def bytes(self, length: int) -> bytes:
        found = self.data[self.at : self.at + length]
        if len(found) != length:
            raise InvalidError
        self.at += length
        return found

    def align(self, kind: str) -> None:
        if any(self.bytes(-self.at % _ALIGNMENT[kind[0]])):
            raise InvalidError

    def number(self) -> int:
        (value,) = struct.unpack(self.order + "I", self.bytes(4))
        return int(value)

    def text(self, length: int) -> str:
        data = self.bytes(length)
        if b"\0" in data or self.bytes(1) != b"\0":
            raise InvalidError
        return data.decode()

    def take(self, kind: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise InvalidError
        self.align(kind)
        match kind[0]:
            case "b":
                if self.number() > 1:
                    raise InvalidError
            case "s":
                self.text(self.number())
            case "o":
                if not _PATH.fullmatch(self.text(self.number())):
                    raise InvalidError
            case "g":
                split(self.text(self.bytes(1)[0]))
            case "v":
                types = split(self.text(self.bytes(1)[0]))
                if len(types) != 1:
                    raise InvalidError
                self.take(types[0], depth + 1)
            case "(" | "{":
                for part in split(kind[1:-1]):
                    self.take(part, depth + 1)
            case "a":
                self.array(kind[1:], depth + 1)
            case letter:
                self.bytes(_FIXED[letter])

    def array(self, kind: str, depth: int) -> None:
        length = self.number()
        self.align(kind)
        end = self.at + length
        if length > _MAX_ARRAY or end > len(self.data):
            raise InvalidError
        while self.at < end:
            self.take(kind, depth)
        if self.at != end:
            raise InvalidError
