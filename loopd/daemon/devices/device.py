# SPDX-License-Identifier: LGPL-2.1-or-later
"""One device as the manager knows it: a loop device, ours or someone else's, or a block device.

A block device that needs no loop device is one of a client's own: nobody else sees it.
"""

import asyncio
import re
from dataclasses import dataclass, field

from loopd.daemon.access import NOBODY
from loopd.daemon.budget import Bucket
from loopd.daemon.quota import Place
from loopd.fd import OwnedFd
from loopd.loop.backing_file import FileIdentity
from loopd.loop.block_device import Lock
from loopd.loop.loop_device import LoopDevice
from loopd.loop.query import Status

from .leases import Lease
from .overlap import Mapping

ATTACHED = "attached"
DETACHING = "detaching"

# How often a device is looked at for those who ask about it: at once, and then a second.
_LOOKS_AT_ONCE = 8
_LOOKS = 1


@dataclass(kw_only=True, eq=False)
class Device:
    """A device from attach, or from when it was first seen, until the kernel lets go of it."""

    number: int | None
    """The loop number; None if it is a block device that needs no loop device."""
    name: str
    """The kernel's name, such as loop3."""
    diskseq: int
    """As it was at attach: it names the attachment, and the object."""
    which: int | None = None
    """Tells apart the attachments of a block device."""
    status: Status
    file: FileIdentity | None = None
    """The backing file, as far as known."""
    sector_size: int = 0
    """The logical one in bytes; 0 if a foreign device did not say."""
    table: tuple[int, ...] = ()
    """The numbers in the partition table, as it was read last."""
    reference: bytes = b""
    owner: int = NOBODY
    loop: LoopDevice | None = None
    """Our hold on a loop device; None on a foreign one."""
    may_hang: bool = False
    """Whether its file's filesystem may keep the last close of it waiting: not for systemd."""
    held: OwnedFd | None = None
    """Our hold on a block device that needs no loop device."""
    lease: Lease | None = None
    place: Place | None = None
    holds: dict[str, int] = field(default_factory=dict)
    """The Holds that keep it, beside its lease: by name, whose they are."""
    lock: Lock = Lock.NONE
    """The BSD lock that we hold."""
    lock_holder: str = ""
    """For which connection we hold it."""
    lock_expires: float | None = None
    """Until when, by CLOCK_MONOTONIC."""
    exclusive_left: float = 0
    """How many seconds of exclusive lock its owner has left without a pause."""
    exclusive_ended: float | None = None
    """When the last exclusive lock ended, by CLOCK_MONOTONIC."""
    state: str = ATTACHED
    ending: bool = False
    """Whether its detach has begun."""
    attached_at: int = 0
    """Microseconds of CLOCK_REALTIME; 0 if nobody told."""
    operating: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One operation at a time: each reads, changes and writes all of the device's settings."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    looks: Bucket = field(
        default_factory=lambda: Bucket(burst=_LOOKS_AT_ONCE, rate=_LOOKS, step=1), repr=False
    )
    """How often it may be looked at for those who ask about it."""

    def __post_init__(self) -> None:
        self.path = object_path(self.name, self.diskseq, self.which)
        """The object path."""

    @property
    def label(self) -> str:
        """What tells it from all others in a few letters: the end of its object path."""
        return self.path.removeprefix(PREFIX)

    @property
    def node(self) -> str:
        """The device node."""
        return f"/dev/{self.name.replace('!', '/')}"  # sysfs has no slashes

    @property
    def fields(self) -> dict[str, object]:
        """How the log names it."""
        return {"DEVICE": self.node, "DISKSEQ": self.diskseq}

    def partition_node(self, partition: int) -> str:
        """The device node of a partition, by the kernel's way to name them."""
        return f"{self.node}{'p' if self.node[-1].isdecimal() else ''}{partition}"

    @property
    def managed(self) -> bool:
        """Whether loopd attached it."""
        return self.owner != NOBODY

    @property
    def private(self) -> bool:
        """Whether nobody but its owner sees it."""
        return self.number is None

    def seen_by(self, uid: int) -> bool:
        """Whether a user sees it."""
        return not self.private or uid == self.owner

    @property
    def mapping(self) -> Mapping | None:
        """The bytes of its file that it maps, as far as known."""
        status = self.status
        if self.file is None or self.private:
            return None
        return Mapping.of(
            self.file,
            status.offset,
            status.size,
            writable=not status.read_only,
            owner=self.owner,
        )

    @property
    def goes_with_us(self) -> bool:
        """Whether it is to stay without loopd and would not: somebody has set autoclear."""
        stays = self.loop is not None and not self.loop.autoclear
        return stays and self.status.autoclear and not self.ending

    @property
    def size_limit(self) -> int:
        """The size limit that was asked for."""
        limit = self.status.size_limit
        return self.loop.asked_limit(limit) if self.loop else limit

    @property
    def missing_partitions(self) -> list[int]:
        """The numbers that the partition table has and the device has not."""
        there = {each.number for each in self.status.partitions}
        return [number for number in self.table if number not in there]

    @property
    def lifetime(self) -> str:
        """The lifetime of its lease; empty without one."""
        return self.lease.lifetime if self.lease else ""


PREFIX = "/org/example/Loop1/device/"


def label(name: str, diskseq: int, which: int | None = None) -> str:
    """What an attachment is called where it is to be told from all others."""
    return object_path(name, diskseq, which).removeprefix(PREFIX)


def object_path(name: str, diskseq: int, which: int | None = None) -> str:
    """The object path of an attachment."""
    # As systemd makes bus labels; a kernel name begins with a letter.
    label = re.sub("[^0-9A-Za-z]", lambda found: f"_{ord(found[0]):02x}", name)
    path = f"{PREFIX}{label}_{diskseq}"
    return path if which is None else f"{path}_{which}"
