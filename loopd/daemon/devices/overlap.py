# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether two loop devices would share bytes of a file that one of them can write: pure.

Two filesystems mounted from the same bytes destroy each other, without a word from the kernel. A
user is kept from doing that to itself. Between two users a read-only mapping is in nobody's way:
else a user who may only read an image could keep its owner from attaching it. A device that was set
up without loopd is another user's: root's by losetup, or anybody's by udisks2.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Self

from loopd.errors import Overlap
from loopd.loop.backing_file import FileIdentity


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """The bytes of a file, by st_dev and st_ino, or of a disk, that a device maps."""

    device: int
    inode: int
    start: int
    end: int
    writable: bool
    uid: int
    """Whose it is."""

    @classmethod
    def of(cls, file: FileIdentity, offset: int, size: int, *, writable: bool, owner: int) -> Self:
        """So many bytes from an offset on; of a partition, those of its disk."""
        device, inode, start = file.device, file.inode, offset
        if file.block:
            # No file has the inode 0.
            device, inode, start = file.block.disk, 0, file.block.start + offset
        return cls(device, inode, start, start + size, writable, owner)

    @property
    def file(self) -> tuple[int, int]:
        """What it shares with all mappings that it could conflict with."""
        return self.device, self.inode

    def conflicts_with(self, other: "Mapping") -> bool:
        """Whether both reach the same bytes, and both could change them, or one of one user's."""
        if self.uid == other.uid:
            matters = self.writable or other.writable
        else:
            matters = self.writable and other.writable
        return (
            matters
            and self.file == other.file
            and self.start < other.end
            and other.start < self.end
        )


class Claims:
    """The ranges that are being bound or moved to, and are not seen on any device yet."""

    def __init__(self) -> None:
        self._claimed: set[Mapping] = set()

    def claim(self, mapping: Mapping) -> Callable[[], None]:
        """Claim a range; returns what to call when it is seen, or given up."""
        self._claimed.add(mapping)
        return partial(self._claimed.discard, mapping)

    def require_none(self, mapping: Mapping, bound: Iterable[tuple[str, Mapping]]) -> None:
        """Raise Overlap if a device that is bound, by its node, or a claim is in the way."""
        for node, other in bound:
            if mapping.conflicts_with(other):
                raise Overlap(
                    f"{node} maps the same bytes of the file, and one of the two is writable: "
                    "detach it, attach both read-only, or pass allow-overlap"
                )
        if any(mapping.conflicts_with(other) for other in self._claimed):
            raise Overlap(
                "another call is attaching the same bytes of the file: try again, or pass "
                "allow-overlap"
            )
