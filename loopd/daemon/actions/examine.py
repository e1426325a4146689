# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client proposes to attach: the file as it is seen, and what its options come to.

Only calls that a hanging filesystem cannot stop are made of the file. Nothing is decided here about
who may do it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from loopd.daemon.config import Config
from loopd.daemon.devices.leases import CONNECTION, SYSTEM
from loopd.daemon.threads import Threads, Work
from loopd.fd import OwnedFd
from loopd.loop import backing_file, block_device, kernel, mounts, query
from loopd.loop.backing_file import BackingFile
from loopd.loop.block_device import Lock
from loopd.loop.query import Status
from loopd.loop.request import DEFAULT_SECTOR_SIZE, AttachRequest

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """What a client asks for; None means not given. Sizes and offsets in bytes."""

    read_only: bool | None = None
    offset: int = 0
    size_limit: int = 0
    sector_size: int | None = None
    probe_sector_size: bool = False
    """Whether the sector size is to be found from the partition table."""
    partition_scan: bool = False
    direct_io: bool | None = None
    reference: bytes = b""
    lock: Lock = Lock.NONE
    lifetime: str = CONNECTION
    allow_overlap: bool = False
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """How a block device is that was passed."""

    status: Status
    sector_size: int


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What is to be attached, and as what."""

    options: AttachOptions
    file: BackingFile
    block: Block | None
    """None if it is a regular file."""
    request: AttachRequest
    trusted: bool
    """Whether its filesystem and its devices are local, or an administrator vouches for them."""

    @property
    def may_hang(self) -> bool:
        """Whether calls on the file may wait for somebody, whoever trusts that they will end."""
        return self.block is None and not self.file.closes_quickly

    @property
    def needs_loop_device(self) -> bool:
        """Whether anything is asked for that a block device does not offer by itself."""
        block, request = self.block, self.request
        return (
            block is None
            or request.offset != 0
            or request.size_limit != 0
            or request.sector_size != block.sector_size
            or (request.partition_scan and not block.status.partition_scan)
            or (self.options.read_only is True and not block.status.read_only)
            or request.reference != b""
            or request.lock is not Lock.NONE
            or request.number is not None
            # Only a loop device can be told to stay.
            or self.options.lifetime == SYSTEM
        )


class Proposals:
    """Looks at what clients pass, in threads where that may wait."""

    def __init__(self, config: Config, threads: Threads) -> None:
        self._config = config
        self._threads = threads
        self._trusted = mounts.TRUSTED_FILESYSTEMS.union(config.trusted_filesystems)

    async def look(self, uid: int, fd: OwnedFd, options: AttachOptions) -> Proposal:
        """Make a proposal of an fd, which stays the caller's, and of options, in `uid`'s turn.

        Raises UnsupportedFile, UntrustedFilesystem, NoSuchDevice, TimedOut, OSError.
        """
        # Here where it cannot wait, as the way to a thread and back costs more than the look.
        if filesystem := backing_file.local_filesystem(fd.fileno()):
            file = backing_file.examine(fd.fileno(), filesystem)
        else:
            file = await self._with_copy(
                uid, fd, backing_file.examine, lambda file: file.closes_quickly
            )
        block = await self._look_at_block(uid, fd, file)
        return Proposal(
            options=options,
            file=file,
            block=block,
            request=self._request(file, options, block),
            # What is behind a block device is the kernel's, wherever its node is.
            trusted=block is not None or file.filesystem in self._trusted,
        )

    async def _look_at_block(self, uid: int, fd: OwnedFd, file: BackingFile) -> Block | None:
        block = file.identity.block
        if block is None:
            return None

        def look(block_fd: int) -> Block:
            status = query.block_status(block.number, read_only=not file.writable)
            return Block(status=status, sector_size=kernel.blksszget(block_fd))

        return await self._with_copy(uid, fd, look)

    async def _with_copy(
        self,
        uid: int,
        fd: OwnedFd,
        function: Callable[[int], _T],
        closes_quickly: Callable[[_T], bool] = lambda _: False,
    ) -> _T:
        """Call a function in a thread, with an fd of its own that it cannot lose meanwhile.

        What it returns may say that the fd can be closed at once.
        """
        copy = OwnedFd(kernel.dup(fd.fileno()), partial(self._threads.close_fd, owner=uid))

        def call() -> _T:
            with copy:
                result = function(copy.fileno())
                if closes_quickly(result):
                    block_device.opened(copy.release()).close()
                return result

        return await self._threads.run_in_turn(
            uid,
            Work.LOOK,
            call,
            timeout=self._config.deadlines.operation,
            unused=copy.close,
        )

    def _request(
        self, file: BackingFile, options: AttachOptions, block: Block | None
    ) -> AttachRequest:
        read_only, direct_io = options.read_only, options.direct_io
        sector_size = options.sector_size
        if sector_size is None and block:
            sector_size = block.sector_size
        elif sector_size is None and not options.probe_sector_size:
            sector_size = DEFAULT_SECTOR_SIZE
        return AttachRequest(
            # A sealed memfd is writable by its mode: saying nothing does not mean read-only.
            read_only=not (file.writable or file.sealed) if read_only is None else read_only,
            offset=options.offset,
            size_limit=options.size_limit,
            sector_size=sector_size,
            partition_scan=options.partition_scan,
            direct_io=self._config.direct_io if direct_io is None else direct_io,
            reference=options.reference,
            lock=options.lock,
            number=options.number,
        )
