# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a loop device is to be, and whether the file allows it: pure."""

import mmap
from dataclasses import dataclass, replace

from loopd.errors import InvalidArgs

from .backing_file import BackingFile
from .block_device import Lock

DEFAULT_SECTOR_SIZE = 512
# Some kernels take more, and answer reads with EIO then.
MAX_SECTOR_SIZE = mmap.PAGESIZE


@dataclass(frozen=True, kw_only=True)
class AttachRequest:
    """What a loop device is to be; sizes and offsets in bytes."""

    read_only: bool = False
    offset: int = 0
    size_limit: int = 0
    """0 means to the end of the file."""
    sector_size: int | None = DEFAULT_SECTOR_SIZE
    """None means as the partition table says."""
    partition_scan: bool = False
    direct_io: bool = True
    reference: bytes = b""
    """The free-form name, lo_file_name."""
    lock: Lock = Lock.NONE
    """The BSD lock that is kept."""
    number: int | None = None
    """The device to bind, and no other; None means any free one."""

    def in_whole_sectors(self, size: int) -> "AttachRequest":
        """The same without a tail of less than a sector, which the kernel shows and cannot read."""
        tail = (size - self.offset) % (self.sector_size or DEFAULT_SECTOR_SIZE)
        if self.size_limit or tail < DEFAULT_SECTOR_SIZE:
            return self
        return replace(self, size_limit=size - self.offset - tail)

    def check(self, file: BackingFile, size: int) -> None:
        """Refuse what the kernel would take and round, clamp or fail later; `size` is the file's.

        Raises InvalidArgs naming the option, if it is one.
        """
        if not self.read_only and file.sealed:
            raise InvalidArgs("read-only: the memfd is sealed against writing, so it must be true")
        if not self.read_only and not file.writable:
            raise InvalidArgs("read-only: the file is open for reading only, so it cannot be false")
        if self.offset and self.offset >= size:
            raise InvalidArgs(f"offset: not inside the file, which has {size} bytes")
        sector_size = self.sector_size or DEFAULT_SECTOR_SIZE
        if sector_size < 512 or sector_size & (sector_size - 1):
            raise InvalidArgs("sector-size: not a power of two from 512")
        if self.size_limit % sector_size:
            raise InvalidArgs(f"size-limit: not a multiple of the sector size, {sector_size}")
        if size < DEFAULT_SECTOR_SIZE:
            raise InvalidArgs(f"the file has {size} bytes, less than a sector")
        if size < sector_size:
            raise InvalidArgs(f"sector-size: larger than the file, which has {size} bytes")
        if sector_size > MAX_SECTOR_SIZE:
            raise InvalidArgs(f"sector-size: larger than a page, which has {MAX_SECTOR_SIZE} bytes")
        if self.size_limit > size - self.offset:
            raise InvalidArgs(
                f"size-limit: reaches past the end of the file, which has {size} bytes"
            )
        if size - self.offset < sector_size:
            raise InvalidArgs("offset: less than one sector of the file is left after it")
