# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options from the bus, a{sv}: hostile until checked, each mistake named with its key.

Types are compared to the letter, so nothing nested, and no handle, gets through.
"""

from collections.abc import Mapping
from typing import Any

from .attaching import AttachOptions
from .codec import Variant
from .errors import InvalidArgs, NotSupported
from .manager import ResizeOptions

_KINDS = {"b": "boolean", "s": "string", "t": "64-bit unsigned", "u": "32-bit unsigned"}
_MAX_REFERENCE = 62  # udev ignores a name that fills the kernel's 63


class Options:
    """The options of one call. Each is taken once; what is left in the end is unknown."""

    def __init__(self, given: Mapping[str, Variant]) -> None:
        self._left = dict(given)

    def boolean(self, key: str) -> bool | None:
        """A boolean, or None if not given."""
        value: bool | None = self._take(key, "b")
        return value

    def u32(self, key: str) -> int | None:
        """A 32-bit number, or None if not given."""
        value: int | None = self._take(key, "u")
        return value

    def u64(self, key: str) -> int | None:
        """A 64-bit number, or None if not given."""
        value: int | None = self._take(key, "t")
        return value

    def string(self, key: str) -> str | None:
        """A string, or None if not given."""
        value: str | None = self._take(key, "s")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        """One of a few words, or None if not given."""
        value = self.string(key)
        if value is not None and value not in choices:
            raise InvalidArgs(f"{key}: not one of {', '.join(choices)}")
        return value

    def end(self) -> None:
        """Refuse whatever was not asked for."""
        for key in self._left:
            # The key is the client's: quoted and cut before it goes into a text or a log.
            raise InvalidArgs(f"{key[:64]!r}: there is no such option")

    def _take(self, key: str, kind: str) -> Any:
        variant = self._left.pop(key, None)
        if variant is None:
            return None
        if variant.signature != kind:
            raise InvalidArgs(f"{key}: has to be a {_KINDS[kind]} ('{kind}')")
        return variant.value


def attach_options(given: Mapping[str, Variant]) -> AttachOptions:
    """The options of Attach.

    Raises InvalidArgs, and NotSupported for what this version cannot do.
    """
    options = Options(given)
    read_only = options.boolean("read-only")
    offset = options.u64("offset") or 0
    size_limit = options.u64("size-limit") or 0
    sector_size = options.u32("sector-size")
    partition_scan = options.boolean("partition-scan")
    direct_io = options.boolean("direct-io")
    reference = _reference(options.string("reference") or "")
    lock = options.choice("lock", ("none", "shared", "exclusive"))
    lifetime = options.choice("lifetime", ("connection", "user", "system"))
    allow_overlap = options.boolean("allow-overlap") or False
    number = options.u32("number")
    options.end()
    if offset % 512:
        raise InvalidArgs("offset: not a multiple of 512")
    if sector_size is None:
        sector_size = 512
    elif sector_size and (sector_size < 512 or sector_size & (sector_size - 1)):
        raise InvalidArgs("sector-size: not a power of two from 512")
    for key, asked_for in (
        ("sector-size", sector_size == 0),
        ("partition-scan", partition_scan),
        ("lock", lock not in (None, "none")),
        ("lifetime", lifetime not in (None, "connection")),
        ("number", number is not None),
    ):
        if asked_for:
            raise NotSupported(f"{key}: this version of loopd cannot do that yet")
    return AttachOptions(
        read_only=read_only,
        offset=offset,
        size_limit=size_limit,
        sector_size=sector_size,
        direct_io=direct_io,
        reference=reference,
        allow_overlap=allow_overlap,
    )


def resize_options(given: Mapping[str, Variant]) -> ResizeOptions:
    """The options of Resize."""
    options = Options(given)
    wanted = ResizeOptions(
        offset=options.u64("offset"),
        size_limit=options.u64("size-limit"),
        force=options.boolean("force") or False,
    )
    options.end()
    return wanted


def open_options(mode: str, given: Mapping[str, Variant]) -> bool:
    """The mode and options of Open; whether it is for writing, too."""
    options = Options(given)
    partition = options.u32("partition")
    options.end()
    if mode not in ("r", "rw"):
        raise InvalidArgs("mode: not one of r, rw")
    if partition is not None:
        raise NotSupported("partition: this version of loopd cannot do that yet")
    return mode == "rw"


def _reference(text: str) -> bytes:
    reference = text.encode()
    if len(reference) > _MAX_REFERENCE:
        raise InvalidArgs(f"reference: longer than {_MAX_REFERENCE} bytes")
    if any(char < " " or "\x7f" <= char <= "\x9f" for char in text):
        raise InvalidArgs("reference: contains control characters")
    return reference
