# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases: authorize, admit, act, record, announce.

It knows neither D-Bus nor ioctls. What was decided before an `await` is decided again after it,
and whatever a step leaves behind is undone when a later one fails or the caller has left.
"""

import asyncio
import errno
import logging
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from . import access, backing, blockdev, kernel, loopdev, loopinfo, loopops, overlap
from .access import ROOT, Caller, Client, Operation
from .config import Config
from .device import ATTACHED, DETACHING, Device
from .errors import (
    Ambiguous,
    DeviceBusy,
    Failed,
    InvalidArgs,
    LoopError,
    NoSuchDevice,
    NotSupported,
    TimedOut,
)
from .fd import OwnedFd
from .leases import CONNECTION, Lease, Leases, Place, Quota
from .marker import Markers
from .overlap import Mapping
from .polkit import Authority
from .registry import Registry
from .tasks import Tasks
from .threads import Threads

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long Detach waits for udev and other short-lived openers.
_DETACH_WAIT = 1.0
# From this version on a loop device is never unbound before its last close.
_NEVER_UNBOUND_WHILE_OPEN = (6, 11)
_NODE = re.compile(r"(?:/dev/)?loop(0|[1-9]\d{0,6})", re.ASCII)


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


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """What a client asks for; None means as it is, in bytes."""

    offset: int | None = None
    size_limit: int | None = None
    force: bool = False


class Manager:
    """All devices of the machine, and everything that can be done to them."""

    def __init__(
        self,
        config: Config,
        threads: Threads,
        authority: Authority,
        markers: Markers,
        registry: Registry,
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._markers = markers
        self._registry = registry
        self._trusted = backing.TRUSTED_FILESYSTEMS.union(config.trusted_filesystems)
        self._leases = Leases()
        self._quota = Quota(per_user=config.limits.devices_per_user, in_all=config.limits.devices)
        self._binding: set[Mapping] = set()
        self._stopping = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    # --- finding --------------------------------------------------------------------------------

    def device_by_node(self, name: str) -> Device:
        """The device called /dev/loop3 or loop3.

        Raises InvalidArgs, NoSuchDevice.
        """
        match = _NODE.fullmatch(name)
        if not match:
            raise InvalidArgs("node: not of the form /dev/loop3 or loop3")
        device = self._registry.numbered(int(match[1]))
        if device is None:
            raise NoSuchDevice(f"loop{int(match[1])} has no file attached")
        return device

    async def device_by_fd(self, caller: Caller, fd: OwnedFd) -> Device:
        """The device that a passed fd names, see `_named`."""
        device, _ = await self._named(caller, fd)
        return device

    async def _named(self, caller: Caller, fd: OwnedFd) -> tuple[Device, bool]:
        """The device that an fd names, and whether by a partition.

        That is the loop device it is open on, or has a partition open, else the one whose backing
        file it is: the caller's own come first. Takes the fd over.
        Raises NoSuchDevice, Ambiguous.
        """
        # Closed in the thread, and before anything else: it may be an opener of the device.
        named = await self._in_thread(partial(loopinfo.named_by, OwnedFd(fd.release())))
        if named.number is not None:
            return self.device_by_node(f"loop{named.number}"), named.partition
        file = named.file
        found = [
            device
            for device in self._registry
            if (device.backing_device, device.backing_inode) == (file.device, file.inode)
        ]
        found = [device for device in found if device.owner == caller.uid] or found
        found = [device for device in found if device.state == ATTACHED] or found
        if not found:
            raise NoSuchDevice("the file is not attached to a loop device")
        if len(found) > 1:
            nodes = ", ".join(sorted(device.node for device in found))
            raise Ambiguous(f"the file is attached more than once ({nodes}): name the device")
        return found[0], False

    # --- attach ---------------------------------------------------------------------------------

    async def attach(self, caller: Caller, file: OwnedFd, options: AttachOptions) -> Device:
        """Attach a file for as long as the caller's connection lasts. Takes the fd over."""
        with file:
            backing_file = await self._in_thread(partial(backing.examine, file.fileno()))
            if backing_file.identity.block_device:
                raise NotSupported("block devices cannot be attached yet: pass a regular file")
            request = self._request(backing_file, options)
            trusted = backing_file.filesystem in self._trusted
            if trusted:
                # Nobody is asked for a password only to be told that an option is wrong. What is
                # known of other files without asking may be stale: they are checked when bound.
                loopdev.check_request(backing_file, request, backing_file.identity.size)
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
                self._bind(caller, file.move(), backing_file, request, mapping, place, abandoned)
            )
        timeout = self._config.deadlines.operation
        await asyncio.wait([binding], timeout=timeout)
        if not binding.done():
            abandoned.set()
            raise TimedOut(f"the kernel did not attach the file within {timeout} s")
        return binding.result()

    def _request(self, file: backing.BackingFile, options: AttachOptions) -> loopdev.AttachRequest:
        read_only, direct_io = options.read_only, options.direct_io
        return loopdev.AttachRequest(
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
        request: loopdev.AttachRequest,
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
        request: loopdev.AttachRequest,
        mapping: Mapping,
        place: Place,
        abandoned: asyncio.Event,
    ) -> Device:
        """Attach in a thread and record it, or undo it if nobody waits for it any more."""
        with place, ExitStack() as admitted:
            admitted.callback(self._binding.discard, mapping)
            loop, status = await self._threads.run(
                partial(_attach, file, backing_file, request, partial(self._claim, caller.uid))
            )
            device = Device(
                number=loop.number,
                diskseq=loop.diskseq,
                status=status,
                backing_device=backing_file.identity.device,
                backing_inode=backing_file.identity.inode,
                reference=request.reference,
                owner=caller.uid,
                loop=loop,
                place=place.keep(),
                attached_at=time.time_ns() // 1000,
            )
            device.lease = Lease(device.path, caller.uid, caller.client.name, CONNECTION)
            self._leases.grant(device.lease)
            self._registry.record(device)
        if caller.client.gone or abandoned.is_set() or self._stopping:
            # It ends as any other does: counted and marked until the kernel has let go of it.
            log.info("%s was attached for nobody", device.node)
            self._let_go(device)
            raise Failed("the attach was given up")
        log.info("attached %s for uid %d, %s", device.node, caller.uid, caller.client.name)
        return device

    def _claim(self, uid: int, number: int) -> Callable[[bool], None]:
        """Take a number from the thread that is about to bind it."""
        release = self._markers.claim(number, unprivileged=uid != ROOT)

        def undo(still_bound: bool) -> None:
            release(still_bound)
            # Someone else may have bound it, which nobody looked at while it was ours.
            self._loop.call_soon_threadsafe(self._registry.look_at, number)

        return undo

    # --- operations on a device -----------------------------------------------------------------

    async def resize(self, caller: Caller, device: Device, options: ResizeOptions) -> int:
        """Change offset and limit, or take up the file's size; returns the new size in bytes."""
        await self._require(caller, Operation.RESIZE, device)
        size = await self._with_loop(
            device,
            partial(
                loopops.resize,
                offset=options.offset,
                size_limit=options.size_limit,
                force=options.force,
            ),
        )
        await self._registry.refresh(device)
        return size

    async def resize_by_fd(self, caller: Caller, fd: OwnedFd, options: ResizeOptions) -> int:
        """As `resize`, on what the fd names."""
        device, partition = await self._named(caller, fd)
        if partition:
            raise NotSupported("partitions cannot be resized yet: pass the device or its file")
        return await self.resize(caller, device, options)

    async def sync(self, caller: Caller, device: Device) -> None:
        """Write back what is dirty; the caller sees the error."""
        await self._require(caller, Operation.SYNC, device)
        await self._with_loop(device, loopops.sync)

    async def open(self, caller: Caller, device: Device, writable: bool) -> OwnedFd:
        """A new fd on the device's node."""
        if caller.uid != ROOT and kernel.release() < _NEVER_UNBOUND_WHILE_OPEN:
            # CLR_FD by the last opener would unbind and leave it an fd on the next user's image.
            raise NotSupported("before Linux 6.11 only root may be given a device's fd")
        await self._require(caller, Operation.OPEN, device)
        fd = await self._with_loop(
            device, partial(loopops.open_node, writable=writable), late=OwnedFd.close
        )
        try:
            caller.client.require_present()
            self._require_attached(device)
        except LoopError:
            fd.close()
            raise
        return fd

    async def detach(self, caller: Caller, device: Device, *, lazy: bool = False) -> bool:
        """Detach; whether it is gone, or the kernel will finish at the last close."""
        await self._require(caller, Operation.DETACH, device)
        if not lazy and device.state == ATTACHED:
            if await self._in_thread(partial(blockdev.in_use, device.number)):
                raise DeviceBusy(
                    f"{device.node} is mounted or exclusively open: unmount it first, or pass lazy"
                )
            self._require_known(device)
            caller.client.require_present()
        self._let_go(device)
        try:
            await asyncio.wait_for(device.gone.wait(), _DETACH_WAIT)
        except TimeoutError:
            return False
        return True

    async def detach_by_fd(self, caller: Caller, fd: OwnedFd, *, lazy: bool) -> bool:
        """As `detach`, on what the fd names."""
        device, _ = await self._named(caller, fd)
        return await self.detach(caller, device, lazy=lazy)

    async def _require(self, caller: Caller, operation: Operation, device: Device) -> None:
        """Return when the caller may do this, is still there, and so is the device."""
        for action in access.needed_for(operation, access.relation(caller.uid, device.owner)):
            details = {"device": device.node}
            await self._authority.require(caller, action, details)
        caller.client.require_present()
        self._require_known(device)

    def _require_known(self, device: Device) -> None:
        if not self._registry.knows(device):
            raise NoSuchDevice(f"{device.node} is gone")

    def _require_attached(self, device: Device) -> None:
        self._require_known(device)
        if device.state != ATTACHED:
            raise NoSuchDevice(f"{device.node} is detached and goes when its last user closes it")

    async def _with_loop(
        self,
        device: Device,
        function: Callable[[loopdev.LoopDevice], _T],
        late: Callable[[_T], object] = lambda result: None,
    ) -> _T:
        """Run a function on the device in a thread, whatever becomes of the device meanwhile."""
        self._require_attached(device)
        # Borrowed here, where nothing can come between the check and the copy of the fd.
        borrowed = device.loop.borrow() if device.loop else None

        def operate() -> _T:
            with closing(borrowed or loopops.open_existing(device.number, device.diskseq)) as loop:
                try:
                    return function(loop)
                except OSError as exc:
                    if exc.errno == errno.ENXIO:
                        raise NoSuchDevice(f"{device.node} is gone") from exc
                    raise

        return await self._in_thread(operate, late)

    async def _in_thread(
        self, function: Callable[[], _T], late: Callable[[_T], object] = lambda result: None
    ) -> _T:
        return await self._threads.run(
            function, timeout=self._config.deadlines.operation, late=late
        )

    # --- the end of a device --------------------------------------------------------------------

    def client_left(self, client: Client) -> None:
        """Let go of all that a connection held."""
        for lease in self._leases.held_by(client.name):
            if device := self._registry.at(lease.device):
                log.info("%s has left: detaching %s", client.name, device.node)
                self._let_go(device)

    def refuse_attach(self) -> None:
        """Attach nothing any more, also in calls that are under way."""
        self._stopping = True

    async def stop(self, timeout: float) -> None:
        """Let go of all our devices, and wait at most `timeout` seconds for the kernel.

        What remains carries autoclear, and goes when its last user closes it.
        """
        managed = [device for device in self._registry if device.managed]
        for device in managed:
            self._let_go(device)
        waits = [asyncio.ensure_future(device.gone.wait()) for device in managed]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout)
            for wait in late:
                wait.cancel()

    def _let_go(self, device: Device) -> None:
        """Begin to detach; nothing to do if that has begun."""
        if device.state == DETACHING:
            return
        device.state = DETACHING
        self._leases.end(device.path)
        device.lease = None
        self._registry.changed(device)
        self._tasks.start(self._clear(device))

    async def _clear(self, device: Device) -> None:
        def clear() -> bool:
            loop = device.loop or loopops.open_existing(device.number, device.diskseq)
            loopdev.detach(loop)
            return kernel.loop_bound(device.number)

        try:
            bound = await self._threads.run(clear)
        except (LoopError, OSError) as exc:
            log.warning("cannot detach %s: %s", device.node, exc)
            bound = True
        if not bound:
            self._registry.forget(device)
        else:
            # Others have it open. The kernel tells when it is unbound; it may just have.
            self._registry.look_at(device.number)

    def device_gone(self, device: Device) -> None:
        """Clean up after a device that the kernel has let go of, whoever caused that."""
        self._leases.end(device.path)
        if device.place:
            device.place.free()
        if device.loop:
            if device.state == ATTACHED:
                # Behind our back, and our fds are still open.
                self._tasks.start(self._threads.run(device.loop.close))
            device.loop.release(False)
            self._threads.remove(loopdev.remove, device.number)
            log.info("%s is gone", device.node)


def _mapping(file: backing.BackingFile, request: loopdev.AttachRequest) -> Mapping:
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
    request: loopdev.AttachRequest,
    claim: loopdev.Claim,
) -> tuple[loopdev.LoopDevice, loopinfo.Status]:
    loop = loopdev.attach(file, backing_file, request, claim)
    try:
        return loop, loopinfo.status(loop.number)
    except BaseException:
        loopdev.detach(loop)
        loop.release(kernel.loop_bound(loop.number))
        raise
