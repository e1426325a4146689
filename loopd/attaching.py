# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach, from a passed fd to a recorded device: examine, authorize, admit, bind, record.

Admission is one synchronous step: nothing decided before an `await` is trusted after it. From there
on a task goes through to the end, and undoes what nobody waits for any more.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from . import access, backing, kernel, loopdev, loopinfo, overlap
from .access import ROOT, Caller
from .blockdev import Lock
from .config import Config
from .device import ATTACHED, DETACHING, Device
from .errors import Failed, TimedOut
from .fd import OwnedFd
from .leases import CONNECTION, Lease, Leases, Place, Quota
from .locks import Locks
from .loopinfo import Status
from .marker import Markers
from .overlap import Mapping
from .polkit import Authority
from .registry import Registry
from .request import DEFAULT_SECTOR_SIZE, AttachRequest
from .tasks import Tasks
from .threads import Threads

log = logging.getLogger(__name__)


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
    allow_overlap: bool = False
    number: int | None = None


@dataclass(frozen=True)
class _Binding:
    """A file that is being bound, for somebody who may give up waiting."""

    task: asyncio.Task[Device]
    abandoned: asyncio.Event


class Attaching:
    """The use case, with what it needs; `let_go` begins to detach a device."""

    def __init__(
        self,
        config: Config,
        threads: Threads,
        authority: Authority,
        markers: Markers,
        registry: Registry,
        leases: Leases,
        locks: Locks,
        let_go: Callable[[Device], None],
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._markers = markers
        self._registry = registry
        self._leases = leases
        self._locks = locks
        self._let_go = let_go
        self._trusted = backing.TRUSTED_FILESYSTEMS.union(config.trusted_filesystems)
        self._quota = Quota(per_user=config.limits.devices_per_user, in_all=config.limits.devices)
        self._binding: set[Mapping] = set()
        self._counter = itertools.count(1)
        self._stopping = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    def refuse(self) -> None:
        """Attach nothing any more, also in calls that are under way."""
        self._stopping = True

    async def attach(self, caller: Caller, file: OwnedFd, options: AttachOptions) -> Device:
        """Attach a file for as long as the caller's connection lasts. Takes the fd over."""
        with file:
            backing_file = await self._threads.run(
                partial(backing.examine, file.fileno()), timeout=self._config.deadlines.operation
            )
            block = await self._status_of_block(backing_file)
            request = self._request(backing_file, options, block)
            # What is behind a block device is the kernel's, wherever its node is.
            trusted = bool(block) or backing_file.filesystem in self._trusted
            if trusted:
                # Nobody is asked for a password only to be told that an option is wrong. What is
                # known of other files without asking may be stale: they are checked when bound.
                request.check(backing_file, backing_file.size)
            await self._require_attach(caller, backing_file, request, trusted)
            block = await self._status_of_block(backing_file)  # it may be another one by now
            caller.client.require_present()
            if self._stopping:
                raise Failed("loopd is stopping: try again")
            if block and not _needs_loop_device(options, request, block):
                return self._hold(caller, file, backing_file, block)
            binding = self._admit(
                caller, file, backing_file, request, options.allow_overlap, may_hang=not trusted
            )
        timeout = self._config.deadlines.operation
        await asyncio.wait([binding.task], timeout=timeout)
        if not binding.task.done():
            binding.abandoned.set()
            raise TimedOut(f"the kernel did not attach the file within {timeout} s")
        return binding.task.result()

    async def _status_of_block(self, file: backing.BackingFile) -> Status | None:
        """How a block device is that was passed; None if it is a file."""
        block = file.identity.block
        if block is None:
            return None
        return await self._threads.look(
            partial(loopinfo.block_status, block.number, read_only=not file.writable)
        )

    def _request(
        self, file: backing.BackingFile, options: AttachOptions, block: Status | None
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

    async def _require_attach(
        self,
        caller: Caller,
        file: backing.BackingFile,
        request: AttachRequest,
        trusted: bool,
    ) -> None:
        details = {
            "read-only": str(request.read_only).lower(),
            "lifetime": CONNECTION,
            "filesystem": file.filesystem or ("none" if file.identity.block else "unknown"),
            "size": str(file.size),
        }
        if request.number is not None:
            details["device"] = loopinfo.node(request.number)
        for action in access.needed_to_attach(
            block_device=file.identity.block is not None,
            trusted=trusted,
            wants_number=request.number is not None,
        ):
            await self._authority.require(caller, action, details)

    # --- block devices that need no loop device -------------------------------------------------

    def _hold(
        self, caller: Caller, fd: OwnedFd, file: backing.BackingFile, status: Status
    ) -> Device:
        """Record a block device as its own: nothing is bound, and nothing will be cleared."""
        with self._quota.take(caller.uid) as place:
            device = Device(
                number=None,
                name=status.backing_file.removeprefix(b"/dev/").decode().replace("/", "!"),
                diskseq=status.diskseq,
                which=next(self._counter),
                status=status,
                file=file.identity,
                owner=caller.uid,
                attached_at=_now(),
            )
            # Closed as what it is: no filesystem has a say in it.
            device.held = OwnedFd(fd.release(), kernel.close)
            device.place = place.keep()
        self._grant(device, caller)
        self._registry.record(device)
        return device

    def _grant(self, device: Device, caller: Caller) -> None:
        device.lease = Lease(device.path, caller.uid, caller.client.name, CONNECTION)
        self._leases.grant(device.lease)

    # --- all others -----------------------------------------------------------------------------

    def _admit(
        self,
        caller: Caller,
        file: OwnedFd,
        backing_file: backing.BackingFile,
        request: AttachRequest,
        allow_overlap: bool,
        *,
        may_hang: bool,
    ) -> "_Binding":
        """Check overlap and quota, and begin to bind; from here on a task goes to the end."""
        size = request.size_limit or max(backing_file.size - request.offset, 0)
        mapping = Mapping.of(
            backing_file.identity, request.offset, size, writable=not request.read_only
        )
        if not allow_overlap:
            overlap.require_none(
                mapping,
                bound=(
                    (device.node, device.mapping) for device in self._registry if device.mapping
                ),
                binding=self._binding,
            )
        abandoned = asyncio.Event()
        place = self._quota.take(caller.uid)
        self._binding.add(mapping)
        task = self._tasks.start(
            self._bind(
                caller,
                file.move(),
                backing_file,
                request,
                mapping,
                place,
                abandoned,
                may_hang=may_hang,
            )
        )
        return _Binding(task, abandoned)

    async def _bind(
        self,
        caller: Caller,
        file: OwnedFd,
        backing_file: backing.BackingFile,
        request: AttachRequest,
        mapping: Mapping,
        place: Place,
        abandoned: asyncio.Event,
        *,
        may_hang: bool,
    ) -> Device:
        """Attach in a thread and record it, or undo it if nobody waits for it any more."""
        with place, ExitStack() as admitted:
            admitted.callback(self._binding.discard, mapping)
            loop, status = await self._threads.run(
                partial(
                    _attach,
                    file,
                    backing_file,
                    request,
                    partial(self._claim, caller.uid),
                    may_hang,
                )
            )
            unrecorded = admitted.enter_context(ExitStack())
            unrecorded.callback(self._drop, loop)
            wanted = not (caller.client.gone or abandoned.is_set() or self._stopping)
            device = Device(
                number=loop.number,
                name=f"loop{loop.number}",
                diskseq=loop.diskseq,
                status=status,
                file=backing_file.identity,
                reference=request.reference,
                owner=caller.uid,
                loop=loop,
                state=ATTACHED if wanted else DETACHING,
                attached_at=_now(),
            )
            if wanted:
                self._grant(device, caller)
                if loop.lock:
                    self._locks.note(device, caller.client, request.lock)
            self._registry.record(device)
            device.place = place.keep()
            unrecorded.pop_all()
        if not wanted:
            # It ends as any other does: counted and marked until the kernel has let go of it.
            log.info("%s was attached for nobody", device.node)
            self._let_go(device)
            raise Failed("the attach was given up")
        log.info("attached %s for uid %d, %s", device.node, caller.uid, caller.client.name)
        return device

    def _drop(self, loop: loopdev.LoopDevice) -> None:
        """Detach what a failure has left bound and unrecorded."""
        self._tasks.start(self._threads.run(partial(_undo, loop)))

    def _claim(self, uid: int, number: int) -> Callable[[bool], None]:
        """Take a number from the thread that is about to bind it."""
        release = self._markers.claim(number, unprivileged=uid != ROOT)

        def undo(still_bound: bool) -> None:
            release(still_bound)
            # Someone else may have bound it, which nobody looked at while it was ours.
            self._loop.call_soon_threadsafe(self._registry.look_at, number)

        return undo


def _now() -> int:
    return time.time_ns() // 1000


def _needs_loop_device(options: AttachOptions, request: AttachRequest, block: Status) -> bool:
    """Whether anything is asked for that a block device does not offer by itself."""
    return bool(
        request.offset
        or request.size_limit
        or request.sector_size != block.sector_size
        or (request.partition_scan and not block.partition_scan)
        or (options.read_only and not block.read_only)
        or request.reference
        or request.lock is not Lock.NONE
        or request.number is not None
    )


def _attach(
    file: OwnedFd,
    backing_file: backing.BackingFile,
    request: AttachRequest,
    claim: loopdev.Claim,
    may_hang: bool,
) -> tuple[loopdev.LoopDevice, loopinfo.Status]:
    loop = loopdev.attach(file, backing_file, request, claim, may_hang=may_hang)
    try:
        return loop, loopinfo.status(loop.number)
    except BaseException:
        _undo(loop)
        raise


def _undo(loop: loopdev.LoopDevice) -> None:
    if not loopdev.detach(loop):
        # No client has ever had it, so nobody turns autoclear off.
        loop.close()
    loop.release(kernel.loop_bound(loop.number))
