# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a device is at one moment, as a client sees it: the properties of its object, typed."""

import re
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple, Self

from ..codec import Variant
from ..errors import Failed

FOREIGN = 0xFFFFFFFF
"""The owner of a device that loopd did not attach."""


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
    def decode(cls, found: dict[str, Variant]) -> Self:
        """Read them from an a{sv}; those of a newer loopd are passed over.

        What an older one does not tell has a default.

        Raises Failed if one is missing.
        """
        values = _values(found)
        try:
            return cls(
                **{
                    field.name: values[field.name]
                    for field in fields(cls)
                    if field.name in values or field.default is MISSING
                }
            )
        except KeyError as exc:
            raise Failed(f"loopd does not tell the property {exc} of a device") from exc

    def updated(self, changed: dict[str, Variant]) -> Self:
        """As they are after a PropertiesChanged."""
        known = {field.name for field in fields(self)}
        values = _values(changed)
        return replace(self, **{name: values[name] for name in known & values.keys()})

    def differences(self, other: Self) -> tuple[str, ...]:
        """The names of the fields in which two differ."""
        return tuple(
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        )


def _values(found: dict[str, Variant]) -> dict[str, Any]:
    """The values of an a{sv} by the names that Python has for them."""
    values: dict[str, Any] = {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): variant.value
        for name, variant in found.items()
    }
    if "backing_file" in values:
        values["backing_file"] = values["backing_file"].removesuffix(b"\0")
    if "missing_partitions" in values:
        values["missing_partitions"] = tuple(values["missing_partitions"])
    if "partitions" in values:
        values["partitions"] = tuple(Partition(*each) for each in values["partitions"])
    return values
