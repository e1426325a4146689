# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach, from a passed fd to a recorded device: examine, authorize, admit, bind, record.

Admission is one synchronous step: nothing decided before an `await` is trusted after it. From there
on a task goes through to the end, and undoes what nobody waits for any more.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from . import access, backing, kernel, loopdev, loopinfo, overlap
from .access import ROOT, Caller
from .config import Config
from .device import ATTACHED, DETACHING, Device
from .errors import Failed, NotSupported, TimedOut
from .fd import OwnedFd
from .leases import CONNECTION, Lease, Leases, Place, Quota
from .marker import Markers
from .overlap import Mapping
from .polkit import Authority
from .registry import Registry
from .request import AttachRequest
from .tasks import Tasks
from .threads import Threads

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """What a client asks for; None means not given. Sizes and offsets in bytes."""

    read_only: bool | None = None
    offset: int = 0
    size_limit: int = 0
    sector_size: int = 512
    direct_io: bool | None = None
    reference: bytes = b""
    allow_overlap: bool = False


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
        let_go: Callable[[Device], None],
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._markers = markers
        self._registry = registry
        self._leases = leases
        self._let_go = let_go
        self._trusted = backing.TRUSTED_FILESYSTEMS.union(config.trusted_filesystems)
        self._quota = Quota(per_user=config.limits.devices_per_user, in_all=config.limits.devices)
        self._binding: set[Mapping] = set()
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
            if backing_file.identity.block_device:
                raise NotSupported("block devices cannot be attached yet: pass a regular file")
            request = self._request(backing_file, options)
            trusted = backing_file.filesystem in self._trusted
            if trusted:
                # Nobody is asked for a password only to be told that an option is wrong. What is
                # known of other files without asking may be stale: they are checked when bound.
                request.check(backing_file, backing_file.identity.size)
            await self._require_attach(caller, backing_file, request, trusted)
            caller.client.require_present()
            if self._stopping:
                raise Failed("loopd is stopping: try again")
            mapping = _mapping(backing_file, request)
            if not options.allow_overlap:
                overlap.require_none(
                    mapping,
                    bound=((device.node, device.mapping) for device in self._registry),
                    binding=self._binding,
                )
            # From here on a task of its own goes through to the end, whatever the caller does.
            abandoned = asyncio.Event()
            place = self._quota.take(caller.uid)
            self._binding.add(mapping)
            binding = self._tasks.start(
                self._bind(
                    caller,
                    file.move(),
                    backing_file,
                    request,
                    mapping,
                    place,
                    abandoned,
                    may_hang=not trusted,
                )
            )
        timeout = self._config.deadlines.operation
        await asyncio.wait([binding], timeout=timeout)
        if not binding.done():
            abandoned.set()
            raise TimedOut(f"the kernel did not attach the file within {timeout} s")
        return binding.result()

    def _request(self, file: backing.BackingFile, options: AttachOptions) -> AttachRequest:
        read_only, direct_io = options.read_only, options.direct_io
        return AttachRequest(
            # A sealed memfd is writable by its mode: saying nothing does not mean read-only.
            read_only=not (file.writable or file.sealed) if read_only is None else read_only,
            offset=options.offset,
            size_limit=options.size_limit,
            sector_size=options.sector_size,
            direct_io=self._config.direct_io if direct_io is None else direct_io,
            reference=options.reference,
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
            "filesystem": file.filesystem or "unknown",
            "size": str(file.identity.size),
        }
        for action in access.needed_to_attach(
            block_device=file.identity.block_device is not None,
            trusted=trusted,
        ):
            await self._authority.require(caller, action, details)

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
                diskseq=loop.diskseq,
                status=status,
                backing_device=backing_file.identity.device,
                backing_inode=backing_file.identity.inode,
                reference=request.reference,
                owner=caller.uid,
                loop=loop,
                state=ATTACHED if wanted else DETACHING,
                attached_at=time.time_ns() // 1000,
            )
            if wanted:
                device.lease = Lease(device.path, caller.uid, caller.client.name, CONNECTION)
                self._leases.grant(device.lease)
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


def _mapping(file: backing.BackingFile, request: AttachRequest) -> Mapping:
    """The bytes that the device would map."""
    size = request.size_limit or max(file.identity.size - request.offset, 0)
    return Mapping(
        device=file.identity.device,
        inode=file.identity.inode,
        start=request.offset,
        end=request.offset + size,
        writable=not request.read_only,
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
