# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach: a file becomes a loop device, whoever else races us; after systemd's loop-util.

Synchronous, for threads, and usable as a library of its own, with `loop.loop_device`. It knows
files and devices, not clients: who may do what is decided above.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from loopd.errors import DeviceBusy, NotSupported
from loopd.fd import OwnedFd

from . import backing_file, block_device, kernel, loop_device, partitions, query
from .backing_file import BackingFile
from .block_device import Lock
from .configure import (
    DirectIORefused,
    Driver,
    Misplaced,
    NoNode,
    Retry,
    StaleLimit,
    StalePartitions,
    Taken,
)
from .loop_device import NO_CUT, Cut, LoopDevice, Release
from .query import node
from .request import DEFAULT_SECTOR_SIZE, AttachRequest

log = logging.getLogger(__name__)

ATTEMPTS = 64
# loop-control's lock spares retries and is not needed for being right: not worth a long wait.
_CONTROL_LOCK_TIMEOUT = 1.0
# udev looks at each new device, for some milliseconds, and keeps it locked meanwhile.
_NEW_DEVICE_LOCK_TIMEOUT = 0.25
# What one attach makes in vain is removed before it makes another one.
_STRAYS = 2

# What a device says that somebody has cleared, removed or mounted under our hands.
_NO_LONGER_OURS = (errno.ENXIO, errno.ENODEV, errno.ENOENT, errno.EBUSY)

# Our own threads queue here fairly instead of polling loop-control's lock against each other.
_allocation = threading.Lock()

THIS_KERNEL = Driver()

Claim = Callable[[int], Release]
Publish = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Which devices may be taken. A number that is wanted by the request is not asked about."""

    choose: Callable[[int], int | None] = lambda control_fd: kernel.loop_ctl_get_free(control_fd)
    """Names a device that is there and may be free; None for a new one."""
    new: Callable[[], Iterable[int]] = lambda: (-1,)
    """The numbers to try for a new device, in their order; -1 means any."""
    suits: Callable[[int], bool] = lambda _: True
    """Whether a new device may be taken."""
    stays: Callable[[int], None] = lambda _: None
    """Told of each device that was made in vain and could not be removed."""


ANY = Numbers()


def attach(
    file_fd: OwnedFd,
    file: BackingFile,
    request: AttachRequest,
    claim: Claim = lambda _: lambda _: None,
    publish: Publish = lambda number, diskseq: None,
    *,
    numbers: Numbers = ANY,
    may_hang: bool = False,
    driver: Driver = THIS_KERNEL,
) -> LoopDevice:
    """Bind a file to a free loop device, retrying while others race us.

    Takes over `file_fd`, whatever happens. `claim` is called with the number just before the file
    is bound to it, and returns what is to be called in the end (`LoopDevice.release`); `publish`
    with number and diskseq once that is done, before udev may look at the device. `numbers` says
    which devices may be taken. The device carries autoclear: it goes when the last opener, us
    included, is gone. With `may_hang` no lock is held while the file's filesystem
    is asked, and a number of its own is taken. With `request.partition_scan` the partitions' nodes
    are there when it returns.

    Raises InvalidArgs for options that do not fit the file, NotSupported, TimedOut, OSError, and
    DeviceBusy when the wanted device is in use or 64 attempts found no free one.
    """
    with file_fd, _open_control() as control_fd, ExitStack() as afterwards:
        size = backing_file.size(file_fd.fileno())
        request.check(file, size)
        if request.sector_size is None:
            found = block_device.probe_sector_size(file_fd.fileno(), request.offset)
            request = replace(request, sector_size=found or DEFAULT_SECTOR_SIZE)
            size = backing_file.size(file_fd.fileno())
            request.check(file, size)
        if request.offset % 512:
            request = replace(request, direct_io=False)  # no disk has smaller sectors
        asked, request = request, request.in_whole_sectors(size)
        attempt = _Attempt(
            control_fd=control_fd.fileno(),
            file_fd=file_fd,
            file=file,
            request=request,
            cut=NO_CUT if request is asked else Cut(request.size_limit, asked.size_limit),
            claim=claim,
            publish=publish,
            numbers=numbers,
            driver=driver,
            # Of a device that is there already, a former user may have an fd that sees our file.
            fresh=may_hang or block_device.unbinds_while_open(),
            # One that is there already is others' as well, and stays.
            was_there=request.number is not None and kernel.loop_exists(request.number),
        )
        afterwards.callback(attempt.leave)
        for pause in block_device.retry_pauses(ATTEMPTS):
            try:
                return attempt.bind()
            except DirectIORefused:
                # From scratch: some kernels answer I/O errors on a device where it failed.
                log.debug("attach: direct I/O refused; trying again without")
                attempt.request = replace(request, direct_io=False)
                continue
            except Retry as exc:
                log.debug("attach: %s; trying again", exc)
                if isinstance(exc, StaleLimit):
                    loop_device.try_remove(control_fd.fileno(), exc.number)
                attempt.require_nodes(exc)
                if request.number is not None and attempt.is_anothers(request.number):
                    raise DeviceBusy(f"{node(request.number)} has a file attached already") from exc
                # A device that someone keeps locked is chosen again and again, as one is that udev
                # still looks at. A new one is nobody's, and need not be waited for.
                if not attempt.fresh:
                    attempt.fresh = True
                    continue
            time.sleep(pause)
    if request.number is not None:
        raise DeviceBusy(f"{node(request.number)} did not come free in {ATTEMPTS} attempts")
    raise DeviceBusy(f"no loop device came free in {ATTEMPTS} attempts: try again later")


def _open_control() -> OwnedFd:
    try:
        return block_device.opened(kernel.open_loop_control())
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise NotSupported("the kernel's loop driver is not loaded: modprobe loop") from exc
        raise


@dataclass(kw_only=True)
class _Attempt:
    """What all attempts to bind one file share, and what changes from one to the next."""

    control_fd: int
    file_fd: OwnedFd
    file: BackingFile
    request: AttachRequest
    cut: Cut
    claim: Claim
    publish: Publish
    numbers: Numbers
    driver: Driver
    fresh: bool
    """Whether a new device is to be made instead of taking one that is there."""
    was_there: bool
    """Whether there was a device of the wanted number before."""
    lacked_node: bool = False
    """Whether a device of an attempt before had no node."""
    half_made: int | None = None
    """The last binding of ours, which udev may have open yet when it has been cleared."""
    strays: set[int] = field(default_factory=set)
    """The devices that were made in vain and are still there."""
    misplaced: set[int] = field(default_factory=set)
    """Those in the place of whose nodes something else is."""

    def is_anothers(self, number: int) -> bool:
        """Whether a device has a file of somebody else's."""
        return kernel.loop_binding(number) not in (None, self.half_made)

    def leave(self) -> None:
        """Have somebody else remove what we could not."""
        for number in self.strays | self.misplaced:
            self.numbers.stays(number)

    def _remove(self, number: int) -> None:
        self.strays.discard(number)
        if not loop_device.try_remove(self.control_fd, number):
            self.strays.add(number)

    def require_nodes(self, failure: Retry) -> None:
        """Raise NotSupported for a failure that comes of /dev and would come again."""
        wanted = self.request.number is not None
        if isinstance(failure, Misplaced) and wanted:
            raise NotSupported(str(failure)) from failure
        if isinstance(failure, NoNode):
            # Once it can be a device that somebody is just making or removing.
            if self.lacked_node:
                raise NotSupported(str(failure)) from failure
            self.lacked_node = True

    def bind(self) -> LoopDevice:
        """Take a device and bind the file to it, or raise and leave nothing but strays."""
        for number in sorted(self.strays):
            self._remove(number)
        wanted = self.request.number
        anew = wanted is not None and block_device.unbinds_while_open()
        # Before any lock, since a removal takes 46 ms.
        if anew and not loop_device.try_remove(self.control_fd, wanted or 0):
            raise Taken(f"somebody has loop{wanted} open")
        # Lock order: loop-control first, the device second. Nothing is waited for with the first
        # held.
        with ExitStack() as stray, ExitStack() as allocating:
            if _allocation.acquire(timeout=_CONTROL_LOCK_TIMEOUT):
                allocating.callback(_allocation.release)
            allocating.enter_context(
                block_device.control_locked(self.control_fd, timeout=_CONTROL_LOCK_TIMEOUT)
            )
            number, is_new = self._allocate()
            if is_new:
                # Nobody else would remove it, and one more stays with each failure.
                stray.callback(self._remove, number)
            if self.fresh:
                # What follows waits: for udev, which looks at each new device, and for a filesystem
                # that hangs, as binding asks it.
                allocating.close()
            try:
                with self._free_device(number, is_new=is_new) as (loop_fd, lock_fd):
                    device = self._bind(number, loop_fd, lock_fd, allocating.close)
            except Misplaced:
                stray.pop_all()  # else the next new device would have the same number
                if is_new:
                    self.misplaced.add(number)
                raise
            stray.pop_all()
            device.is_new = is_new
            return device

    def _allocate(self) -> tuple[int, bool]:
        """The number of a device that may be free, and whether it was made for us."""
        wanted = self.request.number
        if wanted is not None:
            return wanted, self._add(wanted) is not None and not self.was_there
        if not self.fresh:
            number = self.numbers.choose(self.control_fd)
            if number is not None:
                return number, False
        for each in self.numbers.new():
            if len(self.strays) >= _STRAYS:
                break
            number = self._add(each)
            if number is None:
                continue
            # Somebody may have let go of that very number meanwhile.
            if self.numbers.suits(number):
                return number, True
            self.strays.add(number)
        raise Taken("no number is left for a new device")

    def _add(self, number: int) -> int | None:
        """Make a device and return its number; None if it is there already."""
        try:
            return kernel.loop_ctl_add(self.control_fd, number)
        except OSError as exc:
            if exc.errno != errno.EEXIST:
                raise
        return None

    @contextmanager
    def _free_device(self, number: int, *, is_new: bool) -> Iterator[tuple[OwnedFd, OwnedFd]]:
        """An unbound device that we have open and locked: its fd, and that of the lock."""
        # By sysfs, and before it is opened: a device that someone has bound to a hanging file
        # hangs whoever opens it or asks it anything.
        if kernel.loop_bound(number):
            raise Taken(f"loop{number} is bound already")
        with (
            _open_free(number, os.O_RDONLY if self.request.read_only else os.O_RDWR) as loop_fd,
            # A second fd for the lock: udev looks again when a device is closed, loop_fd stays.
            _reopened(number, loop_fd) as lock_fd,
        ):
            timeout = _NEW_DEVICE_LOCK_TIMEOUT if is_new else 0
            if not block_device.try_lock(lock_fd.fileno(), fcntl.LOCK_EX, timeout=timeout):
                raise Taken(f"loop{number} is locked by someone else")
            if kernel.loop_bound(number):
                raise Taken(f"loop{number} is bound already")
            if count := partitions.remove_all(loop_fd.fileno(), number):
                raise StalePartitions(f"loop{number} had {count} partitions of a former life")
            if block_device.discard_is_limited(number):
                raise StaleLimit(number)
            yield loop_fd, lock_fd

    def _bind(
        self, number: int, loop_fd: OwnedFd, lock_fd: OwnedFd, allocated: Callable[[], None]
    ) -> LoopDevice:
        """Bind, and make the device what it is to be; `allocated` is called once it is bound."""
        request = self.request
        which: int | None = None
        with ExitStack() as undo:
            release = self.claim(number)
            # Whoever was faster has it, and udev has waited for our lock.
            undo.callback(lambda: release(_waiting(number, which)))

            def bound() -> None:
                nonlocal which
                allocated()
                # Last first: the lock's fd goes before CLR_FD, which would be lazy with two
                # openers, and the claim lasts until the device is closed.
                undo.callback(loop_fd.close)
                undo.callback(loop_device.clear_half_made, number, loop_fd.fileno())
                undo.callback(lock_fd.close)
                which = self.half_made = kernel.loop_binding(number)

            try:
                self.driver.bind(number, loop_fd.fileno(), self.file_fd.fileno(), request, bound)
            except OSError as exc:
                if which is not None and exc.errno in _NO_LONGER_OURS:
                    raise Taken(f"somebody got hold of loop{number}") from exc
                raise
            if which is None:
                raise Taken(f"loop{number} was cleared by someone else")
            # Since our look somebody may have added a partition, to see the file through it.
            if partitions.remove_all(loop_fd.fileno(), number) and kernel.loop_partitions(number):
                raise StalePartitions(f"a partition of a former life of loop{number} is in use")
            if self.file.identity.block:
                block_device.mirror_discard_limit(number, self.file.identity.block.number)
            table = partitions.scan(loop_fd.fileno(), number) if request.partition_scan else None
            diskseq = query.diskseq(loop_fd.fileno(), which)
            self.publish(number, diskseq)
            keeps_lock = request.lock is not Lock.NONE
            if keeps_lock and not block_device.try_lock(lock_fd.fileno(), request.lock.operation):
                raise Taken("someone else came in while the lock was changed")
            undo.pop_all()
        return LoopDevice(
            number=number,
            fd=loop_fd.move(),
            file=self.file_fd.move(),
            diskseq=diskseq,
            binding=which,
            writable=not request.read_only,
            ours=True,
            autoclear=True,
            cut=self.cut,
            table=table,
            lock=lock_fd.move() if keeps_lock else None,
            release=release,
        )


def _waiting(number: int, binding: int | None) -> int | None:
    """The binding, if it is still there."""
    return binding if binding is not None and kernel.loop_binding(number) == binding else None


def _open_free(number: int, flags: int) -> OwnedFd:
    try:
        return block_device.open_loop(number, flags)
    except block_device.NotALoopDevice as exc:
        log.warning("%s", exc)
        raise Misplaced(str(exc)) from exc
    except OSError as exc:
        if exc.errno not in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise
        if exc.errno == errno.ENOENT and _is_there(number):
            raise NoNode(
                f"{node(number)} is missing, as if the kernel did not make the nodes in this /dev: "
                "run loopd where /dev is a devtmpfs"
            ) from exc
        raise Taken(f"loop{number} vanished") from exc  # removed since GET_FREE


def _reopened(number: int, loop_fd: OwnedFd) -> OwnedFd:
    try:
        return block_device.opened(kernel.reopen(loop_fd.fileno(), os.O_RDONLY))
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise Taken(f"loop{number} vanished") from exc
        raise


def _is_there(number: int) -> bool:
    """Whether the kernel has such a device, bound or not."""
    try:
        kernel.loop_attribute(number, "dev")
    except OSError:
        return False
    return True
