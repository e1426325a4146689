# SPDX-License-Identifier: LGPL-2.1-or-later
"""The start after another loopd: what it had is taken back, or let go where nothing keeps it.

A device is the one that was recorded if the same binding is still there. What others set up is not
touched, and what was kept without a record, because a loopd died in between, is given up.
"""

import asyncio
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from loopd.daemon.access import ROOT, Client
from loopd.daemon.devices.device import Device, label
from loopd.daemon.devices.leases import SYSTEM, Lease
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.locks import Locks
from loopd.daemon.devices.records import Record, Records
from loopd.daemon.devices.registry import Registry
from loopd.daemon.host.fd_store import FdStore, number_in
from loopd.daemon.quota import Quota
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.errors import LoopError, NoSuchDevice, TimedOut
from loopd.fd import OwnedFd
from loopd.loop import backing_file, block_device, change, kernel, loop_device, query
from loopd.loop.backing_file import FileIdentity
from loopd.loop.block_device import Lock

log = logging.getLogger(__name__)

# How long a device is waited for that may hang.
_TIMEOUT = 5.0
# Nobody but udev, for the milliseconds of a probe, comes between while the kind of a lock changes.
_LOCK_TIMEOUT = 1.0
_NAME = re.compile(r"(?P<label>\w+)(?:\.(?P<what>lock|hold)\d+)?", re.ASCII)


@dataclass
class _Kept:
    """The fds that were kept of one device."""

    device: OwnedFd | None = None
    locks: dict[str, OwnedFd] = field(default_factory=dict)
    holds: dict[str, OwnedFd] = field(default_factory=dict)

    def take_lock(self) -> OwnedFd | None:
        """The newest one: an older one was about to be dropped."""
        if not self.locks:
            return None
        return self.locks.pop(max(self.locks, key=number_in))

    def close(self) -> None:
        """Take all out that nobody has taken."""
        for fd in (*self.locks.values(), *self.holds.values(), self.device):
            if fd:
                fd.close()


class Restoring:
    """Takes back devices.

    `claim` takes a number, and `rejoin` finds a connection that is still there.
    """

    def __init__(
        self,
        threads: Threads,
        registry: Registry,
        records: Records,
        store: FdStore,
        lifetimes: Lifetimes,
        locks: Locks,
        quota: Quota,
        claim: Callable[[int], loop_device.Release],
        rejoin: Callable[[str], Awaitable[Client | None]],
        let_go: Callable[[Device], None],
    ) -> None:
        self._threads = threads
        self._registry = registry
        self._records = records
        self._store = store
        self._lifetimes = lifetimes
        self._locks = locks
        self._quota = quota
        self._claim = claim
        self._rejoin = rejoin
        self._let_go = let_go
        self._clients: dict[str, Client] = {}
        self._ended: Counter[int] = Counter()
        """How many devices of a user have been looked at."""
        self._tasks = Tasks()

    async def restore(self) -> None:
        """Take back what is recorded, and give up the rest. Raises OSError."""
        records = await self._threads.run(self._records.load)
        kept: dict[str, _Kept] = {}
        for name, fd in self._store.passed().items():
            _sort(kept, name, fd)
        holders = {
            name
            for record in records
            if record.bus == self._records.bus
            for name in (record.holder, record.lock_holder)
            if name
        }
        for client in await asyncio.gather(*map(self._rejoin, holders)):
            if client:
                self._clients[client.name] = client
        await asyncio.gather(*(self._take_back(each, kept) for each in records))
        for name, left in kept.items():
            log.warning("giving up %s, which was kept without a record", name)
            self._close(ROOT, partial(_give_up, name, left))

    async def _take_back(self, record: Record, all_kept: dict[str, _Kept]) -> None:
        name = record.label
        kept = all_kept.pop(name, _Kept())
        try:
            give_back = await self._turn(record.owner)
            device = await self._threads.run(
                partial(self._reopen, record, kept), timeout=_TIMEOUT, late=_close, ended=give_back
            )
        except (LoopError, OSError) as exc:
            log.info("%s is not taken back: %s", name, exc)
            if isinstance(exc, NoSuchDevice):
                self._records.remove(name)
            self._close(record.owner, kept.close)
            return
        lock = device.loop.lock if device.loop else None
        device.place = self._quota.take_back(record.owner)
        holds = {each: kept.holds.pop(each) for each in record.holds if each in kept.holds}
        self._close(record.owner, kept.close)
        lease = Lease(
            device.path,
            record.owner,
            record.holder,
            record.lifetime,
            over=record.over,
            autoclear=record.autoclear,
        )
        self._lifetimes.take_back(
            device, lease, {each: (record.holds[each], fd) for each, fd in holds.items()}
        )
        if lock:
            holder = self._client(record, record.lock_holder)
            self._locks.take_back(device, holder, Lock(record.lock), record.lock_expires)
        self._registry.record(device)
        log.info("%s is taken back", device.node, extra={"UID": device.owner, **device.fields})
        if record.detaching or (record.over and not holds):
            self._let_go(device)
            self._registry.changed(device)  # at once, for it began long ago
        elif record.holder and not self._client(record, record.holder):
            self._lifetimes.holder_is_gone(device)

    async def _turn(self, uid: int) -> Callable[[], None]:
        """Wait for a user's turn for as long as it goes on: there may be a thousand devices.

        Raises TimedOut.
        """
        while True:
            before = self._ended[uid]
            try:
                give_back = await self._threads.turn(uid, Work.OPERATION, _TIMEOUT)
            except TimedOut:
                if self._ended[uid] == before:
                    raise
            else:
                return partial(self._end_turn, uid, give_back)

    def _end_turn(self, uid: int, give_back: Callable[[], None]) -> None:
        self._ended[uid] += 1
        give_back()

    def _client(self, record: Record, name: str) -> Client | None:
        """A connection of the owner's that still is there."""
        client = self._clients.get(name) if record.bus == self._records.bus else None
        # It may have left since it was found, when it had nothing yet that would have ended.
        if client is None or client.gone or client.uid != record.owner:
            return None
        return client

    def _reopen(self, record: Record, kept: _Kept) -> Device:
        """Open a device, or find it open; raises NoSuchDevice if it is another one now."""
        file = FileIdentity(
            device=record.file_device,
            inode=record.file_inode,
            block=_block(record.file_block) if record.file_block else None,
        )
        fd, kept.device = kept.device, None
        device = partial(
            Device,
            name=record.name,
            diskseq=record.diskseq,
            which=record.which,
            file=file,
            reference=record.reference.encode(errors="surrogateescape"),
            owner=record.owner,
            attached_at=record.attached_at,
            table=tuple(record.table),
            may_hang=record.may_hang,
        )
        if record.number is None:
            return self._reopen_block(record, fd, device)
        loop = change.take_back(
            record.number,
            record.binding,
            fd,
            autoclear=record.autoclear or record.lifetime != SYSTEM,
            is_new=record.is_new,
        )
        loop.cut = loop_device.Cut(record.cut_limit, record.cut_asked)
        try:
            status = query.status(record.number)
            if status.binding != record.binding:
                raise NoSuchDevice(f"loop{record.number} is another device now")
            sector_size = change.sector_size(loop)
            if fd is None and not record.may_hang:
                name = label(record.name, record.diskseq)
                loop.fd = self._store.keep(name, loop.fd)
                if status.partition_scan:
                    status = _rescanned(loop)
        except BaseException:
            loop.close()
            raise
        loop.lock = _lock(record, kept)
        loop.release = self._claim(record.number)
        found = device(number=record.number, status=status, sector_size=sector_size, loop=loop)
        if loop.table is not None:
            found.table = loop.table
        return found

    @staticmethod
    def _reopen_block(record: Record, fd: OwnedFd | None, device: Callable[..., Device]) -> Device:
        """The same of a block device that needs no loop device: without its fd there is nothing."""
        if fd is None:
            raise NoSuchDevice(f"{record.name} was open nowhere else")
        with fd:
            status = query.block_status(
                record.file_block, read_only=not backing_file.is_writable(fd.fileno())
            )
            if status.diskseq != record.diskseq:
                raise NoSuchDevice(f"{record.name} has another medium now")
            sector_size = kernel.blksszget(fd.fileno())
            return device(number=None, status=status, sector_size=sector_size, held=fd.move())

    def _close(self, uid: int, close: Callable[[], None]) -> None:
        self._tasks.start(self._threads.run_in_turn(uid, Work.ENDING, close))


def _rescanned(loop: loop_device.LoopDevice) -> query.Status:
    """Make the partitions again that udev has removed when nobody had the device open.

    It tells the kernel to read the table then, and a kernel without a parser finds none.
    """
    try:
        change.rescan_partitions(loop)
    except (LoopError, OSError) as exc:
        log.info("%s has the partitions that it has: %s", loop.node, exc)
    return query.status(loop.number)


def _lock(record: Record, kept: _Kept) -> OwnedFd | None:
    """The lock as it was recorded; None if there is none, or it cannot be had any more."""
    lock = kept.take_lock()
    if lock is None:
        return None
    # One that was taken and not recorded was told to nobody; the same holds for another kind.
    if record.lock != Lock.NONE:
        try:
            told = kernel.statx(lock.fileno())
            number = kernel.loop_of_block_device(told.stx_rdev_major, told.stx_rdev_minor)
            operation = Lock(record.lock).operation
            if number == record.number and block_device.try_lock(
                lock.fileno(), operation, timeout=_LOCK_TIMEOUT
            ):
                return lock
        except OSError as exc:
            log.debug("cannot lock loop%s again: %s", record.number, exc.strerror)
        log.info("the lock on loop%s is lost", record.number)
    lock.close()
    return None


def _sort(kept: dict[str, _Kept], name: str, fd: OwnedFd) -> None:
    """Put an fd to the others of its device."""
    found = _NAME.fullmatch(name)
    of = kept.setdefault(found["label"] if found else name, _Kept())
    if found and found["what"] == "lock":
        of.locks[name] = fd
    elif found and found["what"] == "hold" and _is_hold(fd):
        of.holds[name] = fd
    elif found and found["what"]:
        kept[name] = _Kept(fd)
    else:
        of.device = fd


def _is_hold(fd: OwnedFd) -> bool:
    """Whether it can be our end of a Hold, which was the write end of a pipe in older versions."""
    mode = kernel.statx(fd.fileno()).stx_mode
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)


def _give_up(name: str, kept: _Kept) -> None:
    """Detach a device that was attached for nobody, and close what was kept of it."""
    fd, kept.device = kept.device, None
    kept.close()
    if fd is None:
        return
    try:
        told = kernel.statx(fd.fileno())
        number = kernel.loop_of_block_device(told.stx_rdev_major, told.stx_rdev_minor)
        which = None if number is None else kernel.loop_binding(number)
        if number is None or which is None:
            return
        if label(f"loop{number}", query.diskseq(fd.fileno(), which)) != name:
            return  # it is what somebody did to it, or no device that loopd attached
        loop = change.take_back(number, which, fd.move(), autoclear=True, is_new=False)
    except (LoopError, OSError) as exc:
        log.debug("cannot look at what was kept as %s: %s", name, exc)
        return
    finally:
        fd.close()
    if not loop_device.detach(loop):
        loop.close()


def _close(device: Device) -> None:
    """Close a device that was opened too late: its number is its next user's then."""
    if device.loop:
        device.loop.close()
        device.loop.release(device.loop.binding)
    if device.held:
        device.held.close()


def _block(number: int) -> backing_file.Block:
    try:
        return backing_file.block(os.major(number), os.minor(number))
    except OSError as exc:
        raise NoSuchDevice("the block device behind it is gone") from exc
