# SPDX-License-Identifier: LGPL-2.1-or-later
"""A loop device that we hold, and how it ends; after systemd's loop-util.

Synchronous, for threads, and usable as a library of its own, with `loop.attach` and `loop.change`.
It knows files and devices, not clients: for how long a device is kept is decided above.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from loopd.fd import OwnedFd

from . import block_device, kernel, partitions
from .query import node

log = logging.getLogger(__name__)

# How long a device's lock is waited for before CLR_FD goes on without it.
_DEVICE_LOCK_TIMEOUT = 0.25

Release = Callable[[int | None], None]


class Cut(NamedTuple):
    """A size limit that leaves out a tail of less than a sector, which could not be read."""

    limit: int = 0
    """As the kernel has it; 0 if there is none such."""
    asked: int = 0
    """The limit that was asked for."""


NO_CUT = Cut()


@dataclass(kw_only=True)
class LoopDevice:
    """A device that we attached, or opened, and hold; `detach` ends it."""

    number: int
    fd: OwnedFd
    file: OwnedFd | None
    """The backing file as the client passed it: the kernel tells its size to nobody else. None on
    a device that someone else attached, or a former loopd."""
    diskseq: int
    binding: int
    """See `kernel.loop_binding`."""
    writable: bool
    ours: bool
    """Whether we attached it, or a former loopd has."""
    autoclear: bool
    """Whether it has to go at its last close, whatever others say; false means that it is as it is,
    on a device of ours that is to stay and on one of someone else's."""
    is_new: bool = False
    """Whether the device was made for us, and is to be removed when it is unbound."""
    handed_out: bool = False
    """Whether a client was given an fd on it, which is power over it."""
    cut: Cut = NO_CUT
    table: tuple[int, ...] | None = None
    """The numbers in the partition table, if it has been read."""
    lock: OwnedFd | None = None
    """A second fd on the device, which holds a BSD lock: its close makes udev look again."""
    release: Release = field(default=lambda _: None, repr=False)
    """To be called when we are done with it: with the binding that still waits for others, if it
    does."""

    def borrow(self) -> "LoopDevice":
        """The same device for one operation, to be closed after it; without its lock.

        Whatever happens to the original meanwhile, its fds mean what they meant. They are copies
        and no further openers, so a detach in between is finished by the last of them.
        """
        with block_device.opened(kernel.dup(self.fd.fileno())) as fd:
            file = None
            if self.file is not None:
                file = OwnedFd(kernel.dup(self.file.fileno()))
            return replace(self, fd=fd.move(), file=file, lock=None)

    def asked_limit(self, limit: int) -> int:
        """The size limit that was asked for, where the kernel has this one."""
        return self.cut.asked if limit and limit == self.cut.limit else limit

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


def detach(device: LoopDevice) -> bool:
    """Let go of a device: write back, remove partitions, clear, close.

    Returns whether our fds are closed. They stay open while others have a device of ours open that
    was handed out, or sysfs does not say whether it is ours, and `clear` has to be called again
    then. Closing earlier would leave the rest to autoclear, which a client with a writable fd can
    turn off; before Linux 6.11 the last opener could even unbind the device, keep its fd and read
    the next image on the number. Of a device that was not handed out the openers are mounts, udev
    and root's programs: it goes at the very moment of their last close. Nothing is raised.
    """
    # The lock first: another fd on the device would make CLR_FD a lazy one.
    if device.lock is not None:
        with _tolerated("unlock", device.node):
            device.lock.close()
    # Before any other lock: it takes as long as the dirty data needs.
    with _tolerated("write back", device.node):
        kernel.fsync(device.fd.fileno())
    return clear(device, lock_timeout=_DEVICE_LOCK_TIMEOUT)


def clear(device: LoopDevice, *, lock_timeout: float = 0) -> bool:
    """Clear a device and close it as `detach` does; whether it is closed.

    One that somebody else attached is closed in any case: the kernel does the rest. The device's
    lock is waited for so many seconds, and done without then. Nothing is raised.
    """
    try:
        ours = kernel.loop_binding(device.number) == device.binding
    except OSError as exc:
        # Nothing is cleared that may be another's by now.
        log.debug("cannot see whether %s is bound: %s", device.node, exc.strerror)
        return False
    if not ours:
        device.close()
        return True
    loop_fd = device.fd.fileno()
    # On our own fd, unlike at attach: the lock is to last through CLR_FD, and a second opener would
    # make that a lazy one. Anyone who may read the device may hold its lock for ever.
    locked = False
    with _tolerated("lock", device.node):
        locked = block_device.try_lock(loop_fd, fcntl.LOCK_EX, timeout=lock_timeout)
    with _tolerated("remove partitions", device.node):
        partitions.remove_all(loop_fd, device.number)
    if not _clear_alone(device) and device.ours and device.handed_out:
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
            # Unless the others have just gone, and it was the call that unbinds.
            return kernel.loop_binding(device.number) != device.binding
    return True


def clear_half_made(number: int, loop_fd: int) -> None:
    """Undo a binding that nobody has seen; autoclear finishes what this cannot."""
    with _tolerated("remove the partitions of half-made", node(number)):
        partitions.remove_all(loop_fd, number)
    with _tolerated("clear half-made", node(number)):
        kernel.loop_clr_fd(loop_fd)


@contextmanager
def _tolerated(step: str, node: str) -> Iterator[None]:
    """Log an OSError of a step of undoing, and go on."""
    try:
        yield
    except OSError as exc:
        log.debug("cannot %s %s: %s", step, node, exc)


def try_remove(control_fd: int, number: int) -> bool:
    """Remove a device that nobody has open; whether it is gone. Waits for an RCU grace period."""
    try:
        kernel.loop_ctl_remove(control_fd, number)
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            log.debug("cannot remove loop%d: %s", number, exc.strerror)
        return exc.errno == errno.ENODEV
    return True


def remove(number: int) -> bool:
    """Remove an unbound device, as long as nobody uses it again; false when it stays.

    Takes 5.73 s at worst. loop-control's lock is not taken: each call waits for an RCU grace
    period, some 46 ms in which nobody could allocate, and GET_FREE hides a device that is going.
    """
    with block_device.opened(kernel.open_loop_control()) as control_fd:
        for pause in (*block_device.removal_pauses(), None):
            if try_remove(control_fd.fileno(), number):
                return True
            if pause is None or kernel.loop_bound(number):
                break
            time.sleep(pause)
    log.debug("loop%d stays, unbound or in use again", number)
    return False


def clean(number: int) -> None:
    """Remove what partitions an unbound device of a former loopd still has. Raises OSError."""
    with suppress(FileNotFoundError), block_device.open_loop(number, os.O_RDONLY) as fd:
        locked = block_device.try_lock(fd.fileno(), fcntl.LOCK_EX)
        if locked and not kernel.loop_bound(number):
            partitions.remove_all(fd.fileno(), number)
