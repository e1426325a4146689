# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases on devices that are there; Attach has a module of its own.

It knows neither D-Bus nor ioctls. What was decided before an `await` is decided again after it, and
whatever a step leaves behind is undone when a later one fails or the caller has left.
"""

import asyncio
import errno
import logging
import re
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from . import access, blockdev, kernel, loopdev, loopinfo, loopops, overlap
from .access import ROOT, Caller, Client, Operation
from .config import Config
from .device import ATTACHED, DETACHING, Device
from .errors import (
    Ambiguous,
    DeviceBusy,
    InvalidArgs,
    LoopError,
    NoSuchDevice,
    NotSupported,
)
from .fd import OwnedFd
from .leases import Leases
from .polkit import Authority
from .registry import Registry
from .tasks import Tasks
from .threads import Threads

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long Detach waits for udev and other short-lived openers.
_DETACH_WAIT = 1.0
# Seconds between the attempts to clear a device that others have open; the last one stays.
_CLEAR_PAUSES = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25)
# Past the end of any file.
_ANY_END = 1 << 64
# From this version on a loop device is never unbound before its last close.
_NEVER_UNBOUND_WHILE_OPEN = (6, 11)
_NODE = re.compile(r"(?:/dev/)?loop(0|[1-9]\d{0,6})", re.ASCII)


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
        registry: Registry,
        leases: Leases,
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._registry = registry
        self._leases = leases
        self._tasks = Tasks()

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
        named = await self._in_thread(partial(loopinfo.named_by, fd.move()))
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

    # --- operations on a device -----------------------------------------------------------------

    async def resize(self, caller: Caller, device: Device, options: ResizeOptions) -> int:
        """Change offset and limit, or take up the file's size; returns the new size in bytes."""
        await self._require(caller, Operation.RESIZE, device)
        size = await self._with_loop(
            caller,
            device,
            partial(
                loopops.resize,
                offset=options.offset,
                size_limit=options.size_limit,
                force=options.force,
            ),
            admit=partial(self._require_no_overlap, device, options),
        )
        await self._registry.refresh(device)
        return size

    def _require_no_overlap(self, device: Device, options: ResizeOptions) -> None:
        """Raise Overlap if the device would grow or move into what another one maps."""
        now = device.mapping
        start = device.status.offset if options.offset is None else options.offset
        limit = device.status.size_limit if options.size_limit is None else options.size_limit
        then = replace(now, start=start, end=start + limit if limit else _ANY_END)
        overlap.require_none(
            then,
            bound=(
                (other.node, other.mapping)
                for other in self._registry
                if other is not device and not now.conflicts_with(other.mapping)
            ),
            binding=(),
        )

    async def resize_by_fd(self, caller: Caller, fd: OwnedFd, options: ResizeOptions) -> int:
        """As `resize`, on what the fd names."""
        device, partition = await self._named(caller, fd)
        if partition:
            raise NotSupported("partitions cannot be resized yet: pass the device or its file")
        return await self.resize(caller, device, options)

    async def sync(self, caller: Caller, device: Device) -> None:
        """Write back what is dirty; the caller sees the error."""
        await self._require(caller, Operation.SYNC, device)
        await self._with_loop(caller, device, loopops.sync)

    async def open(self, caller: Caller, device: Device, writable: bool) -> OwnedFd:
        """A new fd on the device's node."""
        if caller.uid != ROOT and kernel.release() < _NEVER_UNBOUND_WHILE_OPEN:
            # CLR_FD by the last opener would unbind and leave it an fd on the next user's image.
            raise NotSupported("before Linux 6.11 only root may be given a device's fd")
        await self._require(caller, Operation.OPEN, device)
        fd = await self._with_loop(
            caller, device, partial(loopops.open_node, writable=writable), late=OwnedFd.close
        )
        with ExitStack() as failed:
            failed.callback(lambda: self._tasks.start(self._threads.run(fd.close)))
            caller.client.require_present()
            self._require_attached(device)
            failed.pop_all()
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
        self.let_go(device)
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
        caller: Caller,
        device: Device,
        function: Callable[[loopdev.LoopDevice], _T],
        late: Callable[[_T], object] = lambda _: None,
        admit: Callable[[], None] = lambda: None,
    ) -> _T:
        """Run a function on the device in a thread, whatever becomes of the device meanwhile."""
        timeout = self._config.deadlines.operation
        # Whoever has an fd of a device can put a file behind it that hangs.
        give_back = await self._threads.turn(caller.uid, timeout)
        with ExitStack() as failed:
            failed.callback(give_back)
            caller.client.require_present()
            self._require_attached(device)
            admit()
            # Borrowed here, where nothing can come between the check and the copy of the fd.
            borrowed = device.loop.borrow() if device.loop else None
            failed.pop_all()

        def operate() -> _T:
            with closing(borrowed or loopops.open_existing(device.number, binding)) as loop:
                try:
                    return function(loop)
                except OSError as exc:
                    if exc.errno == errno.ENXIO:
                        raise NoSuchDevice(f"{device.node} is gone") from exc
                    raise

        binding = device.status.binding
        return await self._threads.run(operate, timeout=timeout, late=late, ended=give_back)

    async def _in_thread(
        self, function: Callable[[], _T], late: Callable[[_T], object] = lambda _: None
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
                self.let_go(device)

    async def stop(self, timeout: float) -> None:
        """Let go of all our devices, and wait at most `timeout` seconds for the kernel.

        What remains carries autoclear, and goes when its last user closes it.
        """
        managed = [device for device in self._registry if device.managed]
        for device in managed:
            self.let_go(device)
        waits = [asyncio.ensure_future(device.gone.wait()) for device in managed]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout)
            for wait in late:
                wait.cancel()

    def let_go(self, device: Device) -> None:
        """Begin to detach; nothing to do if that has begun."""
        if device.ending:
            return
        device.ending = True
        device.state = DETACHING
        self._leases.end(device.path)
        device.lease = None
        self._registry.changed(device)
        self._tasks.start(self._clear(device))

    async def _clear(self, device: Device) -> None:
        def detach() -> tuple[loopdev.LoopDevice, bool]:
            loop = device.loop or loopops.open_existing(device.number, device.status.binding)
            return loop, loopdev.detach(loop)

        try:
            loop, cleared = await self._threads.run(detach)
        except (LoopError, OSError) as exc:
            # Someone else's, which is as it was.
            log.warning("cannot detach %s: %s", device.node, exc)
            if device.loop:
                raise
            device.state, device.ending = ATTACHED, False
            self._registry.changed(device)
            return
        pauses = iter(_CLEAR_PAUSES)
        pause = 0.0
        while not cleared:
            # The kernel tells nobody when another opener closes.
            pause = next(pauses, pause)
            await asyncio.sleep(pause)
            cleared = await self._threads.run(partial(loopdev.clear, loop))
        if kernel.loop_binding(device.number) != device.status.binding:
            self._registry.forget(device)
        # Else an operation still under way has it open, or others have someone else's device. The
        # kernel tells when it is unbound; it may just have.
        self._registry.look_at(device.number)

    def device_gone(self, device: Device) -> None:
        """Clean up after a device that the kernel has let go of, whoever caused that."""
        self._leases.end(device.path)
        if device.place:
            device.place.free()
        if device.loop:
            if not device.ending:
                # Behind our back, and our fds are still open.
                self._tasks.start(self._threads.run(device.loop.close))
            device.loop.release(False)
            self._threads.remove(loopdev.remove, device.number)
            log.info("%s is gone", device.node)
