# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options from the bus, a{sv}: hostile until checked, each mistake named with its key.

Types are compared to the letter, so nothing nested, and no handle, gets through.
"""

from collections.abc import Mapping
from typing import Any

from loopd.bus.codec import Variant
from loopd.daemon.actions.change import ResizeOptions
from loopd.daemon.actions.examine import AttachOptions
from loopd.daemon.devices.leases import CONNECTION, LIFETIMES
from loopd.errors import InvalidArgs
from loopd.loop.block_device import Lock
from loopd.loop.uapi import MAX_REFERENCE

_KINDS = {"b": "boolean", "s": "string", "t": "64-bit unsigned", "u": "32-bit unsigned"}
_MAX_NUMBER = 0xFFFFF  # the kernel has 20 bits for it


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
    """The options of Attach."""
    options = Options(given)
    read_only = options.boolean("read-only")
    offset = options.u64("offset") or 0
    size_limit = options.u64("size-limit") or 0
    size = options.u32("sector-size")
    partition_scan = options.boolean("partition-scan") or False
    direct_io = options.boolean("direct-io")
    name = options.string("reference") or ""
    lock = options.choice("lock", tuple(Lock)) or Lock.NONE
    lifetime = options.choice("lifetime", LIFETIMES) or CONNECTION
    allow_overlap = options.boolean("allow-overlap") or False
    number = options.u32("number")
    options.end()
    if number is not None and number > _MAX_NUMBER:
        raise InvalidArgs(f"number: larger than {_MAX_NUMBER}")
    return AttachOptions(
        read_only=read_only,
        offset=offset,
        size_limit=size_limit,
        sector_size=None if size is None else sector_size(size),
        probe_sector_size=size == 0,
        partition_scan=partition_scan,
        direct_io=direct_io,
        reference=reference(name),
        lock=Lock(lock),
        lifetime=lifetime,
        allow_overlap=allow_overlap,
        number=number,
    )


def lifetime_kind(text: str) -> str:
    """The argument of SetLifetime."""
    if text not in LIFETIMES:
        raise InvalidArgs(f"lifetime: not one of {', '.join(LIFETIMES)}")
    return text


def resize_options(given: Mapping[str, Variant]) -> ResizeOptions:
    """The options of Resize."""
    options = Options(given)
    wanted = ResizeOptions(
        offset=options.u64("offset"),
        size_limit=options.u64("size-limit"),
        force=options.boolean("force") or False,
        allow_overlap=options.boolean("allow-overlap") or False,
    )
    options.end()
    return wanted


def open_options(mode: str, given: Mapping[str, Variant]) -> tuple[bool, int | None]:
    """The mode and options of Open: whether it is for writing, too, and of which partition."""
    options = Options(given)
    partition = options.u32("partition")
    options.end()
    if mode not in ("r", "rw"):
        raise InvalidArgs("mode: not one of r, rw")
    return mode == "rw", partition


def detach_options(given: Mapping[str, Variant]) -> bool:
    """The options of Detach: whether it may be lazy."""
    options = Options(given)
    lazy = options.boolean("lazy") or False
    options.end()
    return lazy


def no_options(given: Mapping[str, Variant]) -> None:
    """Refuse any option."""
    Options(given).end()


def lock_kind(text: str) -> Lock:
    """The argument of Lock."""
    if text not in tuple(Lock):
        raise InvalidArgs(f"lock: not one of {', '.join(Lock)}")
    return Lock(text)


def reference(text: str) -> bytes:
    """A free-form name: the option of Attach and the argument of SetReference."""
    name = text.encode()
    if len(name) > MAX_REFERENCE:
        raise InvalidArgs(f"reference: longer than {MAX_REFERENCE} bytes")
    if any(char < " " or "\x7f" <= char <= "\x9f" for char in text):
        raise InvalidArgs("reference: contains control characters")
    return name


def sector_size(size: int) -> int | None:
    """A sector size: the option of Attach and the argument of SetSectorSize.

    None means as the partition table says.
    """
    if size and (size < 512 or size & (size - 1)):
        raise InvalidArgs("sector-size: not a power of two from 512")
    return size or None
