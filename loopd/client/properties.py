# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a device, or loopd itself, is at one moment, as a client sees it: properties, typed.

A service on the bus may be another than loopd, and may lie. What it says is checked here, once, so
that programs can show it, and hand it to others, as it is: it has the types of the interface, nodes
and names are of their form and without control characters, and times are times. Free texts are the
exception: the path of a file, and a reference.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple, Self

from loopd.bus.codec import Variant
from loopd.errors import Failed

FOREIGN = 0xFFFFFFFF
"""The owner of a device that loopd did not attach."""

NO_NUMBER = 0xFFFFFFFF
"""The number of a block device that needed no loop device."""

_PATH = re.compile(r"/org/example/Loop1/device/\w+", re.ASCII)
_UNIQUE_NAME = re.compile(r":[\w.-]+", re.ASCII)
_MAX_NODE = 255
_YEAR_10000 = 253_402_300_800_000_000
"""In microseconds since the epoch; no calendar goes further."""


class Daemon(NamedTuple):
    """What loopd tells of itself."""

    version: str
    device_count: int
    """The devices that it has attached and the kernel has not let go of."""
    max_devices: int
    max_devices_per_user: int
    configuration_error: str
    """The mistakes in its settings, for whose keys the defaults hold; empty if there are none."""

    @classmethod
    def decode(cls, found: dict[str, Any]) -> Self:
        """Read them from an a{sv}. Raises Failed if that is not what a loopd tells."""
        # An older one does not tell of its settings.
        found = {"ConfigurationError": Variant("s", ""), **found}
        values = {}
        for key, (name, kind) in _TOLD_OF_DAEMON.items():
            variant = found.get(name)
            if not (isinstance(variant, Variant) and variant.signature == kind):
                raise Failed(f"loopd does not tell its property {name}, or with another type")
            values[key] = variant.value
        return cls(**values)


_TOLD_OF_DAEMON = {
    "version": ("Version", "s"),
    "device_count": ("DeviceCount", "u"),
    "max_devices": ("MaxDevices", "u"),
    "max_devices_per_user": ("MaxDevicesPerUser", "u"),
    "configuration_error": ("ConfigurationError", "s"),
}


class Partition(NamedTuple):
    """A partition of a device; start and size in bytes."""

    number: int
    node: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What a device is at one moment; sizes and offsets in bytes."""

    node: str
    number: int
    device_number: int
    """As os.makedev makes it."""
    diskseq: int
    backing_file: bytes
    """The path, for showing only: it may be outdated or of another mount namespace."""
    backing_device: int
    backing_inode: int
    offset: int
    size_limit: int
    """0 if there is none."""
    size: int
    sector_size: int
    read_only: bool
    direct_io: bool
    autoclear: bool
    partition_scan: bool
    partitions: tuple[Partition, ...]
    missing_partitions: tuple[int, ...] = ()
    """Numbers that the partition table has and the device has not."""
    reference: str
    owner: int
    """A uid, or FOREIGN."""
    holder: str
    """The unique bus name of the connection that keeps it."""
    lifetime: str
    """connection, user or system; empty on a foreign device."""
    holds: int
    locked: str
    """none, shared or exclusive."""
    managed: bool
    state: str
    """attached or detaching."""
    attached_at: int
    """Microseconds since the epoch; 0 on a foreign device."""

    @classmethod
    def decode(cls, found: Any) -> Self:
        """Read them from an a{sv}; those of a newer loopd are passed over.

        What an older one does not tell has a default. Raises Failed if one is missing, or is not
        what loopd tells of a device.
        """
        values = _values(found)
        for field in fields(cls):
            if field.name not in values and field.default is MISSING:
                raise Failed(f"loopd does not tell the property {field.name!r} of a device")
        return cls(**values)

    def updated(self, changed: Any) -> Self:
        """As they are after a PropertiesChanged. Raises Failed."""
        return replace(self, **_values(changed))

    def differences(self, other: Self) -> tuple[str, ...]:
        """The names of the fields in which two differ."""
        return tuple(
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def is_node(value: Any) -> bool:
    """Whether this can be the path of a device node, such as /dev/loop3 or /dev/mapper/home."""
    return (
        isinstance(value, str)
        and value.startswith("/dev/")
        and len(value) <= _MAX_NODE
        and not {"", ".", ".."} & {*value.split("/")[2:]}
        and value.isprintable()
        and " " not in value
    )


def is_path(value: Any) -> bool:
    """Whether this can be the object path of a device."""
    return isinstance(value, str) and _PATH.fullmatch(value) is not None


def _is_partition(found: list[Any]) -> bool:
    _, node, _, _ = found
    return is_node(node)


def _one_of(*words: str) -> Callable[[str], bool]:
    return words.__contains__


def _anything(_: Any) -> bool:
    return True


# By the names that Python has: the type on the bus, and what a value of that type has to be.
_TOLD: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "node": ("s", is_node),
    "number": ("u", _anything),
    "device_number": ("t", _anything),
    "diskseq": ("t", _anything),
    "backing_file": ("ay", _anything),
    "backing_device": ("t", _anything),
    "backing_inode": ("t", _anything),
    "offset": ("t", _anything),
    "size_limit": ("t", _anything),
    "size": ("t", _anything),
    "sector_size": ("u", _anything),
    "read_only": ("b", _anything),
    "direct_io": ("b", _anything),
    "autoclear": ("b", _anything),
    "partition_scan": ("b", _anything),
    "partitions": ("a(ustt)", lambda found: all(map(_is_partition, found))),
    "missing_partitions": ("au", _anything),
    "reference": ("s", _anything),
    "owner": ("u", _anything),
    "holder": ("s", lambda name: not name or bool(_UNIQUE_NAME.fullmatch(name))),
    "lifetime": ("s", _one_of("", "connection", "user", "system")),
    "holds": ("u", _anything),
    "locked": ("s", _one_of("none", "shared", "exclusive")),
    "managed": ("b", _anything),
    "state": ("s", _one_of("attached", "detaching")),
    "attached_at": ("t", lambda time: time < _YEAR_10000),
}


def _values(found: Any) -> dict[str, Any]:
    """The values of an a{sv} by the names that Python has for them. Raises Failed."""
    if not isinstance(found, dict):
        raise Failed("loopd does not tell the properties of a device")
    values: dict[str, Any] = {}
    for name, variant in found.items():
        key = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()
        if key not in _TOLD:
            continue
        kind, is_right = _TOLD[key]
        if not (isinstance(variant, Variant) and variant.signature == kind):
            raise Failed(f"loopd tells the property {key!r} of a device with another type")
        if not is_right(variant.value):
            raise Failed(f"loopd tells a property {key!r} that no device has")
        values[key] = variant.value
    if "backing_file" in values:
        values["backing_file"] = bytes(values["backing_file"]).removesuffix(b"\0")
    if "missing_partitions" in values:
        values["missing_partitions"] = tuple(values["missing_partitions"])
    if "partitions" in values:
        values["partitions"] = tuple(Partition(*each) for each in values["partitions"])
    return values
