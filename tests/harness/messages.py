# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages that hypothesis makes up for loopd: right ones, almost right ones, and bytes.

What is ours is frequent in them (the methods of dbus/org.example.Loop1.xml, their options), so that
the code behind is reached; what the bus refuses is rare, because it costs the connection.
"""

import string
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from hypothesis import strategies as st

from tests.harness import wire
from tests.harness.area import CHECKOUT
from tests.harness.bus import LOOPD
from tests.harness.caller import MANAGER_PATH, OPTION_TYPES
from tests.harness.raw import BUS
from tests.harness.wire import Variant

DEVICE_PATH = "/the/device"
"""Stands for the object path of a device of the sender's."""
MAX_MESSAGE = 128 * 1024
"""What loopd reads of a message at most."""
_MAX_FIELDS = 16 * 1024


class Replies(Enum):
    """How many answers the sender is to get, if the bus does not close its connection."""

    ONE = "one"
    NONE = "none"
    AT_MOST_ONE = "one or none"


@dataclass(frozen=True, kw_only=True)
class Packet:
    """One message: what build() makes it of, and what is done to its bytes."""

    fields: dict[str, Any]
    fds: int
    """How many travel along."""
    changes: tuple[tuple[int, int], ...] = ()
    """Places, and what is put there; never where the lengths are."""

    def data(self, serial: int, device: str) -> bytes:
        """Return its bytes, for a sender whose device is called so."""
        fields = dict(self.fields)
        if fields["path"] == DEVICE_PATH:
            fields["path"] = device
        data = bytearray(wire.build(serial=serial, **fields))
        for place, value in self.changes:
            at = place % len(data)
            if 1 <= at < 4 or at >= 16:
                data[at] = value
        return bytes(data)

    def replies(self, data: bytes) -> Replies:
        """Return how many answers its bytes ask for."""
        if data[1] != wire.METHOD_CALL or data[2] & wire.NO_REPLY_EXPECTED:
            return Replies.NONE
        (length,) = struct.unpack_from(self.fields["endian"] + "I", data, 12)
        # Roughly: the bus adds the sender.
        unreadable = length > _MAX_FIELDS - 256 and len(data) > MAX_MESSAGE - 256
        if self.changes or unreadable or self.fields["destination"] is None:
            return Replies.AT_MOST_ONE
        return Replies.ONE


# --- values -------------------------------------------------------------------------------------

_RANGES = {
    "y": (0, 2**8 - 1),
    "n": (-(2**15), 2**15 - 1),
    "q": (0, 2**16 - 1),
    "i": (-(2**31), 2**31 - 1),
    "u": (0, 2**32 - 1),
    "x": (-(2**63), 2**63 - 1),
    "t": (0, 2**64 - 1),
    "h": (0, 2**32 - 1),
}
_WORDS = st.sampled_from(
    [
        *("", "r", "rw", "none", "shared", "exclusive", "connection", "user", "system", "name"),
        *("loop0", "/dev/loop0", "/dev/loop1048576", "loop-1", "/etc/passwd"),
        *("Version", "DeviceCount", "Size", LOOPD, f"{LOOPD}.Device", f"{BUS}.Properties"),
        *("\U0010ffff\uffff\u202e", "x\n\x1by"),
    ]
)
_TEXTS = _WORDS | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
_ELEMENTS = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8)
_PATHS = st.lists(_ELEMENTS, max_size=4).map(lambda parts: "/" + "/".join(parts))

_BASIC = "ybnqiuxtdsogh"
signatures = st.recursive(
    st.sampled_from([*_BASIC, "v"]),
    lambda inner: st.one_of(
        inner.map(lambda kind: f"a{kind}"),
        st.lists(inner, min_size=1, max_size=3).map(lambda kinds: f"({''.join(kinds)})"),
        st.tuples(st.sampled_from(_BASIC), inner).map(lambda pair: "a{" + "".join(pair) + "}"),
    ),
    max_leaves=4,
)


def rarely(usual: Any, other: st.SearchStrategy[Any], one_in: int = 8) -> st.SearchStrategy[Any]:
    """The usual, or something else now and then."""
    return st.integers(0, one_in - 1).flatmap(
        lambda n: other if n == one_in - 1 else st.just(usual)
    )


def numbers(kind: str) -> st.SearchStrategy[int]:
    """Numbers of a type, the extreme ones often."""
    low, high = _RANGES[kind]
    edges = [0, 1, 511, 512, 4096, 65536, high - 511, high - 1, high, low, high // 2, high // 2 + 1]
    return st.sampled_from([each for each in edges if low <= each <= high]) | st.integers(low, high)


def values(kind: str) -> st.SearchStrategy[Any]:
    """Values of a complete type."""
    if kind in _RANGES:
        return numbers(kind) if kind != "h" else st.sampled_from([0] * 12 + [1, 2]) | numbers(kind)
    match kind[0]:
        case "b":
            return st.booleans()
        case "d":
            return st.floats()
        case "s":
            return _TEXTS
        case "o":
            return _PATHS
        case "g":
            return signatures
        case "v":
            return variants
        case "(":
            return st.tuples(*map(values, wire.split(kind[1:-1])))
        case "a" if kind == "ay":
            return st.binary(max_size=20) | st.just(bytes(100_000))
        case "a" if kind[1] == "{":
            key, content = wire.split(kind[2:-1])
            if kind == "a{sv}":
                return options
            return st.dictionaries(values(key), values(content), max_size=3)
        case "a":
            return st.lists(values(kind[1:]), max_size=4)
    raise ValueError(kind)


variants = st.deferred(
    lambda: signatures.flatmap(lambda kind: values(kind).map(lambda value: Variant(kind, value)))
)


def _nested(depth: int) -> Variant:
    value = Variant("u", 512)
    for _ in range(depth):
        value = Variant("v", value)
    return value


_KEYS = sorted(OPTION_TYPES)
# What an option may well be, so that what comes after it is looked at, too.
_GOOD: dict[str, list[Any]] = {
    "offset": [0, 512, 4096],
    "size-limit": [0, 512, 65536],
    "sector-size": [0, 512, 4096],
    "reference": ["", "name"],
    "lock": ["none", "shared", "exclusive"],
    "lifetime": ["connection"],
    "number": [2**20],
    "partition": [0, 1, 255],
}
# And of which method.
_KEYS_OF = {
    "Attach": [key for key in _KEYS if key not in ("lazy", "force", "partition")],
    "Detach": ["lazy"],
    "Resize": ["offset", "size-limit", "force"],
    "Open": ["partition"],
}


def _good_options(keys: list[str]) -> st.SearchStrategy[tuple[str, Variant]]:
    return st.sampled_from(keys).flatmap(
        lambda key: st.tuples(
            st.just(key),
            st.sampled_from(_GOOD.get(key, [True, False])).map(
                lambda value: Variant(OPTION_TYPES[key], value)
            ),
        )
    )


_option = st.one_of(
    _good_options(_KEYS),
    st.sampled_from(_KEYS).flatmap(
        lambda key: st.tuples(
            st.just(key), values(OPTION_TYPES[key]).map(lambda v: Variant(OPTION_TYPES[key], v))
        )
    ),
    st.tuples(st.sampled_from(_KEYS) | _TEXTS, variants),
    st.tuples(st.sampled_from(_KEYS), st.integers(0, 58).map(_nested)),
)
options = st.one_of(
    st.lists(_good_options(_KEYS), max_size=3).map(dict),
    st.lists(_option, max_size=4).map(dict),
    st.just({f"key{number}": Variant("u", number) for number in range(3000)}),
)


def options_of(member: str) -> st.SearchStrategy[dict[str, Variant]]:
    """Options, mostly those that a method has."""
    if member not in _KEYS_OF:
        return rarely({}, options, 4)
    keys = _KEYS_OF[member]
    own = st.lists(_good_options(keys), min_size=1, max_size=3).map(dict)
    wrong = st.dictionaries(st.sampled_from(keys), variants, min_size=1, max_size=2)
    return own | own | wrong | options


# --- messages -----------------------------------------------------------------------------------


def _described() -> list[tuple[str, str, str]]:
    """The methods of our interfaces: interface, member and signature."""
    tree = ElementTree.parse(CHECKOUT / "dbus" / f"{LOOPD}.xml")
    return [
        (
            interface.get("name", ""),
            method.get("name", ""),
            "".join(
                arg.get("type", "") for arg in method.iter("arg") if arg.get("direction") == "in"
            ),
        )
        for interface in tree.iter("interface")
        for method in interface.iter("method")
    ]


METHODS = _described()
# Those that take options of their own are where most can go wrong.
_OFTEN = [method for method in METHODS if method[0].startswith(LOOPD) and method[1] in _KEYS_OF]
_NAMES = st.lists(_ELEMENTS.filter(lambda part: not part[0].isdigit()), min_size=2, max_size=3).map(
    ".".join
)
_LONG = "/" + "x" * 40
_ANY_PATHS = st.one_of(
    st.sampled_from([MANAGER_PATH, DEVICE_PATH, DEVICE_PATH, "/", f"{MANAGER_PATH}/device"]),
    st.sampled_from([MANAGER_PATH, f"{MANAGER_PATH}/device/loop0_0", _LONG * 300, _LONG * 6000]),
    _PATHS,
)
# 10 is known to dbus-daemon.
_UNKNOWN_FIELDS = st.lists(st.tuples(st.integers(11, 255), variants), min_size=1, max_size=2).map(
    tuple
)


@st.composite
def packets(draw: st.DrawFn, *, polite: bool = False) -> Packet:
    """A message; the `polite` ones are such that no bus closes the connection for them."""
    interface, member, signature = draw(st.sampled_from([*METHODS, *_OFTEN * 4]))
    endian = draw(rarely("<", st.just(">"), 5))
    wanted = signature.count("h")
    fds = draw(rarely(wanted, st.integers(0, 16), 5))
    path = MANAGER_PATH if interface == LOOPD else DEVICE_PATH
    if interface == f"{BUS}.ObjectManager":
        path = MANAGER_PATH
    signature = draw(rarely(signature, st.lists(signatures, max_size=3).map("".join)))
    args = [
        draw(options_of(member) if kind == "a{sv}" else values(kind))
        for kind in wire.split(signature)
    ]
    body = wire.marshal(signature, args, endian)
    fields: dict[str, Any] = {
        "endian": endian,
        "type": draw(rarely(wire.METHOD_CALL, st.sampled_from([wire.SIGNAL] * 3 + [5, 255]), 6)),
        "flags": draw(rarely(0, st.sampled_from([1, 2, 4, 5, 6, 7]) | st.integers(0, 255), 5)),
        "path": draw(rarely(path, _ANY_PATHS, 5)),
        "interface": draw(rarely(interface, st.none() | _NAMES, 10)),
        "member": draw(rarely(member, _ELEMENTS.map(lambda name: f"M{name}"), 12)),
        "destination": LOOPD,
        "signature": signature,
        "body": body,
        "unix_fds": fds or draw(st.sampled_from([None, 0])),
        "extra_fields": draw(rarely((), _UNKNOWN_FIELDS, 10)),
    }
    if fields["type"] == wire.SIGNAL and fields["interface"] is None:
        fields["interface"] = interface
    if polite:
        return Packet(fields=fields, fds=fds)
    kind = draw(st.integers(0, 5))
    if kind == 0:
        fields["body"] = draw(st.binary(max_size=64))
    elif kind == 1:
        fields["unix_fds"] = draw(st.integers(0, 17))
    elif kind == 2:
        fields[draw(st.sampled_from(["path", "member", "destination"]))] = None
    elif kind == 3:
        fields["type"] = draw(st.sampled_from([0, wire.METHOD_RETURN, wire.ERROR]))
        fields["reply_serial"] = draw(st.none() | st.integers(0, 1 << 16))
        fields["error_name"] = draw(st.none() | st.just("a.b"))
    changes: Sequence[tuple[int, int]] = ()
    if kind >= 4:
        changes = draw(
            st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3)
        )
    return Packet(fields=fields, fds=fds, changes=tuple(changes))
