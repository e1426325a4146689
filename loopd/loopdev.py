# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach and detach loop devices, after systemd's loop-util.

Synchronous, for threads, and usable as a library of its own. It knows files and devices, not
clients: who may do what, and for how long a device is kept, is decided above.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

from . import backing, blockdev, kernel, loopinfo, partition
from .backing import BackingFile
from .binding import DirectIORefused, Driver, Retry, StalePartitions, Taken
from .blockdev import Lock
from .errors import DeviceBusy, NotSupported
from .fd import OwnedFd
from .loopinfo import node
from .request import DEFAULT_SECTOR_SIZE, AttachRequest

log = logging.getLogger(__name__)

ATTEMPTS = 64
# loop-control's lock spares retries and is not needed for being right: not worth a long wait.
_CONTROL_LOCK_TIMEOUT = 1.0
# How long a device's lock is waited for before CLR_FD goes on without it.
_DEVICE_LOCK_TIMEOUT = 0.25

# Our own threads queue here fairly instead of polling loop-control's lock against each other.
_allocation = threading.Lock()

THIS_KERNEL = Driver()

Claim = Callable[[int], Callable[[bool], None]]


@dataclass(kw_only=True)
class LoopDevice:
    """A device that we attached and hold open; `detach` ends it."""

    number: int
    fd: OwnedFd
    file: OwnedFd | None
    """The backing file as the client passed it: the kernel tells its size to nobody else. None on
    a device that someone else attached."""
    diskseq: int
    binding: int
    """See `kernel.loop_binding`."""
    writable: bool
    lock: OwnedFd | None = None
    """A second fd on the device, which holds a BSD lock: its close makes udev look again."""
    release: Callable[[bool], None] = field(default=lambda _: None, repr=False)
    """To be called with whether the kernel still has the file bound, when we are done with it."""

    @property
    def ours(self) -> bool:
        """Whether we attached it."""
        return self.file is not None

    def borrow(self) -> "LoopDevice":
        """The same device for one operation, to be closed after it.

        Whatever happens to the original meanwhile, its fds mean what they meant. They are copies
        and no further openers, so a detach in between is finished by the last of them.
        """
        with blockdev.opened(kernel.dup(self.fd.fileno())) as fd:
            file, lock = (
                None if each is None else OwnedFd(kernel.dup(each.fileno()), kernel.close)
                for each in (self.file, self.lock)
            )
            return replace(self, fd=fd.move(), file=file, lock=lock)

    def close(self) -> None:
        """Let go of our fds; the file last, whose filesystem may make its close wait.

        This clears nothing: a device of ours goes with its last opener, by autoclear, another's
        stays.
        """
        for fd in (self.lock, self.fd, self.file):
            if fd is not None:
                # The fd is gone whatever close(2) says; what it says is about the file's data.
                with _tolerated("close", self.node):
                    fd.close()

    @property
    def node(self) -> str:
        """The device node, such as /dev/loop3."""
        return node(self.number)


# --- attach -------------------------------------------------------------------------------------


def attach(
    file_fd: OwnedFd,
    file: BackingFile,
    request: AttachRequest,
    claim: Claim = lambda _: lambda _: None,
    *,
    may_hang: bool = False,
    driver: Driver = THIS_KERNEL,
) -> LoopDevice:
    """Bind a file to a free loop device, retrying while others race us.

    Takes over `file_fd`, whatever happens. `claim` is called with the number just before the file
    is bound to it, and returns what is to be called in the end (`LoopDevice.release`). The device
    carries autoclear: it goes when the last opener, us included, is gone. With `may_hang` no lock
    is held while the file's filesystem is asked, and a number of its own is taken. With
    `request.partition_scan` the partitions' nodes are there when it returns.

    Raises InvalidArgs for options that do not fit the file, NotSupported, TimedOut, OSError, and
    DeviceBusy when the wanted device is in use or 64 attempts found no free one.
    """
    with file_fd, _open_control() as control_fd:
        if request.sector_size is None:
            found = blockdev.probe_sector_size(file_fd.fileno(), request.offset)
            request = replace(request, sector_size=found or DEFAULT_SECTOR_SIZE)
        request.check(file, backing.size(file_fd.fileno()))
        # Of a device that is there already, a former user may have an fd that would see our file.
        fresh = may_hang or blockdev.unbinds_while_open()
        for pause in blockdev.retry_pauses(ATTEMPTS):
            try:
                return _bind_device(
                    control_fd.fileno(), file_fd, file, request, claim, may_hang, fresh, driver
                )
            except DirectIORefused:
                # From scratch: some kernels answer I/O errors on a device where it failed.
                log.debug("attach: direct I/O refused; trying again without")
                request = replace(request, direct_io=False)
                continue
            except Retry as exc:
                log.debug("attach: %s; trying again", exc)
                if request.number is not None and kernel.loop_bound(request.number):
                    raise DeviceBusy(f"{node(request.number)} has a file attached already") from exc
                # A device that someone keeps locked is offered by GET_FREE again and again.
                fresh = True
            time.sleep(pause)
    if request.number is not None:
        raise DeviceBusy(f"{node(request.number)} did not come free in {ATTEMPTS} attempts")
    raise DeviceBusy(f"no loop device came free in {ATTEMPTS} attempts: try again later")


def _open_control() -> OwnedFd:
    try:
        return blockdev.opened(kernel.open_loop_control())
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise NotSupported("the kernel's loop driver is not loaded: modprobe loop") from exc
        raise


def _bind_device(
    control_fd: int,
    file_fd: OwnedFd,
    file: BackingFile,
    request: AttachRequest,
    claim: Claim,
    may_hang: bool,
    fresh: bool,
    driver: Driver,
) -> LoopDevice:
    # Lock order: loop-control first, the device second. Nothing is waited for with the first held.
    with ExitStack() as allocating:
        if _allocation.acquire(timeout=_CONTROL_LOCK_TIMEOUT):
            allocating.callback(_allocation.release)
        allocating.enter_context(blockdev.control_locked(control_fd, timeout=_CONTROL_LOCK_TIMEOUT))
        number = _allocate(control_fd, request.number, fresh)
        with _free_device(number, request) as (loop_fd, lock_fd):
            if may_hang:
                # Binding asks the file's filesystem: only this attach is to wait for it.
                allocating.close()
            return _bind(
                number, loop_fd, lock_fd, file_fd, file, request, claim, driver, allocating.close
            )


def _allocate(control_fd: int, wanted: int | None, fresh: bool) -> int:
    """The number of a device that may be free: the wanted one, any, or a new one."""
    if wanted is None:
        return (
            kernel.loop_ctl_add(control_fd, -1) if fresh else kernel.loop_ctl_get_free(control_fd)
        )
    if blockdev.unbinds_while_open() and not _try_remove(control_fd, wanted):
        raise Taken(f"somebody has loop{wanted} open")
    try:
        kernel.loop_ctl_add(control_fd, wanted)
    except OSError as exc:
        if exc.errno != errno.EEXIST:
            raise
    return wanted


def _try_remove(control_fd: int, number: int) -> bool:
    """Remove a device that nobody has open; whether it is gone."""
    try:
        kernel.loop_ctl_remove(control_fd, number)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.ENODEV):
            raise
        return exc.errno == errno.ENODEV
    return True


@contextmanager
def _free_device(number: int, request: AttachRequest) -> Iterator[tuple[OwnedFd, OwnedFd]]:
    """An unbound device that we have open and locked: its fd, and that of the lock."""
    with (
        _open_free(number, os.O_RDONLY if request.read_only else os.O_RDWR) as loop_fd,
        # A second fd for the lock: udev looks again when a device is closed, and loop_fd stays.
        _open_free(number, os.O_RDONLY) as lock_fd,
    ):
        if not blockdev.try_lock(lock_fd.fileno(), fcntl.LOCK_EX):
            raise Taken(f"loop{number} is locked by someone else")
        # By sysfs: asking the device would ask the filesystem of whoever has bound it since.
        if kernel.loop_bound(number):
            raise Taken(f"loop{number} is bound already")
        if count := partition.remove_all(loop_fd.fileno(), number):
            raise StalePartitions(f"loop{number} had {count} partitions of a former life")
        yield loop_fd, lock_fd


def _bind(
    number: int,
    loop_fd: OwnedFd,
    lock_fd: OwnedFd,
    file_fd: OwnedFd,
    file: BackingFile,
    request: AttachRequest,
    claim: Claim,
    driver: Driver,
    allocated: Callable[[], None],
) -> LoopDevice:
    binding: int | None = None
    with ExitStack() as undo:
        release = claim(number)
        # Whoever was faster has it, and udev has waited for our lock.
        undo.callback(lambda: release(_still(number, binding)))

        def bound() -> None:
            nonlocal binding
            allocated()
            # Last first: the lock's fd goes before CLR_FD, which would be lazy with two openers,
            # and the claim lasts until the device is closed.
            undo.callback(loop_fd.close)
            undo.callback(_clear, number, loop_fd.fileno())
            undo.callback(lock_fd.close)
            binding = kernel.loop_binding(number)

        driver.bind(number, loop_fd.fileno(), file_fd.fileno(), request, bound)
        if binding is None:
            raise Taken(f"loop{number} was cleared by someone else")
        # Between our look and the binding somebody may have added one, to see the file through.
        partition.remove_all(loop_fd.fileno(), number)
        if kernel.loop_partitions(number):
            raise StalePartitions(f"a partition of a former life of loop{number} is in use")
        if file.identity.block:
            blockdev.mirror_discard_limit(number, file.identity.block.number)
        if request.partition_scan:
            partition.scan(loop_fd.fileno(), number)
        diskseq = loopinfo.diskseq(loop_fd.fileno(), binding)
        keeps_lock = request.lock is not Lock.NONE
        if keeps_lock and not blockdev.try_lock(lock_fd.fileno(), request.lock.operation):
            raise Taken("someone else came in while the lock was changed")
        undo.pop_all()
    return LoopDevice(
        number=number,
        fd=loop_fd.move(),
        file=file_fd.move(),
        diskseq=diskseq,
        binding=binding,
        writable=not request.read_only,
        lock=lock_fd.move() if keeps_lock else None,
        release=release,
    )


def _still(number: int, binding: int | None) -> bool:
    return binding is not None and kernel.loop_binding(number) == binding


def _open_free(number: int, flags: int) -> OwnedFd:
    try:
        return blockdev.opened(kernel.open_loop(number, flags))
    except OSError as exc:
        # Removed since GET_FREE, or its node not made yet.
        if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise Taken(f"loop{number} vanished") from exc
        raise


def _clear(number: int, loop_fd: int) -> None:
    """Undo a binding that nobody has seen; autoclear finishes what this cannot."""
    with _tolerated("remove the partitions of half-made", node(number)):
        partition.remove_all(loop_fd, number)
    with _tolerated("clear half-made", node(number)):
        kernel.loop_clr_fd(loop_fd)


# --- detach -------------------------------------------------------------------------------------


def detach(device: LoopDevice) -> bool:
    """Let go of a device: write back, remove partitions, clear, close.

    Returns whether our fds are closed. They stay open while others have a device of ours open, and
    `clear` has to be called again then. Closing earlier would leave the rest to autoclear, which
    whoever has a writable fd can turn off; before Linux 6.11 the last opener could even unbind the
    device, keep its fd and read the next image on the number. Nothing is raised.
    """
    # The lock first: another fd on the device would make CLR_FD a lazy one.
    if device.lock is not None:
        with _tolerated("unlock", device.node):
            device.lock.close()
    # Before any other lock: it takes as long as the dirty data needs.
    with _tolerated("write back", device.node):
        kernel.fsync(device.fd.fileno())
    return clear(device)


def clear(device: LoopDevice) -> bool:
    """Clear and close a device if nobody else has it open, as `detach` does; whether that was so.

    A device that somebody else attached is cleared once and closed: the kernel does the rest.
    """
    loop_fd = device.fd.fileno()
    # On our own fd, unlike at attach: the lock is to last through CLR_FD, and a second opener would
    # make that a lazy one. Anyone who may read the device may hold its lock for ever.
    locked = blockdev.try_lock(loop_fd, fcntl.LOCK_EX, timeout=_DEVICE_LOCK_TIMEOUT)
    if not locked:
        log.debug("%s stays locked by someone else; clearing it without the lock", device.node)
    with _tolerated("remove partitions", device.node):
        partition.remove_all(loop_fd, device.number)
    if not _clear_alone(device) and device.ours:
        if locked:
            with _tolerated("unlock", device.node):  # udev waits for it
                kernel.flock(loop_fd, fcntl.LOCK_UN)
        return False
    device.close()
    return True


def _clear_alone(device: LoopDevice) -> bool:
    """Issue CLR_FD, and find out whether we were the only opener."""
    with _tolerated("clear", device.node):
        kernel.loop_clr_fd(device.fd.fileno())
        # Before Linux 6.11 the only opener's call unbinds, and somebody else may have the number.
        if kernel.loop_binding(device.number) == device.binding:
            # From 6.11 on it leaves the binding to our close, lets nobody else in and takes no
            # second CLR_FD. With other openers it only turns autoclear on, as often as we like.
            kernel.loop_clr_fd(device.fd.fileno())
            return False
    return True


@contextmanager
def _tolerated(step: str, node: str) -> Iterator[None]:
    """Log an OSError of a step of undoing, and go on."""
    try:
        yield
    except OSError as exc:
        log.debug("cannot %s %s: %s", step, node, exc)


def remove(number: int) -> bool:
    """Remove an unbound device, as long as nobody uses it again; false when it stays.

    Takes 5.73 s at worst. loop-control's lock is not taken: each call waits for an RCU grace
    period, some 46 ms in which nobody could allocate, and GET_FREE hides a device that is going.
    """
    with blockdev.opened(kernel.open_loop_control()) as control_fd:
        for pause in (*blockdev.removal_pauses(), None):
            if _try_remove(control_fd.fileno(), number):
                return True
            if pause is None or kernel.loop_bound(number):
                break
            time.sleep(pause)
    log.debug("loop%d stays, unbound or in use again", number)
    return False


def clean(number: int) -> None:
    """Remove what partitions an unbound device of a former loopd still has. Raises OSError."""
    with suppress(FileNotFoundError), blockdev.opened(kernel.open_loop(number, os.O_RDONLY)) as fd:
        locked = blockdev.try_lock(fd.fileno(), fcntl.LOCK_EX)
        if locked and not kernel.loop_bound(number):
            partition.remove_all(fd.fileno(), number)
