# SPDX-License-Identifier: LGPL-2.1-or-later
"""How devices end: by a Detach, with what kept them, when loopd stops, or behind our back.

Here nobody is asked any more. A device is let go of once, whatever the reasons, and is counted and
marked until the kernel has let go of it.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from typing import Any

from loopd.daemon.devices.device import ATTACHED, DETACHING, Device
from loopd.daemon.devices.leases import SYSTEM
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.locks import Locks
from loopd.daemon.devices.records import Records
from loopd.daemon.devices.registry import Registry
from loopd.daemon.devices.spare_numbers import Spares
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.errors import LoopError, NoSuchDevice
from loopd.loop import change, loop_device
from loopd.loop.loop_device import LoopDevice

log = logging.getLogger(__name__)

# Seconds between the attempts to clear a device that others have open; the last one stays.
_CLEAR_PAUSES = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.25, 0.25, 0.25, 1.0)
# Seconds until others hear that a device is being detached, unless it is gone by then.
_TOLD_AFTER = 0.05
# Of many devices that end together, so many are detached at a time.
_AT_A_TIME = 2
# Seconds before autoclear is cleared once more, as a client with an fd can set it over and over.
_PAUSE = 1.0


class Ending:
    """The use case, which is what clients, lifetimes and loopd's own end come to."""

    def __init__(
        self,
        threads: Threads,
        registry: Registry,
        records: Records,
        lifetimes: Lifetimes,
        locks: Locks,
        spares: Spares,
    ) -> None:
        self._threads = threads
        self._registry = registry
        self._records = records
        self._lifetimes = lifetimes
        self._locks = locks
        self._spares = spares
        self._keeping: dict[Device, asyncio.Task[None]] = {}
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    async def stop(self, timeout: float) -> None:
        """Let go of all our devices that are not to stay, and wait for the kernel.

        After `timeout` seconds what remains carries autoclear, and goes when its last user closes
        it.
        """
        managed = [
            device for device in self._registry if device.managed and device.lifetime != SYSTEM
        ]
        staying = [device for device in self._registry if device.lifetime == SYSTEM]
        # One that is killed meanwhile has not stopped: what is left then keeps its leases.
        self.let_go_all(managed)
        waits: list[asyncio.Future[Any]] = [
            *(asyncio.ensure_future(device.gone.wait()) for device in managed),
            *(asyncio.ensure_future(self._stay(device)) for device in staying),
        ]
        if waits:
            _, late = await asyncio.wait(waits, timeout=timeout)
            for wait in late:
                wait.cancel()
        self._spares.remove_all()

    def let_go(self, device: Device) -> None:
        """Begin to detach; nothing to do if that has begun."""
        if self._begin(device):
            # On disk first: the next loopd is to go on with it.
            self._records.note(device)
            self._start_end(device)

    def let_go_all(self, devices: Iterable[Device]) -> None:
        """Begin to detach devices of which the next loopd would know as well that they are over.

        Those that cannot hang go together. Nothing is written down of them, and nobody told, before
        they are unbound, unless that takes a while: with a task and a thread's turn for each, 256
        devices of a client that was killed were bound for six times as long.
        """
        together = defaultdict(list)
        for device in devices:
            if not self._begin(device):
                continue
            # What waits for a file must not have the others wait.
            if device.loop and not device.may_hang:
                together[device.owner].append((device, device.loop))
            else:
                self._start_end(device)
        for owner, each in together.items():
            self._tasks.start(self._clear_all(owner, each))

    def _start_end(self, device: Device) -> None:
        self._tasks.start(self._end(device))
        self._loop.call_later(_TOLD_AFTER, self._registry.changed, device)

    def _begin(self, device: Device) -> bool:
        """Note that a device is being detached; false if it was before."""
        if device.ending:
            return False
        device.ending = True
        device.state = DETACHING
        self._lifetimes.end(device)
        self._locks.drop(device)
        return True

    async def _end(self, device: Device) -> None:
        if device.number is not None:
            await self._clear(device)
            return
        # The hold on a block device that needed no loop device: nothing of it is ours.
        try:
            if device.held:
                await self._threads.run_in_turn(device.owner, Work.ENDING, device.held.close)
        finally:
            # The fd is gone, whatever close(2) says.
            self._registry.forget(device)

    async def _clear(self, device: Device) -> None:
        def detach() -> tuple[LoopDevice, bool]:
            loop = device.loop or opened(device)
            return loop, loop_device.detach(loop)

        try:
            with self._registry.unwatched([device]):
                loop, cleared = await self._threads.run_in_turn(device.owner, Work.ENDING, detach)
        except (LoopError, OSError) as exc:
            # Someone else's, which is as it was.
            log.warning("cannot detach %s: %s", device.node, exc, extra=device.fields)
            if device.loop:
                raise
            device.state, device.ending = ATTACHED, False
            self._registry.changed(device)
            return
        await self._finish(device, loop, cleared=cleared)

    async def _clear_all(self, owner: int, devices: list[tuple[Device, LoopDevice]]) -> None:
        """As `_clear`, of many; two at a time, as some may have to write back."""
        waiting = deque(devices)
        ended: deque[tuple[Device, LoopDevice, bool]] = deque()

        def detach() -> None:
            while True:
                try:
                    device, loop = waiting.popleft()
                except IndexError:
                    return
                cleared = False
                try:
                    cleared = loop_device.detach(loop)
                except Exception:  # a bug of ours, which costs this device another attempt
                    log.exception("cannot detach %s", device.node, extra=device.fields)
                ended.append((device, loop, cleared))

        with self._registry.unwatched(device for device, _ in devices):
            work = {
                asyncio.ensure_future(self._threads.run_in_turn(owner, Work.ENDING, detach))
                for _ in range(min(_AT_A_TIME, len(devices)))
            }
            told = False
            while work or ended:
                # One that has much to write back does not keep the others from being noted.
                if work:
                    _, work = await asyncio.wait(work, timeout=_TOLD_AFTER)
                while ended:
                    device, loop, cleared = ended.popleft()
                    if not cleared:
                        self._loop.call_later(_TOLD_AFTER, self._registry.changed, device)
                    self._tasks.start(self._finish(device, loop, cleared=cleared))
                    await asyncio.sleep(0)  # nobody else waits for all of it
                    self._registry.watch(device)
                if work and not told:
                    told = True
                    for device, _ in devices:  # those that are not gone by now
                        self._registry.changed(device)
                        await asyncio.sleep(0)

    async def _finish(self, device: Device, loop: LoopDevice, *, cleared: bool) -> None:
        """Go on until a device is cleared, and take note of it."""
        pauses = iter(_CLEAR_PAUSES)
        pause = 0.0
        while not cleared:
            # The kernel tells nobody when another opener closes.
            pause = next(pauses, pause)
            await asyncio.sleep(pause)
            clear = partial(loop_device.clear, loop)
            cleared = await self._threads.run_in_turn(device.owner, Work.ENDING, clear)
        if self._registry.is_unbound(device):
            self._registry.forget(device)
        else:
            # Others have it open, or an operation that is still under way has. The next loopd has
            # to know that it is going. The kernel tells when it is unbound; it may just have.
            self._registry.changed(device)
            self._registry.look_at(loop.number)

    def device_changed(self, device: Device) -> None:
        """Have a device stay that is to, whoever has told the kernel otherwise: losetup -d does."""
        if device.goes_with_us and device not in self._keeping:
            self._keeping[device] = self._tasks.start(self._keep(device))
            self._keeping[device].add_done_callback(
                lambda _: self._loop.call_later(_PAUSE, self._keeping.pop, device, None)
            )

    async def _stay(self, device: Device) -> None:
        """See that a device stays without loopd: the kernel does not tell of autoclear."""
        await self._registry.refresh(device)
        if keeping := self._keeping.get(device):
            await asyncio.wait([keeping])

    async def _keep(self, device: Device) -> None:
        async with device.operating:
            if not device.loop or not device.goes_with_us:
                return
            borrowed = device.loop.borrow()

            def keep() -> None:
                with closing(borrowed):
                    change.set_autoclear(borrowed, False)

            def unused() -> None:
                end = self._threads.run_in_turn(device.owner, Work.ENDING, borrowed.close)
                self._tasks.start(end)

            extra = {"UID": device.owner, **device.fields}
            node = device.node
            try:
                await self._threads.run_in_turn(device.owner, Work.OPERATION, keep, unused=unused)
            except (LoopError, OSError) as exc:  # from Linux 6.19 on, one that is mounted
                log.warning("%s goes at its last close: %s", node, exc, extra=extra)
                return
        log.info("%s stays: autoclear was set by others, and is cleared", node, extra=extra)
        await self._registry.refresh(device)

    def device_came(self, device: Device) -> None:
        """Note that a device has been bound, by whomever."""
        if device.number is not None:
            is_new = bool(device.loop and device.loop.is_new)
            self._spares.take(device.number, device.owner, is_new=is_new)

    def device_gone(self, device: Device) -> None:
        """Clean up after a device that the kernel has let go of, whoever caused that."""
        self._lifetimes.gone(device)
        if device.place:
            device.place.free()
        self._locks.drop(device)
        if (hold := device.loop or device.held) and not device.ending:
            # Behind our back, and our fds are still open.
            self._tasks.start(self._threads.run_in_turn(device.owner, Work.ENDING, hold.close))
        if device.loop:
            device.loop.release(None)
            self._spares.keep(device.loop.number)
            log.info("%s is gone", device.node, extra={"UID": device.owner, **device.fields})
        elif device.number is not None:
            self._spares.left_by_others(device.number)


def opened(device: Device) -> LoopDevice:
    """Open a device of someone else's. Raises NoSuchDevice, OSError."""
    if device.number is None:
        raise NoSuchDevice(f"{device.node} is no loop device")
    return change.open_existing(device.number, device.status.binding)
