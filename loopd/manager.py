# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases: authorize, admit, act, record, announce.

It knows neither D-Bus nor ioctls. What was decided before an `await` is decided again after it,
and whatever a step leaves behind is undone when a later one fails or the caller has left.
"""

import asyncio
import errno
import logging
import re
from collections.abc import Callable, Coroutine, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from . import access, backing, blockdev, kernel, loopdev
from .access import ROOT, Caller, Client, Operation
from .config import Config
from .device import ATTACHED, DETACHING, Device
from .errors import (
    AccessDenied,
    Ambiguous,
    DeviceBusy,
    InvalidArgs,
    LoopError,
    NoSuchDevice,
    NotSupported,
    TimedOut,
)
from .fd import OwnedFd
from .leases import CONNECTION, Lease, Leases, Place, Quota
from .marker import Markers
from .polkit import Authority
from .threads import Threads

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long Detach waits for udev and other short-lived openers.
_DETACH_WAIT = 1.0
# How long a foreign device is asked for what sysfs does not show.
_FOREIGN_TIMEOUT = 2.0
# From this version on a loop device is never unbound before its last close.
_NEVER_UNBOUND_WHILE_OPEN = (6, 11)
_NODE = re.compile(r"(?:/dev/)?loop(\d{1,7})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """What a client asks for; None means not given. Sizes and offsets in bytes."""

    read_only: bool | None = None
    offset: int = 0
    size_limit: int = 0
    sector_size: int = 512
    direct_io: bool | None = None
    reference: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who is told of devices, each time before the caller that caused it has its answer."""

    added: Callable[[Device], None]
    changed: Callable[[Device], None]
    removed: Callable[[Device], None]


class Manager:
    """All devices of the machine, and everything that can be done to them."""

    def __init__(
        self,
        config: Config,
        threads: Threads,
        authority: Authority,
        markers: Markers,
        listeners: Listeners,
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._markers = markers
        self._listeners = listeners
        self._trusted = backing.TRUSTED_FILESYSTEMS.union(config.trusted_filesystems)
        self._leases = Leases()
        self.quota = Quota(
            per_user=config.limits.devices_per_user, in_all=config.limits.devices
        )
        self._devices: dict[str, Device] = {}
        self._by_number: dict[int, Device] = {}
        self._loop = asyncio.get_running_loop()
        self._looking: dict[int, bool] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- finding --------------------------------------------------------------------------------

    @property
    def devices(self) -> Iterable[Device]:
        """All devices, ours and others'."""
        return self._devices.values()

    def device_at(self, path: str) -> Device | None:
        """The device with this object path."""
        return self._devices.get(path)

    def device_by_node(self, name: str) -> Device:
        """The device called /dev/loop3 or loop3.

        Raises InvalidArgs, NoSuchDevice.
        """
        match = _NODE.fullmatch(name)
        if not match:
            raise InvalidArgs("node: not of the form /dev/loop3 or loop3")
        device = self._by_number.get(int(match[1]))
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
        named = await self._in_thread(partial(loopdev.named_by, OwnedFd(fd.release())))
        if named.number is not None:
            return self.device_by_node(f"loop{named.number}"), named.partition
        file = named.file
        found = [
            device
            for device in self._devices.values()
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
            await self._require_attach(caller, backing_file, request)
            caller.client.require_present()
            # From here on a task of its own goes through to the end, whatever the caller does.
            abandoned = asyncio.Event()
            place = self.quota.take(caller.uid)
            binding = self._start(
                self._bind(caller, file.move(), backing_file, request, place, abandoned)
            )
        timeout = self._config.deadlines.operation
        await asyncio.wait([binding], timeout=timeout)
        if not binding.done():
            abandoned.set()
            raise TimedOut(f"the kernel did not attach the file within {timeout} s")
        return binding.result()

    def _request(
        self, file: backing.BackingFile, options: AttachOptions
    ) -> loopdev.AttachRequest:
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
        self, caller: Caller, file: backing.BackingFile, request: loopdev.AttachRequest
    ) -> None:
        details = {
            "read-only": str(request.read_only).lower(),
            "lifetime": CONNECTION,
            "filesystem": file.filesystem or "unknown",
            "size": str(file.identity.size),
        }
        for action in access.needed_to_attach(
            block_device=file.identity.block_device is not None,
            trusted=file.filesystem in self._trusted,
        ):
            await self._authority.require(caller, action, details)

    async def _bind(
        self,
        caller: Caller,
        file: OwnedFd,
        backing_file: backing.BackingFile,
        request: loopdev.AttachRequest,
        place: Place,
        abandoned: asyncio.Event,
    ) -> Device:
        """Attach in a thread and record it, or undo it if nobody waits for it any more."""
        with place:
            loop, status = await self._threads.run(
                partial(_attach, file, backing_file, request, partial(self._claim, caller.uid))
            )
            if caller.client.gone or abandoned.is_set():
                log.info("%s was attached for a caller that has left", loop.node)
                await self._threads.run(partial(loopdev.detach, loop))
                loop.release_mark()
                self._threads.remove(loopdev.remove, loop.number)
                raise AccessDenied("the caller has left the bus")
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
            )
            device.lease = Lease(device.path, caller.uid, caller.client.name, CONNECTION)
            self._leases.grant(device.lease)
            self._record(device)
        log.info("attached %s for uid %d, %s", device.node, caller.uid, caller.client.name)
        return device

    def _claim(self, uid: int, number: int) -> Callable[[], None]:
        """Take a number from the thread that is about to bind it."""
        release = self._markers.claim(number, unprivileged=uid != ROOT)

        def undo() -> None:
            release()
            # Someone else may have bound it, which nobody looked at while it was ours.
            self._loop.call_soon_threadsafe(self.look_at, number)

        return undo

    def _record(self, device: Device) -> None:
        if former := self._by_number.get(device.number):
            self._gone(former)  # the kernel's event about it is still on its way
        self._devices[device.path] = device
        self._by_number[device.number] = device
        self._listeners.added(device)

    # --- operations on a device -----------------------------------------------------------------

    async def resize(
        self,
        caller: Caller,
        device: Device,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
    ) -> int:
        """Change offset and limit, or take up the file's size; returns the new size in bytes."""
        await self._require(caller, Operation.RESIZE, device)
        size = await self._with_loop(
            device, partial(loopdev.resize, offset=offset, size_limit=size_limit, force=force)
        )
        await self._refresh(device)
        return size

    async def resize_by_fd(
        self, caller: Caller, fd: OwnedFd, *, offset: int | None, size_limit: int | None, force: bool
    ) -> int:
        """As `resize`, on what the fd names."""
        device, partition = await self._named(caller, fd)
        if partition:
            raise NotSupported("partitions cannot be resized yet: pass the device or its file")
        return await self.resize(caller, device, offset=offset, size_limit=size_limit, force=force)

    async def sync(self, caller: Caller, device: Device) -> None:
        """Write back what is dirty; the caller sees the error."""
        await self._require(caller, Operation.SYNC, device)
        await self._with_loop(device, loopdev.sync)

    async def open(self, caller: Caller, device: Device, *, writable: bool) -> OwnedFd:
        """A new fd on the device's node."""
        if caller.uid != ROOT and kernel.release() < _NEVER_UNBOUND_WHILE_OPEN:
            # CLR_FD by the last opener would unbind and leave it an fd on the next user's image.
            raise NotSupported("before Linux 6.11 only root may be given a device's fd")
        await self._require(caller, Operation.OPEN, device)
        fd = await self._with_loop(
            device, partial(loopdev.open_node, writable=writable), late=OwnedFd.close
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
        if self._devices.get(device.path) is not device:
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
            with closing(borrowed or loopdev.open_existing(device.number, device.diskseq)) as loop:
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
            device = self._devices[lease.device]
            log.info("%s has left: detaching %s", client.name, device.node)
            self._let_go(device)

    async def stop(self, timeout: float) -> None:
        """Let go of all our devices, and wait at most `timeout` seconds for the kernel.

        What remains carries autoclear, and goes when its last user closes it.
        """
        managed = [device for device in self._devices.values() if device.managed]
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
        self._listeners.changed(device)
        self._start(self._clear(device))

    async def _clear(self, device: Device) -> None:
        def clear() -> bool:
            loop = device.loop or loopdev.open_existing(device.number, device.diskseq)
            loopdev.detach(loop)
            return kernel.loop_bound(device.number)

        try:
            bound = await self._threads.run(clear)
        except (LoopError, OSError) as exc:
            log.warning("cannot detach %s: %s", device.node, exc)
            bound = True
        if not bound and self._devices.get(device.path) is device:
            self._gone(device)
        else:
            # Others have it open. The kernel tells when it is unbound; it may just have.
            self.look_at(device.number)

    def _gone(self, device: Device) -> None:
        """Forget a device that the kernel has let go of."""
        del self._devices[device.path]
        if self._by_number.get(device.number) is device:
            del self._by_number[device.number]
        self._leases.end(device.path)
        if device.place:
            device.place.free()
        device.gone.set()
        self._listeners.removed(device)
        if device.loop:
            if device.state == ATTACHED:
                # Behind our back; our fds are still open.
                self._start(self._threads.run(device.loop.close))
            device.loop.release_mark()
            self._threads.remove(loopdev.remove, device.number)
            log.info("%s is gone", device.node)

    # --- what the kernel says -------------------------------------------------------------------

    async def look_at_all(self) -> None:
        """Look at every loop device there is."""
        numbers = await self._threads.run(kernel.loop_numbers)
        await asyncio.gather(*(self._look(number) for number in {*numbers, *self._by_number}))

    def look_at(self, number: int | None) -> None:
        """Something about a loop device changed; None means that it may be any."""
        if number is None:
            self._start(self.look_at_all())
        elif number in self._looking:
            self._looking[number] = True  # and once more, when that look is over
        else:
            self._start(self._look(number))

    async def _look(self, number: int) -> None:
        again = True
        while again:
            self._looking[number] = False
            known = self._by_number.get(number)
            seen = await self._threads.run(partial(_sight, number))
            if self._by_number.get(number) is known:
                await self._compare(number, known, seen)
            else:
                self._looking[number] = True
            again = self._looking[number]
        del self._looking[number]

    async def _compare(
        self, number: int, known: Device | None, seen: loopdev.Status | None
    ) -> None:
        if known is None:
            if seen and not self._markers.claimed(number):
                await self._discover(number, seen)
        elif seen is None:
            self._gone(known)
        elif seen.diskseq != known.diskseq and not known.managed:
            self._gone(known)
            self._looking[number] = True
        elif seen != known.status:
            # A raised diskseq on a device of ours is a CHANGE_FD by a client with an fd: while
            # we hold our own fd, nobody else can have the number.
            known.status = seen
            self._listeners.changed(known)

    async def _discover(self, number: int, status: loopdev.Status) -> None:
        """Record a device that someone else set up."""
        device = Device(number=number, diskseq=status.diskseq, status=status)
        try:
            told = await self._threads.run(
                partial(loopdev.binding, number), timeout=_FOREIGN_TIMEOUT
            )
        except LoopError as exc:
            log.debug("%s does not say what it is bound to: %s", device.node, exc)
        else:
            if told.diskseq == status.diskseq:
                device.backing_device = told.backing_device
                device.backing_inode = told.backing_inode
                device.reference = told.reference
        if number not in self._by_number and not self._markers.claimed(number):
            self._record(device)

    async def _refresh(self, device: Device) -> None:
        """Take up what an operation of ours has changed, before its caller has the answer."""
        status = await self._threads.run(partial(_sight, device.number))
        if status and self._devices.get(device.path) is device and status != device.status:
            device.status = status
            self._listeners.changed(device)

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run in the background, with a reference that keeps it alive."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        exc = None if task.cancelled() else task.exception()
        if exc and not isinstance(exc, LoopError | OSError):
            log.error("a task failed", exc_info=exc)


def _attach(
    file: OwnedFd,
    backing_file: backing.BackingFile,
    request: loopdev.AttachRequest,
    claim: Callable[[int], Callable[[], None]],
) -> tuple[loopdev.LoopDevice, loopdev.Status]:
    loop = loopdev.attach(file, backing_file, request, claim)
    try:
        return loop, loopdev.status(loop.number)
    except BaseException:
        loopdev.detach(loop)
        loop.release_mark()
        raise


def _sight(number: int) -> loopdev.Status | None:
    try:
        return loopdev.status(number)
    except NoSuchDevice:
        return None
