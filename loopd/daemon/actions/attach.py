# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach, from a passed fd to a recorded device: examine, authorize, admit, bind, record.

Admission is one synchronous step: nothing decided before an `await` is trusted after it. From there
on a task goes through to the end, and undoes what nobody waits for any more.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from threading import get_ident

from loopd.daemon import access
from loopd.daemon.access import ROOT, Caller
from loopd.daemon.config import Config
from loopd.daemon.devices.device import ATTACHED, DETACHING, Device, label
from loopd.daemon.devices.leases import SYSTEM
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.locks import Locks
from loopd.daemon.devices.overlap import Claims, Mapping
from loopd.daemon.devices.registry import Registry
from loopd.daemon.devices.spare_numbers import Spares
from loopd.daemon.host import udev_links
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.host.polkit import Authority
from loopd.daemon.host.udev_marks import Markers
from loopd.daemon.host.uevent_budget import DISK, PARTITION, Uevents
from loopd.daemon.quota import Place, Quota
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work, remaining
from loopd.errors import Failed, Overlap, TimedOut
from loopd.fd import OwnedFd
from loopd.loop import attach as loop_attach
from loopd.loop import backing_file, block_device, change, kernel, loop_device, query

from .examine import AttachOptions, Proposal, Proposals
from .passthrough import Passthrough

log = logging.getLogger(__name__)


# How long a device that is being detached is waited for, if it is in the way.
_GOING_WAIT = 1.0


@dataclass(frozen=True)
class _Attempt:
    """A file that is being bound, for somebody who may give up waiting."""

    task: asyncio.Task[Device]
    over: asyncio.Future[None]
    """Done at the end of the task, or when it is waited for no longer."""
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
        lifetimes: Lifetimes,
        locks: Locks,
        claims: Claims,
        quota: Quota,
        store: FdStore,
        spares: Spares,
        uevents: Uevents,
        let_go: Callable[[Device], None],
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._markers = markers
        self._registry = registry
        self._lifetimes = lifetimes
        self._locks = locks
        self._claims = claims
        self._let_go = let_go
        self._proposals = Proposals(config, threads)
        self._passthrough = Passthrough(threads, registry, lifetimes, quota, store)
        self._quota = quota
        self._store = store
        self._spares = spares
        self._uevents = uevents
        self._stopping = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()
        self._loop_thread = get_ident()

    def refuse(self) -> None:
        """Attach nothing any more, also in calls that are under way."""
        self._stopping = True

    def _require_running(self) -> None:
        if self._stopping:
            raise Failed("loopd is stopping: try again")

    async def attach(self, caller: Caller, fd: OwnedFd, options: AttachOptions) -> Device:
        """Attach a file for as long as the options say. Takes the fd over."""
        with fd:
            await self._lifetimes.require(caller.uid, options.lifetime)
            proposal = await self._proposals.look(caller.uid, fd, options)
            if not proposal.request.read_only:
                access.require_may_write(caller.uid, proposal.file.guarded_by)
                _require_unlocked(caller.uid, proposal, proposal.file.lock)
            if proposal.trusted:
                # Nobody is asked for a password only to be told that an option is wrong. What is
                # known of other files without asking may be stale: they are checked when bound.
                proposal.request.check(proposal.file, proposal.file.size)
            await self._require_attach(caller, proposal)
            if proposal.block:
                # It may have changed.
                proposal = await self._proposals.look(caller.uid, fd, options)
            caller.client.require_present()
            self._require_running()
            if proposal.block and not proposal.needs_loop_device:
                return await self._passthrough.hold(
                    caller, fd, proposal, proposal.block, admit=self._require_running
                )
            await self._others_to_go(caller, proposal)
            caller.client.require_present()
            self._require_running()
            attempt = self._admit(caller, fd, proposal)
        timeout = self._config.deadlines.operation
        timer = self._loop.call_later(timeout, _end, attempt.over)
        ended = False
        try:
            await attempt.over
            ended = attempt.task.done()
        finally:
            timer.cancel()
            if not ended:
                # Out of time, or cancelled: nobody gets the device.
                attempt.abandoned.set()
                attempt.task.add_done_callback(self._give_up)
        if not ended:
            self._uevents.require_no_wait(caller.uid)
            raise TimedOut(f"the kernel did not attach the file within {timeout} s")
        return attempt.task.result()

    def _give_up(self, task: asyncio.Task[Device]) -> None:
        """Detach what was attached for somebody who does not wait for it any more."""
        if not task.cancelled() and not task.exception():
            self._let_go(task.result())

    async def _require_attach(self, caller: Caller, proposal: Proposal) -> None:
        file, number = proposal.file, proposal.request.number
        details = {
            "read-only": str(proposal.request.read_only).lower(),
            "lifetime": proposal.options.lifetime,
            "filesystem": file.filesystem or ("none" if proposal.block else "unknown"),
            "size": str(file.size),
        }
        if number is not None:
            details["device"] = query.node(number)
        for action in access.needed_to_attach(
            block_device=proposal.block is not None,
            trusted=proposal.trusted,
            wants_number=number is not None,
            keeps=proposal.options.lifetime == SYSTEM,
        ):
            await self._authority.require(caller, action, details)

    async def _others_to_go(self, caller: Caller, proposal: Proposal) -> None:
        """Wait a moment for devices over the same bytes that are being detached.

        udev may have one open a little longer than the last user, who may know that it is unused.
        """
        if proposal.options.allow_overlap:
            return
        mapping = _mapping(caller, proposal)
        going = [
            asyncio.ensure_future(other.gone.wait())
            for other in self._registry.over(mapping)
            if other.state == DETACHING and other.mapping and mapping.conflicts_with(other.mapping)
        ]
        if going:
            _, late = await asyncio.wait(going, timeout=_GOING_WAIT)
            for each in late:
                each.cancel()

    def _admit(self, caller: Caller, fd: OwnedFd, proposal: Proposal) -> _Attempt:
        """Check overlap and quota, and begin to bind; from here on a task goes to the end."""
        mapping = _mapping(caller, proposal)
        if not proposal.options.allow_overlap:
            others = self._registry.over(mapping)
            bound = ((other.node, other.mapping) for other in others if other.mapping)
            self._claims.require_none(mapping, bound)
        abandoned = asyncio.Event()
        place = self._quota.take(caller.uid)
        unclaim = self._claims.claim(mapping)
        binding = self._bind(caller, fd.move(), proposal, unclaim, place, abandoned)
        # Not asyncio.wait for the task: its end would be heard a turn of the event loop later.
        over = self._loop.create_future()
        return _Attempt(self._tasks.start(_ending(binding, over)), over, abandoned)

    async def _bind(
        self,
        caller: Caller,
        fd: OwnedFd,
        proposal: Proposal,
        unclaim: Callable[[], None],
        place: Place,
        abandoned: asyncio.Event,
    ) -> Device:
        """Attach in a thread and record it, or undo it if nobody waits for it any more."""
        with place, ExitStack() as admitted:
            admitted.callback(unclaim)
            admitted.enter_context(fd)
            request = proposal.request
            # Its bytes stay claimed meanwhile, and this user's other calls may never end.
            deadline = self._loop.time() + self._config.deadlines.operation
            for work in (Work.OPERATION, Work.SCAN)[: 2 if request.partition_scan else 1]:
                turn = await self._threads.turn(caller.uid, work, remaining(deadline))
                admitted.callback(turn)
            if not abandoned.is_set():
                # In turn, as only then it is known how many events those before it have caused.
                await self._uevents.take(caller.uid, DISK, remaining(deadline))
            if abandoned.is_set() or caller.client.gone:
                raise Failed("the attach was given up")
            # Looking once more whether a close may hang would cost as much as the close.
            quick = proposal.file.closes_quickly
            passed = block_device.opened(fd.release()) if quick else fd.move()
            attach = partial(
                _attach,
                caller.uid,
                passed,
                proposal,
                partial(self._claim, caller.uid),
                partial(self._publish, caller.uid, proposal),
                self._spares.numbers(caller.uid),
                self._store,
            )

            def unused() -> None:
                self._threads.close_fd(passed.release(), owner=caller.uid)

            loop, status = await self._threads.run(
                attach, late=lambda attached: self._undo(attached[0]), unused=unused
            )
            unrecorded = admitted.enter_context(ExitStack())
            unrecorded.callback(self._drop, caller.uid, loop)
            self._uevents.count(caller.uid, PARTITION * len(status.partitions))
            wanted = not (caller.client.gone or abandoned.is_set() or self._stopping)
            device = Device(
                number=loop.number,
                name=f"loop{loop.number}",
                diskseq=loop.diskseq,
                status=status,
                file=proposal.file.identity,
                sector_size=change.sector_size(loop),
                table=loop.table or (),
                reference=request.reference,
                may_hang=proposal.may_hang,
                owner=caller.uid,
                loop=loop,
                state=ATTACHED if wanted else DETACHING,
                attached_at=_now(),
            )
            if wanted:
                if loop.lock:
                    self._locks.note(device, caller.client, request.lock)
                    unrecorded.callback(self._locks.drop, device)
                self._lifetimes.grant(device, caller.client, proposal.options.lifetime)
            self._registry.record(device)
            device.place = place.keep()
            unrecorded.pop_all()
        if wanted and proposal.options.lifetime == SYSTEM:
            await self._keep(device)
            wanted = not (caller.client.gone or abandoned.is_set())
        if not wanted:
            # It ends as any other does: counted and marked until the kernel has let go of it.
            extra = {**caller.client.fields, **device.fields}
            log.info("%s was attached for nobody", device.node, extra=extra)
            self._let_go(device)
            raise Failed("the attach was given up")
        caller.concerns.update(device.fields)
        return device

    async def _keep(self, device: Device) -> None:
        """Have a device stay when its last user closes it, us included; its lease is on disk."""
        loop = device.loop
        if loop is None:
            return
        loop.autoclear = False
        borrowed = loop.borrow()

        def keep() -> None:
            with closing(borrowed):
                change.set_autoclear(borrowed, False)

        def unused() -> None:
            end = self._threads.run_in_turn(device.owner, Work.ENDING, borrowed.close)
            self._tasks.start(end)

        try:
            async with device.operating:
                await self._threads.run(keep, unused=unused)
        except BaseException:
            self._let_go(device)
            raise
        await self._registry.refresh(device)
        self._registry.changed(device)

    def _drop(self, uid: int, loop: loop_device.LoopDevice) -> None:
        """Detach what a failure has left bound and unrecorded."""
        self._tasks.start(self._threads.run_in_turn(uid, Work.ENDING, partial(self._undo, loop)))

    def _undo(self, loop: loop_device.LoopDevice) -> None:
        _undo(loop, self._spares.stays)

    def _claim(self, uid: int, number: int) -> loop_device.Release:
        """Take a number from the thread that is about to bind it."""
        return self._looked_at(number, self._markers.claim(number, unprivileged=uid != ROOT))

    def take_back(self, number: int) -> loop_device.Release:
        """Take a number that a former loopd has bound; for threads, too."""
        return self._looked_at(number, self._markers.take_back(number))

    def _looked_at(self, number: int, release: loop_device.Release) -> loop_device.Release:
        def undo(waiting: int | None) -> None:
            release(waiting)
            # Someone else may have bound it, which nobody looked at while it was ours.
            here = get_ident() == self._loop_thread
            soon = self._loop.call_soon if here else self._loop.call_soon_threadsafe
            soon(self._registry.look_if_bound, number)

        return undo

    def _publish(self, uid: int, proposal: Proposal, number: int, diskseq: int) -> None:
        """Tell udev of the device: the links that root's have, or that it is a user's."""
        if uid == ROOT:
            description = udev_links.describe(proposal.file.identity, proposal.request.reference)
            self._markers.publish(number, diskseq, description)
        else:
            self._markers.sign(number, diskseq, uid)


async def _ending(binding: Awaitable[Device], over: asyncio.Future[None]) -> Device:
    try:
        return await binding
    finally:
        _end(over)


def _end(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _mapping(caller: Caller, proposal: Proposal) -> Mapping:
    """The bytes that a device would map."""
    file, request = proposal.file, proposal.request
    return Mapping.of(
        file.identity,
        request.offset,
        request.size_limit or max(file.size - request.offset, 0),
        writable=not request.read_only,
        owner=caller.uid,
    )


def _require_unlocked(uid: int, proposal: Proposal, lock: backing_file.Lock) -> None:
    """Raise Overlap for a file that another program writes to, unless that may be."""
    # A user who may only read a file must not be able to keep root from it.
    is_free = lock is backing_file.Lock.NONE or (lock is backing_file.Lock.READER and uid == 0)
    if not (is_free or proposal.options.allow_overlap):
        raise Overlap(
            "another program has the file locked for writing, as a virtual machine has its disk: "
            "end it, attach the file read-only, or pass allow-overlap"
        )


def _now() -> int:
    return time.time_ns() // 1000


def _attach(
    uid: int,
    fd: OwnedFd,
    proposal: Proposal,
    claim: loop_attach.Claim,
    publish: loop_attach.Publish,
    numbers: loop_attach.Numbers,
    store: FdStore,
) -> tuple[loop_device.LoopDevice, query.Status]:
    def claim_at_last(number: int) -> loop_device.Release:
        if not proposal.request.read_only:
            # Just before it is bound, since what others do with the file may have changed.
            if uid != ROOT:
                access.require_may_write(uid, backing_file.guarded_by(fd.fileno()))
            backing_file.require_not_swapped_to(fd.fileno())
            if proposal.file.closes_quickly:
                _require_unlocked(uid, proposal, backing_file.lock_of(fd.fileno()))
        return claim(number)

    loop = loop_attach.attach(
        fd,
        proposal.file,
        proposal.request,
        claim_at_last,
        publish,
        numbers=numbers,
        may_hang=proposal.may_hang,
    )
    try:
        if proposal.may_hang:
            # Not kept: the last close of a device waits for its file, and not for ever in systemd.
            return loop, query.status(loop.number)
        args = loop.number, loop.binding, loop.diskseq
        status = query.status_by_fd(loop.fd.fileno(), *args)
        name = label(f"loop{loop.number}", loop.diskseq)
        loop.fd = store.keep(name, loop.fd)
        if loop.lock:
            loop.lock = store.keep(store.name(name, "lock"), loop.lock)
        return loop, status
    except BaseException:
        _undo(loop, numbers.stays)
        raise


def _undo(loop: loop_device.LoopDevice, stays: Callable[[int], None]) -> None:
    if not loop_device.detach(loop):
        # No client has ever had it, so nobody turns autoclear off.
        loop.close()
    try:
        waits = kernel.loop_binding(loop.number) == loop.binding
    except OSError:
        waits = True  # as far as known; when it is looked at again, it is seen that it does not
    loop.release(loop.binding if waits else None)
    if loop.is_new:
        stays(loop.number)
