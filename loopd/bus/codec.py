# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus library, whichever it is: the wire format and its types, nothing else of it.

dbus-fast is used where it is installed, dbus-next otherwise, and no other module names either.
Their connections and service classes are not used: see docs/architecture.md.
An `h` in a body is the index of a passed fd, in both directions.
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .frame import read_header

try:
    import dbus_fast as _library
    from dbus_fast import Message, MessageFlag, MessageType, Variant
    from dbus_fast.__version__ import __version__ as _version
    from dbus_fast._private.unmarshaller import Unmarshaller
    from dbus_fast.signature import get_signature_tree

    if int(_version.split(".")[0]) < 5:
        raise ImportError("dbus-fast before 5 takes one fd per message")

    def _signatures_cached() -> int:
        return int(get_signature_tree.cache_info().currsize)

    # What is longer is refused unread: no call needs a hundredth of it, and everybody waits while
    # one is read. The worst of this size takes 16 ms, and 5 ms by dbus-next with its own.
    MAX_MESSAGE = 128 * 1024
    _signature_tree = get_signature_tree
    _forget_signatures = get_signature_tree.cache_clear
except ImportError:
    import dbus_next as _library
    from dbus_next import Message, MessageFlag, MessageType, Variant
    from dbus_next._private.unmarshaller import Unmarshaller
    from dbus_next.signature import SignatureTree

    def _signatures_cached() -> int:
        return len(SignatureTree._cache)

    MAX_MESSAGE = 16 * 1024
    _signature_tree = SignatureTree
    _forget_signatures = SignatureTree._cache.clear

__all__ = [
    "LIBRARY",
    "MAX_MESSAGE",
    "Array",
    "MalformedMessage",
    "Message",
    "MessageType",
    "Variant",
    "element",
    "parse",
    "serialize",
]

LIBRARY: str = _library.__name__
"""The name of the library in use."""

# A client chooses signatures freely, and the caches of both libraries would keep them all.
_MAX_SIGNATURES = 256


class MalformedMessage(Exception):
    """The library cannot read the message."""


def parse(data: bytes | bytearray | memoryview) -> Message:
    """Read one whole message.

    Raises MalformedMessage for whatever the library has against it.
    """
    if _signatures_cached() > _MAX_SIGNATURES:
        _forget_signatures()
    try:
        message = Unmarshaller(io.BytesIO(data)).unmarshall()
    # The libraries raise whatever comes up: their own errors, struct.error, IndexError,
    # RecursionError, UnicodeDecodeError. All of it means that this message is not for us.
    except Exception as exc:
        raise MalformedMessage(f"{type(exc).__name__}: {exc}") from exc
    if message is None:
        raise MalformedMessage("the message is shorter than its header says")
    if not message.body and _signature(data):
        # A bus refuses that, but the libraries take it for a message of no arguments.
        raise MalformedMessage("there is no body, although there is a signature")
    return message


def _signature(data: bytes | bytearray | memoryview) -> str:
    """What the header of a message that can be read says of its body."""
    order = "<" if data[0] == 0x6C else ">"
    (fields,) = struct.unpack_from(order + "I", data, 12)
    return read_header(bytes(data[: 16 + fields]), 16 + fields).signature


def argument_types(signature: str) -> list[str]:
    """The complete types of a signature of ours."""
    return [argument.signature for argument in _signature_tree(signature).types]


@dataclass(frozen=True, slots=True)
class Array:
    """A body that is one array of structs or dict entries, each marshalled by `element` before."""

    signature: str
    elements: Sequence[bytes]

    @property
    def empty(self) -> list[Any] | dict[Any, Any]:
        """The same without elements, as the libraries take it."""
        return {} if self.signature.startswith("a{") else []

    def marshalled(self) -> bytes:
        """The body. Elements begin at a multiple of 8, and nothing comes after the last one."""
        *others, last = self.elements or [b""]
        data = b"".join([*(each + bytes(-len(each) % 8) for each in others), last])
        return struct.pack("<I4x", len(data)) + data


# What an array of structs or dict entries begins with: its length, and up to a multiple of 8.
_ARRAY_HEAD = 8


def element(signature: str, array: list[Any] | dict[Any, Any]) -> bytes:
    """Marshal the only element of an array of structs or dict entries."""
    message = serialize(method_return(":1.0", 1, signature, [array], serial=1))
    (size,) = struct.unpack_from("<I", message, 4)
    return message[len(message) - size + _ARRAY_HEAD :]


def serialize(message: Message) -> bytes:
    """Write one whole message, its fds counted in the header; both libraries do it little-endian.

    The body may be an Array.
    """
    if not (message.body and isinstance(array := message.body[0], Array)):
        return bytes(message._marshall(True))
    message.body = [array.empty]
    header = bytearray(message._marshall(True)[:-_ARRAY_HEAD])
    body = array.marshalled()
    struct.pack_into("<I", header, 4, len(body))
    return bytes(header) + body


def method_call(
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str,
    body: Sequence[Any],
    *,
    serial: int,
    fds: Sequence[int] = (),
    interactive: bool = False,
) -> Message:
    """A method call; `interactive` allows the callee to ask somebody for authorization."""
    return Message(
        destination=destination,
        path=path,
        interface=interface,
        member=member,
        signature=signature,
        body=list(body),
        serial=serial,
        unix_fds=list(fds),
        flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE,
    )


def method_return(
    destination: str,
    reply_serial: int,
    signature: str,
    body: Sequence[Any],
    *,
    serial: int,
    fds: Sequence[int] = (),
) -> Message:
    """The reply to a call."""
    return Message(
        message_type=MessageType.METHOD_RETURN,
        destination=destination,
        reply_serial=reply_serial,
        signature=signature,
        body=list(body),
        serial=serial,
        unix_fds=list(fds),
        flags=MessageFlag.NO_REPLY_EXPECTED,
    )


def error(destination: str, reply_serial: int, name: str, text: str, *, serial: int) -> Message:
    """The reply to a call that failed."""
    return Message(
        message_type=MessageType.ERROR,
        destination=destination,
        reply_serial=reply_serial,
        error_name=name,
        signature="s",
        body=[text],
        serial=serial,
        flags=MessageFlag.NO_REPLY_EXPECTED,
    )


def signal(
    path: str,
    interface: str,
    member: str,
    signature: str,
    body: Sequence[Any],
    *,
    serial: int,
    destination: str = "",
) -> Message:
    """A signal to everyone who listens, or to one destination."""
    return Message(
        message_type=MessageType.SIGNAL,
        destination=destination or None,
        path=path,
        interface=interface,
        member=member,
        signature=signature,
        body=list(body),
        serial=serial,
        flags=MessageFlag.NO_REPLY_EXPECTED,
    )
