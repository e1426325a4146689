# SPDX-License-Identifier: LGPL-2.1-or-later
"""The devices that are there: finding one, who may do what to it, and doing it.

It knows neither D-Bus nor ioctls. What was decided before an `await` is decided again after it.
What else can be done to a device is in `actions.change`; Attach is in `actions.attach`, and how a
device ends in `actions.detach`.
"""

import asyncio
import errno
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from functools import partial
from typing import TypeVar

from loopd.daemon import access
from loopd.daemon.access import NOBODY, ROOT, Caller, Client, Operation
from loopd.daemon.config import Config
from loopd.daemon.devices.device import ATTACHED, Device
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.locks import Locks
from loopd.daemon.devices.registry import Registry
from loopd.daemon.host.polkit import Authority
from loopd.daemon.host.uevent_budget import Uevents
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work, remaining
from loopd.errors import Ambiguous, DeviceBusy, InvalidArgs, NoSuchDevice, NotSupported, TimedOut
from loopd.fd import OwnedFd
from loopd.loop import block_device, loop_device, query
from loopd.loop.backing_file import FileIdentity

from .detach import Ending, opened

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long Detach waits for udev and other short-lived openers.
_DETACH_WAIT = 1.0
# What works on a block device that needed no loop device.
_ON_BLOCK_DEVICES = frozenset({Operation.DETACH, Operation.SYNC, Operation.HOLD})
_NODE = re.compile(r"(?:/dev/)?loop(0|[1-9]\d{0,6})", re.ASCII)


class Manager:
    """All devices of the machine, and what every use case needs of them."""

    def __init__(
        self,
        config: Config,
        threads: Threads,
        authority: Authority,
        registry: Registry,
        lifetimes: Lifetimes,
        locks: Locks,
        ending: Ending,
        uevents: Uevents,
    ) -> None:
        self._config = config
        self._threads = threads
        self._authority = authority
        self._registry = registry
        self._lifetimes = lifetimes
        self._locks = locks
        self._ending = ending
        self._uevents = uevents
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
        """The device that a passed fd names, see `named`."""
        device, _ = await self.named(caller, fd)
        return device

    async def named(self, caller: Caller, fd: OwnedFd) -> tuple[Device, int | None]:
        """The device that an fd names, and the partition by which it does so.

        That is the loop device it is open on, or has a partition open, else the one whose backing
        file it is (`_over_file`). Takes the fd over. Raises NoSuchDevice, Ambiguous.
        """
        fd = fd.move()
        named = await self._threads.run_in_turn(
            caller.uid,
            Work.LOOK,
            partial(query.named_by, fd),
            timeout=self._config.deadlines.operation,
            unused=fd.close,
        )
        if named.number is not None:
            # A loop device may also be the backing file of another, but it is itself first.
            return self.device_by_node(f"loop{named.number}"), named.partition
        return self._over_file(caller, named.file), None

    def _over_file(self, caller: Caller, file: FileIdentity) -> Device:
        """The device over a file that a caller means: its own, else root's, else a foreign one.

        Another user's is never taken, since that user may have chosen which part of the file it
        maps, and attached it only to be mistaken for another. A foreign one, which may be a user's
        by udisks2, is in the way of no other.
        """
        seen = [
            device
            for device in self._registry.seen_by(caller.uid)
            if device.file and device.file.is_same_as(file)
        ]
        found: list[Device] = []
        for owner in (caller.uid, ROOT, NOBODY):
            found = found or [device for device in seen if device.owner == owner]
        found = [device for device in found if device.state == ATTACHED] or found
        if len(found) > 1:
            raise Ambiguous(
                f"the file is attached more than once ({_nodes(found)}): name the device"
            )
        if found:
            return found[0]
        if seen:
            raise NoSuchDevice(
                f"the file is attached by another user only ({_nodes(seen)}): name the device"
            )
        raise NoSuchDevice("the file is not attached to a loop device")

    # --- who may do what, and doing it ----------------------------------------------------------

    async def require(self, caller: Caller, operation: Operation, device: Device) -> None:
        """Return when the caller may do this, is still there, and so is the device.

        Raises what polkit's answer means, NotSupported, AccessDenied, NoSuchDevice.
        """
        caller.concerns.update(device.fields)
        if device.private and operation not in _ON_BLOCK_DEVICES:
            raise NotSupported(
                f"{device.node} needed no loop device, so {operation.value} is not supported"
            )
        for action in access.needed_for(operation, access.relation(caller.uid, device.owner)):
            await self._authority.require(caller, action, {"device": device.node})
        caller.client.require_present()
        self._require_known(device)

    def _require_known(self, device: Device) -> None:
        if not self._registry.knows(device):
            raise NoSuchDevice(f"{device.node} is gone")

    def require_attached(self, device: Device) -> None:
        """Raise NoSuchDevice if the device is gone or going."""
        self._require_known(device)
        if device.state != ATTACHED:
            raise NoSuchDevice(f"{device.node} is detached and goes when its last user closes it")

    async def with_loop(
        self,
        caller: Caller,
        device: Device,
        function: Callable[[loop_device.LoopDevice], _T],
        late: Callable[[_T], object] = lambda _: None,
        admit: Callable[[ExitStack], None] = lambda _: None,
        *,
        alone: bool = True,
        scans: bool = False,
        events: int = 0,
    ) -> _T:
        """Run a function on the device in a thread, whatever becomes of the device meanwhile.

        One that is to be `alone` waits for the others that are; one that `scans` partitions, for
        the user's other scans; one that causes `events`, until the caller may. `admit` is called
        just before, and may raise, or say what is to be done when all is over; `late` gets what
        comes when nobody waits for it any more.
        Raises TimedOut, NoSuchDevice, AccessDenied.
        """
        deadline = asyncio.get_running_loop().time() + self._config.deadlines.operation
        uid = _at_whose_expense(caller, device)
        with ExitStack() as failed:
            # Whoever has an fd of a device can put a file behind it that hangs.
            for work in (Work.OPERATION, Work.SCAN) if scans else (Work.OPERATION,):
                failed.callback(await self._threads.turn(uid, work, remaining(deadline)))
            if events:
                await self._uevents.take(caller.uid, events, remaining(deadline))
            if alone:
                await self._take(device, remaining(deadline))
                failed.callback(device.operating.release)
            caller.client.require_present()
            self.require_attached(device)
            admit(failed)
            # Borrowed here, where nothing can come between the check and the copy of the fd.
            borrowed = device.loop.borrow() if device.loop else None
            ended = failed.pop_all().close

        def operate() -> _T:
            with closing(borrowed or opened(device)) as loop:
                try:
                    return function(loop)
                except OSError as exc:
                    if exc.errno == errno.ENXIO:
                        raise NoSuchDevice(f"{device.node} is gone") from exc
                    raise

        def close_borrowed() -> None:
            if borrowed:
                self._tasks.start(self._threads.run_in_turn(uid, Work.ENDING, borrowed.close))

        return await self._threads.run(
            operate, timeout=remaining(deadline), late=late, ended=ended, unused=close_borrowed
        )

    @staticmethod
    async def _take(device: Device, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                await device.operating.acquire()
        except TimeoutError as exc:
            raise TimedOut(f"another operation on {device.node} does not end") from exc

    async def in_thread(self, caller: Caller, device: Device, function: Callable[[], _T]) -> _T:
        """Run a function in a thread that asks a device, when it is its owner's turn.

        Raises TimedOut.
        """
        return await self._threads.run_in_turn(
            _at_whose_expense(caller, device),
            Work.OPERATION,
            function,
            timeout=self._config.deadlines.operation,
        )

    # --- detaching ------------------------------------------------------------------------------

    async def detach(self, caller: Caller, device: Device, *, lazy: bool = False) -> bool:
        """Detach; whether it is gone, or the kernel will finish at the last close."""
        await self.require(caller, Operation.DETACH, device)
        if not lazy and device.state == ATTACHED and device.number is not None:
            in_use = partial(block_device.in_use, device.number)
            if await self.in_thread(caller, device, in_use):
                raise DeviceBusy(
                    f"{device.node} is mounted or exclusively open: unmount it first, or pass lazy"
                )
            self._require_known(device)
            caller.client.require_present()
        self._ending.let_go(device)
        try:
            async with asyncio.timeout(_DETACH_WAIT):
                await device.gone.wait()
        except TimeoutError:
            return False
        return True

    async def detach_by_fd(self, caller: Caller, fd: OwnedFd, *, lazy: bool) -> bool:
        """As `detach`, on what the fd names."""
        device, partition = await self.named(caller, fd)
        if partition is not None:
            raise InvalidArgs(
                f"the fd is open on a partition: open the disk instead, {device.node}"
            )
        return await self.detach(caller, device, lazy=lazy)

    def client_left(self, client: Client) -> None:
        """Let go of all that a connection held."""
        self._locks.client_left(client)
        self._lifetimes.client_left(client)


def _nodes(devices: Iterable[Device]) -> str:
    return ", ".join(sorted(device.node for device in devices))


def _at_whose_expense(caller: Caller, device: Device) -> int:
    """Whose turns an operation takes: who attached a device can make it hang for all."""
    return device.owner if device.managed else caller.uid
