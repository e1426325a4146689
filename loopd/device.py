# SPDX-License-Identifier: LGPL-2.1-or-later
"""One bound loop device as the manager knows it: ours with a lease, or someone else's without."""

import asyncio
from dataclasses import dataclass, field

from .access import NOBODY
from .leases import Lease, Place
from .loopdev import LoopDevice
from .loopinfo import Status, node
from .overlap import Mapping

ATTACHED = "attached"
DETACHING = "detaching"


@dataclass(kw_only=True, eq=False)
class Device:
    """A device from attach, or from when it was first seen, until the kernel lets go of it."""

    number: int
    diskseq: int
    """As it was at attach: it names the attachment, and the object."""
    status: Status
    backing_device: int = 0
    backing_inode: int = 0
    reference: bytes = b""
    owner: int = NOBODY
    loop: LoopDevice | None = None
    """Our hold on it; None on a foreign one."""
    lease: Lease | None = None
    place: Place | None = None
    state: str = ATTACHED
    ending: bool = False
    """Whether its detach has begun."""
    attached_at: int = 0
    """Microseconds of CLOCK_REALTIME; 0 if nobody told."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def path(self) -> str:
        """The object path."""
        return object_path(self.number, self.diskseq)

    @property
    def node(self) -> str:
        """The device node."""
        return node(self.number)

    @property
    def managed(self) -> bool:
        """Whether loopd attached it."""
        return self.owner != NOBODY

    @property
    def mapping(self) -> Mapping:
        """The bytes of its file that it maps."""
        status = self.status
        return Mapping(
            device=self.backing_device,
            inode=self.backing_inode,
            start=status.offset,
            end=status.offset + status.size,
            writable=not status.read_only,
        )

    @property
    def lifetime(self) -> str:
        """The lifetime of its lease; empty without one."""
        return self.lease.lifetime if self.lease else ""


PREFIX = "/org/example/Loop1/device/"


def object_path(number: int, diskseq: int) -> str:
    """The object path of an attachment; the kernel name needs no escaping."""
    return f"{PREFIX}loop{number}_{diskseq}"
