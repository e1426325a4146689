# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases on a device that is there: resize, set, lock, sync, scan, open.

Each is authorized first, done in a thread, and taken up by the registry before its caller has the
answer. Whatever a step leaves behind is undone when the caller has left.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

from loopd.daemon import access
from loopd.daemon.access import ROOT, Caller, Operation
from loopd.daemon.devices import overlap
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.leases import CONNECTION, SYSTEM
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.locks import Locks
from loopd.daemon.devices.registry import Registry
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.host.uevent_budget import PARTITION, Uevents
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.errors import AccessDenied, DeviceBusy, InvalidArgs, NotSupported
from loopd.fd import OwnedFd
from loopd.loop import block_device, kernel, loop_device, query
from loopd.loop import change as loop_change
from loopd.loop.block_device import Lock

from .guard import Manager

_T = TypeVar("_T")

# Past the end of any file.
_ANY_END = 1 << 64


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """What a client asks for; None means as it is, in bytes."""

    offset: int | None = None
    size_limit: int | None = None
    force: bool = False
    allow_overlap: bool = False


class _Found(NamedTuple):
    """What a change has left, beside its result."""

    sector_size: int
    partitions: int
    """How many were there before it or after it, the greater number."""
    table: tuple[int, ...] | None
    cut: loop_device.Cut


class Operations:
    """What can be done to a device, beside detaching it."""

    def __init__(
        self,
        manager: Manager,
        registry: Registry,
        locks: Locks,
        claims: overlap.Claims,
        threads: Threads,
        lifetimes: Lifetimes,
        store: FdStore,
        uevents: Uevents,
    ) -> None:
        self._manager = manager
        self._registry = registry
        self._locks = locks
        self._claims = claims
        self._threads = threads
        self._lifetimes = lifetimes
        self._store = store
        self._uevents = uevents
        self._tasks = Tasks()

    async def _set(
        self,
        caller: Caller,
        device: Device,
        function: Callable[[loop_device.LoopDevice], _T],
        admit: Callable[[ExitStack], None] = lambda _: None,
        note: Callable[[_T], None] = lambda _: None,
        *,
        scans: bool = False,
        events: int = 0,
    ) -> _T:
        """Change the device as `_change` does, and tell of the change."""
        try:
            return await self._change(
                caller, device, function, admit, note, scans=scans, events=events
            )
        finally:
            await self._registry.refresh(device)
            self._registry.changed(device)

    async def _change(
        self,
        caller: Caller,
        device: Device,
        function: Callable[[loop_device.LoopDevice], _T],
        admit: Callable[[ExitStack], None] = lambda _: None,
        note: Callable[[_T], None] = lambda _: None,
        *,
        scans: bool = False,
        events: int = 0,
    ) -> _T:
        """Change the device in a thread, and pass the result to `note` on the event loop.

        That comes before the next operation on the device, also after a time-out: of two changes
        the later one stays. The caller waits until it may cause so many uevents; those of
        partitions are counted afterwards.
        """
        results: list[_T] = []
        found: list[_Found] = []
        waiting = True

        def change(loop: loop_device.LoopDevice) -> _T:
            before = kernel.loop_partitions(loop.number) if scans else []
            try:
                result = function(loop)
                results.append(result)
                return result
            finally:
                # As if all were made anew, which is so where the sector size changes.
                after = kernel.loop_partitions(loop.number) if scans else []
                partitions = max(len(before), len(after))
                # Here, because the kernel tells nobody, and sysfs may let whoever reads it wait.
                sector_size = loop_change.sector_size(loop)
                found.append(_Found(sector_size, partitions, loop.table, loop.cut))

        def take_up() -> None:
            for each in found:
                self._uevents.count(caller.uid, PARTITION * each.partitions)
                device.sector_size = each.sector_size
                if each.table is not None:
                    device.table = each.table
                if device.loop:
                    device.loop.cut = each.cut
            for result in results:
                note(result)
            if not waiting:
                self._registry.changed(device)

        def admit_change(over: ExitStack) -> None:
            admit(over)
            over.callback(take_up)

        try:
            return await self._manager.with_loop(
                caller, device, change, admit=admit_change, scans=scans, events=events
            )
        finally:
            waiting = False

    # --- size -----------------------------------------------------------------------------------

    async def resize(self, caller: Caller, device: Device, options: ResizeOptions) -> int:
        """Change offset and limit, or take up the file's size; returns the new size in bytes."""
        await self._manager.require(caller, Operation.RESIZE, device)
        return await self._set(
            caller,
            device,
            partial(
                loop_change.resize,
                offset=options.offset,
                size_limit=options.size_limit,
                force=options.force,
            ),
            admit=partial(self._claim_range, device, options),
            events=1,
        )

    def _claim_range(self, device: Device, options: ResizeOptions, over: ExitStack) -> None:
        """Claim what the device is to map.

        Raises Overlap if it would reach into what another one maps, unless that is allowed.
        """
        now = device.mapping
        if now is None:
            return
        start = device.status.offset if options.offset is None else options.offset
        limit = device.size_limit if options.size_limit is None else options.size_limit
        moved = now.start - device.status.offset + start  # a partition's bytes are its disk's
        then = replace(now, start=moved, end=moved + limit if limit else _ANY_END)
        if not options.allow_overlap:
            others = (other for other in self._registry.over(now) if other is not device)
            self._claims.require_none(
                then,
                bound=(
                    (other.node, other.mapping)
                    for other in others
                    if other.mapping and not now.conflicts_with(other.mapping)
                ),
            )
        over.callback(self._claims.claim(then))

    async def resize_by_fd(self, caller: Caller, fd: OwnedFd, options: ResizeOptions) -> int:
        """As `resize`, on what the fd names; an fd on a partition means the partition."""
        device, partition = await self._manager.named(caller, fd)
        if partition is None:
            return await self.resize(caller, device, options)
        others = {
            "offset": options.offset is not None,
            "force": options.force,
            "allow-overlap": options.allow_overlap,
        }
        for key in (key for key, given in others.items() if given):
            raise InvalidArgs(f"{key}: a partition can be given another size-limit only")
        await self._manager.require(caller, Operation.RESIZE, device)
        return await self._set(
            caller,
            device,
            partial(loop_change.resize_partition, partition=partition, size=options.size_limit),
            events=1,
        )

    # --- settings -------------------------------------------------------------------------------

    async def set_autoclear(self, caller: Caller, device: Device, enable: bool) -> None:
        """Have the kernel detach a device at its last close, or not."""
        leased = NotSupported(f"{device.node} goes with its lease: SetLifetime keeps it for longer")
        if device.owner == caller.uid and not device.private and device.lifetime != SYSTEM:
            raise leased  # without asking anybody for it
        await self._manager.require(caller, Operation.SET_AUTOCLEAR, device)

        def admit(_: ExitStack) -> None:
            if device.managed and device.lifetime != SYSTEM:
                raise leased

        function = partial(loop_change.set_autoclear, enable=enable)
        await self._set(caller, device, function, admit, partial(_note_autoclear, device, enable))

    async def set_direct_io(self, caller: Caller, device: Device, enable: bool) -> bool:
        """Turn direct I/O on or off; returns what is in effect."""
        await self._manager.require(caller, Operation.SET_DIRECT_IO, device)
        return await self._set(caller, device, partial(loop_change.set_direct_io, enable=enable))

    async def set_reference(self, caller: Caller, device: Device, reference: bytes) -> None:
        """Change the free-form name."""
        await self._manager.require(caller, Operation.SET_REFERENCE, device)

        def note(_: bool) -> None:
            self._registry.renamed(device, reference)  # the kernel tells nobody

        function = partial(loop_change.set_reference, reference=reference)
        await self._set(caller, device, function, note=note)

    async def set_sector_size(self, caller: Caller, device: Device, size: int | None) -> None:
        """Change the logical sector size, in bytes; None means as the partition table says."""
        await self._manager.require(caller, Operation.SET_SECTOR_SIZE, device)
        function = partial(loop_change.set_sector_size, size=size)
        await self._set(caller, device, function, scans=True, events=1)

    async def rescan_partitions(self, caller: Caller, device: Device) -> int:
        """Bring the partition devices in step with the table; returns how many there are."""
        await self._manager.require(caller, Operation.RESCAN_PARTITIONS, device)
        rescan = loop_change.rescan_partitions
        return len(await self._set(caller, device, rescan, scans=True, events=1))

    # --- the rest -------------------------------------------------------------------------------

    async def sync(self, caller: Caller, device: Device) -> None:
        """Write back what is dirty; the caller sees the error."""
        await self._manager.require(caller, Operation.SYNC, device)
        if device.held is None:
            await self._manager.with_loop(caller, device, loop_change.sync, alone=False)
            return
        self._manager.require_attached(device)
        fd = OwnedFd(kernel.dup(device.held.fileno()), kernel.close)

        def sync() -> None:
            with fd:
                kernel.fsync(fd.fileno())

        await self._manager.in_thread(caller, device, sync)

    async def open(
        self, caller: Caller, device: Device, *, writable: bool, partition: int | None
    ) -> OwnedFd:
        """A new fd on the device's node, or on a partition's."""
        if caller.uid != ROOT and block_device.unbinds_while_open():
            # CLR_FD by the last opener would unbind and leave it an fd on the next user's image.
            raise NotSupported("before Linux 6.11 only root may be given a device's fd")
        # The kernel's state, not ours: root can make a device read-only behind our back.
        read_only = device.number is not None and query.is_read_only(device.number)
        if read_only and writable:
            # Nobody is asked for a password for what cannot be.
            raise InvalidArgs(f"mode: {device.node} is read-only: open it with r")
        operation = Operation.OPEN_READ_ONLY if read_only else Operation.OPEN
        await self._manager.require(caller, operation, device)
        function = partial(
            loop_change.open_node,
            writable=writable,
            partition=partition,
            # Looked at again where it is opened, unless what was allowed covers both.
            read_only_too=read_only or caller.uid == ROOT or caller.uid != device.owner,
        )
        fd = await self._manager.with_loop(caller, device, function, late=_close)
        with self._closed_on_failure(caller, fd):
            caller.client.require_present()
            self._manager.require_attached(device)
            if device.loop:
                device.loop.handed_out = True
        return fd

    async def hold(self, caller: Caller, device: Device) -> OwnedFd:
        """Keep a device beside its lease, until the last copy of the fd is closed."""
        await self._manager.require(caller, Operation.HOLD, device)
        self._manager.require_attached(device)
        return await self._lifetimes.hold(device, caller.client)

    async def set_lifetime(self, caller: Caller, device: Device, lifetime: str) -> None:
        """Keep a device for so long from now on; `connection` means the caller's."""
        other = access.relation(caller.uid, device.owner) is access.Relation.OTHER
        if other and lifetime == CONNECTION:
            raise AccessDenied("only a connection of the owner's can keep a device")
        operation = Operation.KEEP if lifetime == SYSTEM else Operation.SET_LIFETIME
        await self._manager.require(caller, operation, device)
        await self._lifetimes.require(device.owner, lifetime)
        caller.client.require_present()
        self._manager.require_attached(device)
        if (lifetime == SYSTEM) == (device.lifetime == SYSTEM):
            if lifetime != SYSTEM:
                self._lifetimes.grant(device, caller.client, lifetime)
                self._registry.changed(device)
            return
        try:
            # On disk first: a loopd that dies in between leaves no device without a lease.
            self._lifetimes.announce(device, caller.client, lifetime)
            autoclear = lifetime != SYSTEM
            function = partial(loop_change.set_autoclear, enable=autoclear)
            note = partial(_note_autoclear, device, autoclear)
            # Its record stays the one that was announced until the lease is granted.
            await self._change(caller, device, function, note=note)
            self._manager.require_attached(device)
            self._lifetimes.grant(device, caller.client, lifetime)
            if lifetime == CONNECTION and caller.client.gone:
                self._lifetimes.holder_is_gone(device)
        finally:
            await self._registry.refresh(device)
            # Also on disk it is what it has become.
            self._registry.changed(device)

    async def lock(self, caller: Caller, device: Device, kind: Lock) -> None:
        """Take, change or drop the BSD lock of the caller's connection."""
        await self._manager.require(caller, Operation.LOCK, device)
        self._require_may_lock(caller, device, kind)
        if kind is Lock.NONE:
            self._locks.drop(device)
            return
        await self._locks.settle(device)
        own, held = None, Lock.NONE

        def admit(over: ExitStack) -> None:
            nonlocal own, held
            self._require_may_lock(caller, device, kind)
            if device.loop and device.loop.lock:
                # A copy, because the lock may be dropped while it is being changed.
                own = OwnedFd(kernel.dup(device.loop.lock.fileno()), kernel.close)
                held = device.lock
                over.callback(own.close)

        def change(loop: loop_device.LoopDevice) -> OwnedFd | None:
            if own is None:
                lock = loop_change.take_lock(loop, kind)
                if not self._store.keeps(device.label):
                    return lock
                return self._store.keep(self._store.name(device.label, "lock"), lock)
            with own:
                loop_change.change_lock(loop, own, kind, held=held)
            return None

        try:
            fd = await self._manager.with_loop(caller, device, change, late=_close, admit=admit)
        except loop_change.LockLost:
            self._locks.drop(device)
            raise
        with self._closed_on_failure(caller, fd):
            caller.client.require_present()
            self._manager.require_attached(device)
            if device.loop is None or (fd is None and device.loop.lock is None):
                raise DeviceBusy(f"the lock on {device.node} ended while it was changed")
            device.loop.lock = fd or device.loop.lock
        self._locks.note(device, caller.client, kind)

    def _require_may_lock(self, caller: Caller, device: Device, kind: Lock) -> None:
        if self._locks.holder(device) not in (None, caller.client):
            raise DeviceBusy(f"another connection holds the lock on {device.node}")
        self._locks.require_time(device, caller.client, kind)

    @contextmanager
    def _closed_on_failure(self, caller: Caller, fd: OwnedFd | None) -> Iterator[None]:
        """Close an fd in a thread if the block fails."""
        try:
            yield
        except BaseException:
            close = partial(_close, fd)
            self._tasks.start(self._threads.run_in_turn(caller.uid, Work.ENDING, close))
            raise


def _close(fd: OwnedFd | None) -> None:
    if fd:
        fd.close()


def _note_autoclear(device: Device, enable: bool, _: bool) -> None:
    """Take up what the kernel was told about a device's last close."""
    if device.loop:
        device.loop.autoclear = enable
    if device.lease and device.lease.lifetime == SYSTEM:
        device.lease.autoclear = enable
