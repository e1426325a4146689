# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether two loop devices would share bytes of a file that one of them can write: pure.

Two filesystems mounted from the same bytes destroy each other, without a word from the kernel.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """The bytes of a file, by st_dev and st_ino, that a device maps."""

    device: int
    inode: int
    start: int
    end: int
    writable: bool

    def conflicts_with(self, other: "Mapping") -> bool:
        """Whether both reach the same bytes and one could change them."""
        return (
            (self.device, self.inode) == (other.device, other.inode)
            and self.start < other.end
            and other.start < self.end
            and (self.writable or other.writable)
        )
