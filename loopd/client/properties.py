# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a device is at one moment, as a client sees it: the properties of its object, typed."""

import re
from dataclasses import dataclass, fields
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

        Raises Failed if one is missing.
        """
        values: dict[str, Any] = {
            re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): variant.value
            for name, variant in found.items()
        }
        try:
            values["backing_file"] = values["backing_file"].removesuffix(b"\0")
            values["partitions"] = tuple(Partition(*each) for each in values["partitions"])
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except KeyError as exc:
            raise Failed(f"loopd does not tell the property {exc} of a device") from exc
