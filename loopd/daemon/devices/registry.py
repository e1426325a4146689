# SPDX-License-Identifier: LGPL-2.1-or-later
"""All bound loop devices of the machine, ours and others', kept true by the kernel's events.

Beside them the block devices that clients hold without a loop device. It looks at sysfs in threads
and decides nothing: it tells its listeners what came, changed, went.
"""

import asyncio
import errno
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from loopd.daemon.access import NOBODY
from loopd.daemon.host.udev_marks import Markers
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.errors import LoopError, NoSuchDevice
from loopd.loop import kernel, query
from loopd.loop.mounts import LoopFile

from .device import Device
from .overlap import Mapping

log = logging.getLogger(__name__)

# How long a foreign device is asked for what sysfs does not show.
_FOREIGN_TIMEOUT = 2.0
# When a device is looked at again that could not be seen, for want of memory or fds.
_LOOK_AGAIN = 1.0
# Of the devices that somebody asks about, so many are looked at in one go, 0.03 ms each. An
# answer waits for it so many seconds: sysfs can be slow, and there may be no thread.
_AT_A_TIME = 32
_PATIENCE = 2.0


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who is told of devices, each time before the caller that caused it has its answer."""

    added: Callable[[Device], None]
    changed: Callable[[Device], None]
    removed: Callable[[Device], None]


class Registry:
    """The devices by object path and by number."""

    def __init__(
        self,
        threads: Threads,
        markers: Markers,
        listeners: Listeners,
        numbers: Callable[[], list[int]],
    ) -> None:
        """`numbers` lists the numbers of all loop devices that exist."""
        self._threads = threads
        self._markers = markers
        self._numbers = numbers
        self._listeners = listeners
        self._devices: dict[str, Device] = {}
        self._by_number: dict[int, Device] = {}
        self._by_file: defaultdict[tuple[int, int], set[Device]] = defaultdict(set)
        self._private: set[Device] = set()
        self._managed = 0
        self._looks: dict[int, bool] = {}
        """Numbers that are looked at, and whether they are to be looked at once more."""
        self._unwatched: dict[int, Device] = {}
        """Devices that are not looked at for now."""
        self._missed: set[int] = set()
        """Numbers of those that would have been."""
        self._heard: dict[int, int] = {}
        """The last event of numbers that had no device of ours yet."""
        self._looking_for_lost = asyncio.Lock()
        self._lost = False
        """Whether events were lost since all devices were looked at."""
        self._asking = asyncio.Lock()
        self._looking_at_private = asyncio.Lock()
        self._private_changed = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()

    def __iter__(self) -> Iterator[Device]:
        return iter([*self._devices.values()])

    def seen_by(self, uid: int) -> list[Device]:
        """The devices that a user sees."""
        return [device for device in self if device.seen_by(uid)]

    def at(self, path: str) -> Device | None:
        """The device with this object path."""
        return self._devices.get(path)

    def numbered(self, number: int) -> Device | None:
        """The device with this loop number."""
        return self._by_number.get(number)

    def file_behind(self, number: int) -> LoopFile | None:
        """The file behind a loop device, None if it is not known; for threads, as it only reads."""
        device = self._by_number.get(number)
        file = device.file if device else None
        # By LOOP_CHANGE_FD, which raises the diskseq, it may be another one by now.
        if device is None or file is None or device.status.diskseq != device.diskseq:
            return None
        return LoopFile(
            device=file.block.number if file.block else file.device,
            is_block=file.block is not None,
            vouched_for=device.managed and not device.may_hang and file.block is None,
        )

    def over(self, mapping: Mapping) -> list[Device]:
        """The devices over the same file, of which none has gone by unnoticed yet.

        The inode of a file that is gone, too, may be another one's by now.
        """
        return [each for each in self._by_file.get(mapping.file, ()) if _is_there(each)]

    def knows(self, device: Device) -> bool:
        """Whether the device is still there."""
        return self._devices.get(device.path) is device

    def record(self, device: Device) -> None:
        """Take up a device that is bound now."""
        if device.number is not None:
            if former := self._by_number.get(device.number):
                self.forget(former)  # the kernel's event about it is still on its way
            self._by_number[device.number] = device
        self._managed += device.managed
        self._devices[device.path] = device
        if device.private:
            self._private.add(device)
        if device.mapping:
            self._by_file[device.mapping.file].add(device)
        self._listeners.added(device)
        # While it was being attached, nobody looked at it.
        if device.number is not None and self._heard.pop(device.number, 0) > device.status.seqnum:
            self.look_at(device.number)

    @property
    def managed(self) -> int:
        """How many of the devices loopd has attached."""
        return self._managed

    @staticmethod
    def is_unbound(device: Device) -> bool:
        """Whether a loop device is seen to hold no file any more, or another one."""
        return not _is_there(device)

    def changed(self, device: Device) -> None:
        """Tell that something about a device has changed."""
        self._listeners.changed(device)

    def renamed(self, device: Device, reference: bytes) -> None:
        """Take up another reference, before the next one is set."""
        device.reference = reference
        if device.number is not None:
            self._markers.rename(device.number, reference)

    def forget(self, device: Device) -> None:
        """Drop a device that the kernel has let go of."""
        if not self.knows(device):
            return
        self._managed -= device.managed
        del self._devices[device.path]
        self._private.discard(device)
        if device.mapping:
            over_file = self._by_file[device.mapping.file]
            over_file.discard(device)
            if not over_file:
                del self._by_file[device.mapping.file]
        if device.number is not None and self._by_number.get(device.number) is device:
            del self._by_number[device.number]
        device.gone.set()
        self._listeners.removed(device)

    async def refresh(self, device: Device) -> None:
        """Take up what an operation of ours has changed, before its caller has the answer."""
        if device.number is None:
            return
        try:
            status = await self._threads.look(partial(_sight, device.number))
        except OSError as exc:
            log.warning("cannot look at %s: %s", device.node, exc.strerror)
            return
        if status and self.knows(device) and status.binding == device.status.binding:
            self._update(device, status)

    async def look_for_asker(self, devices: Iterable[Device]) -> None:
        """Look at devices that somebody asks about, because the kernel does not tell of everything.

        It tells of sizes and partitions, but not of direct I/O, sector sizes, write protection,
        autoclear, nor where the file is. A device that many ask about is looked at once a second.
        """
        due = [each for each in devices if self._is_watched(each) and not each.looks.wait()]
        for device in due:
            device.looks.take(1)
        if due:
            await asyncio.wait([self._tasks.start(self._look_at(due))], timeout=_PATIENCE)

    async def _look_at(self, devices: list[Device]) -> None:
        others = []
        for start in range(0, len(devices), _AT_A_TIME):
            look = partial(_sights, devices[start : start + _AT_A_TIME])
            for device, status in await self._threads.look(look):
                if not self.knows(device):
                    continue
                if status and status.binding == device.status.binding:
                    self._update(device, status)
                elif device.number is None:
                    self.forget(device)
                else:
                    others.append(device.number)
        # What is there instead may take longer.
        await asyncio.gather(
            self._ask_for_sectors([each for each in devices if not each.managed]),
            *map(self._look, others),
        )

    async def _ask_for_sectors(self, devices: list[Device]) -> None:
        """Ask sysfs for sector sizes of devices that we do not hold.

        Where a change waits for a file that hangs, so does this, and nothing is asked meanwhile.
        """
        if not devices or self._asking.locked():
            return
        async with self._asking:
            ask = partial(_sector_sizes, devices)
            for device, size in await self._threads.run_in_turn(NOBODY, Work.OPERATION, ask):
                if self.knows(device) and device.sector_size != size:
                    device.sector_size = size
                    self._listeners.changed(device)

    def _is_watched(self, device: Device) -> bool:
        return device.number is None or self._unwatched.get(device.number) is not device

    async def look_at_all(self) -> None:
        """Look at every loop device there is, and return when that is done."""
        numbers = await self._threads.look(self._numbers)
        await asyncio.gather(
            self._look_at_private(),
            *(self._look(number) for number in {*numbers, *self._by_number}),
        )

    def heard(self, number: int | None, seqnum: int) -> None:
        """Take up an event of the kernel's, or None for those that were lost.

        Most are of what we have done ourselves, and seen. Where sixteen clients attach at once,
        looking at it again took a quarter of the processors' time.
        """
        device = None if number is None else self._by_number.get(number)
        if device is None and number is not None:
            self._heard[number] = seqnum
            if number not in self._looks and self._is_nobodys(number):
                return  # without a task, as most are that tell of what we have just detached
        if device is None or device.status.seqnum < seqnum:
            self.look_at(number)

    def look_at(self, number: int | None) -> None:
        """Look at a device that may have changed; None means at all of them."""
        if number is not None:
            self._tasks.start(self._look(number))
        elif not self._lost:
            self._lost = True
            self._tasks.start(self._look_for_lost())

    async def _look_for_lost(self) -> None:
        """Look at all devices, once a second at most, as a user may cause such losses."""
        async with self._looking_for_lost:
            self._lost = False
            log.info("events of the kernel were lost: looking at all loop devices again")
            await self.look_at_all()
            await asyncio.sleep(_LOOK_AGAIN)

    @contextmanager
    def unwatched(self, devices: Iterable[Device]) -> Iterator[None]:
        """Look at none of these until `watch`, or the end of the block, which sees to them itself.

        Looking at each of 256 that were being unbound took as long as that.
        """
        mine = {device.number: device for device in devices if device.number is not None}
        self._unwatched.update(mine)
        try:
            yield
        finally:
            for device in mine.values():
                self.watch(device)

    def watch(self, device: Device) -> None:
        """Look at a device again."""
        number = device.number
        if number is None or self._unwatched.get(number) is not device:
            return
        del self._unwatched[number]
        if number in self._missed:
            self._missed.discard(number)
            self.look_at(number)

    def look_if_bound(self, number: int) -> None:
        """Look at a device that was not looked at while it was ours."""
        if not self._is_nobodys(number):
            self.look_at(number)

    def look_at_private(self) -> None:
        """Look at the block devices that are held without a loop device."""
        if self._private:
            self._tasks.start(self._look_at_private())

    async def _look_at_private(self) -> None:
        self._private_changed = True
        if self._looking_at_private.locked():
            return
        async with self._looking_at_private:
            while self._private_changed:
                self._private_changed = False
                for device in [*self._private]:
                    await self._look_at_block(device)

    async def _look_at_block(self, device: Device) -> None:
        try:
            status = await self._threads.look(partial(_sight_of_block, device))
        except OSError as exc:
            log.warning("cannot look at %s: %s", device.node, exc.strerror)
            return
        if status is None:
            self.forget(device)
        elif self.knows(device):
            self._update(device, status)

    async def _look(self, number: int) -> None:
        device = self._by_number.get(number)
        if device and not self._is_watched(device):
            self._missed.add(number)
            return
        if number in self._looks:
            self._looks[number] = True
            return
        if device is None and self._is_nobodys(number):
            return
        self._looks[number] = True
        try:
            while self._looks[number]:
                self._looks[number] = False
                known = self._by_number.get(number)
                try:
                    seen = await self._threads.look(partial(_sight, number))
                except OSError as exc:
                    # Not seeing a device does not mean that it is gone, though its number may be.
                    level = logging.DEBUG if exc.errno == errno.ENOENT else logging.WARNING
                    log.log(level, "cannot look at loop%d: %s", number, exc.strerror)
                    self._loop.call_later(_LOOK_AGAIN, self.look_at, number)
                    return
                if self._by_number.get(number) is known:
                    await self._compare(number, known, seen)
                else:
                    self._looks[number] = True
        finally:
            del self._looks[number]

    def _is_nobodys(self, number: int) -> bool:
        """Whether a number that we know no device of is unbound, or about to be ours."""
        try:
            binding = kernel.loop_binding(number)
        except OSError:
            return False  # as far as known
        if binding is None:
            self._markers.unbound(number)
            return True
        return self._markers.claimed(number, binding)

    async def _compare(self, number: int, known: Device | None, seen: query.Status | None) -> None:
        if seen is None:
            self._markers.unbound(number)
        if known is None:
            if seen and not self._markers.claimed(number, seen.binding):
                await self._discover(number, seen)
        elif seen is None:
            self.forget(known)
        elif seen.binding != known.status.binding:
            # Unbound and bound anew before we looked.
            self.forget(known)
            self._looks[number] = True
        else:
            # The diskseq may be another one, by a CHANGE_FD of somebody who has the device open.
            self._update(known, seen)

    def _update(self, device: Device, status: query.Status) -> None:
        if status.order < device.status.order:
            return  # somebody else has looked since
        before = device.status, device.sector_size
        device.status, device.sector_size = status, _sector_size(device)
        if before != (device.status, device.sector_size):
            self._listeners.changed(device)

    async def _discover(self, number: int, status: query.Status) -> None:
        """Record a device that someone else set up."""
        device = Device(number=number, name=f"loop{number}", diskseq=status.diskseq, status=status)
        try:
            # All foreign devices together have but the turns of one user.
            told = await self._threads.run_in_turn(
                NOBODY,
                Work.OPERATION,
                partial(query.binding, number, status.binding),
                timeout=_FOREIGN_TIMEOUT,
            )
        except LoopError as exc:
            log.debug("%s does not say what it is bound to: %s", device.node, exc)
        else:
            device.file, device.reference = told.file, told.reference
            device.sector_size = told.sector_size
        claimed = self._markers.claimed(number, status.binding)
        if number not in self._by_number and not claimed:
            self.record(device)
            self._looks[number] = True  # it may have gone while it was asked


def _is_there(device: Device) -> bool:
    if device.number is None:
        return True
    try:
        return kernel.loop_binding(device.number) == device.status.binding
    except OSError:
        return True  # as far as known


def _sector_size(device: Device) -> int:
    """The sector size of a device that we hold; that of others as far as it is known."""
    # Waits for nobody, unlike the same in sysfs. The fd is closed in a thread, but not before the
    # event loop has begun to detach the device.
    if device.loop and not device.ending:
        return kernel.blksszget(device.loop.fd.fileno())
    return device.sector_size


def _sector_sizes(devices: list[Device]) -> list[tuple[Device, int]]:
    seen = []
    for device in devices:
        with suppress(OSError):  # it is gone
            number = device.number or 0
            if kernel.loop_binding(number) == device.status.binding:
                size = int(kernel.loop_attribute(number, "queue/logical_block_size"))
                seen.append((device, size))
    return seen


def _sights(devices: list[Device]) -> list[tuple[Device, query.Status | None]]:
    """How devices are, but for those that cannot be seen now."""
    seen = []
    for device in devices:
        try:
            seen.append((device, _sight_of(device)))
        except OSError as exc:
            log.debug("cannot look at %s: %s", device.node, exc.strerror)
    return seen


def _sight_of(device: Device) -> query.Status | None:
    """How a device is; in less time if it is as it was, as of 512 devices most are."""
    if device.number is None:
        return _sight_of_block(device)
    known = device.status
    with suppress(OSError):
        if query.is_as_it_was(device.number, known):
            return known
    return _sight(device.number)


def _sight(number: int) -> query.Status | None:
    try:
        return query.status(number)
    except NoSuchDevice:
        return None


def _sight_of_block(device: Device) -> query.Status | None:
    """How a block device is, None if it is gone, or another medium is in it."""
    if device.file is None or device.file.block is None:
        return None
    try:
        status = query.block_status(device.file.block.number, read_only=device.status.read_only)
    except NoSuchDevice:
        return None
    return status if status.diskseq == device.diskseq else None
