# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach, describe, resize and detach loop devices, after systemd's loop-util.

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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace

from . import blockdev, kernel
from .backing import BackingFile, FileIdentity, identify
from .errors import DeviceBusy, InvalidArgs, NoSuchDevice, NotSupported
from .fd import OwnedFd

log = logging.getLogger(__name__)

ATTEMPTS = 64
# loop-control's lock spares retries and is not needed for being right: not worth a long wait.
_CONTROL_LOCK_TIMEOUT = 1.0
# How long a device's lock is waited for before CLR_FD goes on without it.
_DEVICE_LOCK_TIMEOUT = 0.25

# Our own threads queue here fairly instead of polling loop-control's lock against each other.
_allocation = threading.Lock()


class _Retry(Exception):
    """This attempt led nowhere, another may."""


class _Taken(_Retry):
    """Someone else bound, locked or removed the device between our calls."""


class _StalePartitions(_Retry):
    """The unbound device had partitions of a former life; they are removed now."""


class _DirectIORefused(_Retry):
    """The kernel bound the file, but not in direct I/O mode."""


@dataclass(frozen=True, kw_only=True)
class AttachRequest:
    """What a loop device is to be; sizes and offsets in bytes."""

    read_only: bool = False
    offset: int = 0
    size_limit: int = 0
    """0 means to the end of the file."""
    sector_size: int = 512
    direct_io: bool = True
    reference: bytes = b""
    """The free-form name, lo_file_name."""


Claim = Callable[[int], Callable[[bool], None]]


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a bound loop device is set up now; sizes and offsets in bytes."""

    diskseq: int
    device_number: int
    backing_file: bytes
    """The kernel's idea of the path, for showing only."""
    offset: int
    size_limit: int
    size: int
    sector_size: int
    read_only: bool
    direct_io: bool
    autoclear: bool
    partition_scan: bool


@dataclass(kw_only=True)
class LoopDevice:
    """A device that we attached and hold open; `detach` ends it."""

    number: int
    fd: OwnedFd
    file: OwnedFd | None
    """The backing file as the client passed it: the kernel tells its size to nobody else. None on
    a device that someone else attached."""
    diskseq: int
    writable: bool
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
            file = None
            if self.file is not None:
                file = OwnedFd(kernel.dup(self.file.fileno()))
            return replace(self, fd=fd.move(), file=file)

    def close(self) -> None:
        """Let go of our fds; the file last, whose filesystem may make its close wait."""
        self.fd.close()
        if self.file is not None:
            self.file.close()

    @property
    def node(self) -> str:
        """The device node, such as /dev/loop3."""
        return node(self.number)


def node(number: int) -> str:
    """The device node of a loop number."""
    return f"/dev/loop{number}"


# --- attach -------------------------------------------------------------------------------------


def check_request(file: BackingFile, request: AttachRequest, size: int) -> None:
    """Refuse what the kernel would take and round, clamp or fail later; `size` is the file's.

    Raises InvalidArgs naming the option.
    """
    if not request.read_only and file.sealed:
        raise InvalidArgs("read-only: the memfd is sealed against writing, so it must be true")
    if not request.read_only and not file.writable:
        raise InvalidArgs("read-only: the file is open for reading only, so it cannot be false")
    if request.offset % 512:
        raise InvalidArgs("offset: not a multiple of 512")
    if request.offset >= size:
        raise InvalidArgs(f"offset: not inside the file, which has {size} bytes")
    sector_size = request.sector_size
    if sector_size < 512 or sector_size & (sector_size - 1):
        raise InvalidArgs("sector-size: not a power of two from 512")
    if request.size_limit % sector_size:
        raise InvalidArgs(f"size-limit: not a multiple of the sector size, {sector_size}")
    if request.size_limit > size - request.offset:
        raise InvalidArgs(f"size-limit: reaches past the end of the file, which has {size} bytes")
    if size - request.offset < sector_size:
        raise InvalidArgs("offset: less than one sector of the file is left after it")


def attach(
    file_fd: OwnedFd,
    file: BackingFile,
    request: AttachRequest,
    claim: Claim = lambda _: lambda _: None,
) -> LoopDevice:
    """Bind a file to a free loop device, retrying while others race us.

    Takes over `file_fd`, whatever happens. `claim` is called with the number just before the file
    is bound to it, and returns what is to be called in the end (`LoopDevice.release`). The device carries
    autoclear: it goes when the last opener, us included, is gone.

    Raises InvalidArgs for options that do not fit the file, NotSupported, DeviceBusy when 64
    attempts found no free device, and OSError.
    """
    with file_fd, blockdev.opened(kernel.open_loop_control()) as control_fd:
        check_request(file, request, kernel.statx(file_fd.fileno(), 0).stx_size)
        fresh = False
        for pause in blockdev.retry_pauses(ATTEMPTS):
            try:
                return _bind_free_device(control_fd.fileno(), file_fd, request, claim, fresh)
            except _DirectIORefused:
                # From scratch: some kernels answer I/O errors on a device where it failed.
                log.debug("attach: direct I/O refused; trying again without")
                request = replace(request, direct_io=False)
                continue
            except _Retry as exc:
                log.debug("attach: %s; trying again", exc)
                # A device that someone keeps locked is offered by GET_FREE again and again.
                fresh = isinstance(exc, _Taken)
            time.sleep(pause)
    raise DeviceBusy(f"no loop device came free in {ATTEMPTS} attempts: try again later")


def _bind_free_device(
    control_fd: int,
    file_fd: OwnedFd,
    request: AttachRequest,
    claim: Claim,
    fresh: bool,
) -> LoopDevice:
    # Lock order: loop-control first, the device second. Nothing is waited for with the first held.
    with ExitStack() as locks:
        if _allocation.acquire(timeout=_CONTROL_LOCK_TIMEOUT):
            locks.callback(_allocation.release)
        locks.enter_context(blockdev.control_locked(control_fd, timeout=_CONTROL_LOCK_TIMEOUT))
        number = (
            kernel.loop_ctl_add(control_fd, -1) if fresh else kernel.loop_ctl_get_free(control_fd)
        )
        return _bind(number, file_fd, request, claim)


def _bind(
    number: int,
    file_fd: OwnedFd,
    request: AttachRequest,
    claim: Claim,
) -> LoopDevice:
    # The ends of these blocks undo, last first: the lock's fd goes before CLR_FD, which would be
    # lazy with two openers, and the claim lasts until the device is closed.
    with (
        ExitStack() as claimed,
        _open_free(number, os.O_RDONLY if request.read_only else os.O_RDWR) as loop_fd,
        ExitStack() as bound,
        # A second fd for the lock: udev looks again when a device is closed, and loop_fd stays.
        _open_free(number, os.O_RDONLY) as lock_fd,
    ):
        if not blockdev.try_lock(lock_fd.fileno(), fcntl.LOCK_EX):
            raise _Taken(f"loop{number} is locked by someone else")
        if _is_bound(loop_fd.fileno()):
            raise _Taken(f"loop{number} is bound already")
        if count := blockdev.remove_partitions(loop_fd.fileno(), number):
            raise _StalePartitions(f"loop{number} had {count} partitions of a former life")
        release = claim(number)
        claimed.callback(lambda: release(kernel.loop_bound(number)))
        _configure(loop_fd.fileno(), file_fd.fileno(), request)
        bound.callback(_clear, loop_fd.fileno())
        _verify(loop_fd.fileno(), request)
        diskseq = kernel.blkgetdiskseq(loop_fd.fileno())
        bound.pop_all()
        claimed.pop_all()
        return LoopDevice(
            number=number,
            fd=loop_fd.move(),
            file=OwnedFd(file_fd.release()),
            diskseq=diskseq,
            writable=not request.read_only,
            release=release,
        )


def _open_free(number: int, flags: int) -> OwnedFd:
    try:
        return blockdev.opened(kernel.open_loop(number, flags))
    except OSError as exc:
        # Removed since GET_FREE, or its node not made yet.
        if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise _Taken(f"loop{number} vanished") from exc
        raise


def _is_bound(loop_fd: int) -> bool:
    try:
        kernel.loop_get_status64(loop_fd)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
        return False
    return True


def _configure(loop_fd: int, file_fd: int, request: AttachRequest) -> None:
    config = kernel.loop_config(fd=file_fd, block_size=request.sector_size)
    config.info.lo_offset = request.offset
    config.info.lo_sizelimit = request.size_limit
    config.info.lo_file_name = request.reference
    config.info.lo_flags = (
        kernel.LO_FLAGS_AUTOCLEAR
        | (kernel.LO_FLAGS_READ_ONLY if request.read_only else 0)
        | (kernel.LO_FLAGS_DIRECT_IO if request.direct_io else 0)
    )
    try:
        kernel.loop_configure(loop_fd, config)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise _Taken("bound by someone else in between") from exc
        if exc.errno == errno.EINVAL and request.sector_size > os.sysconf("SC_PAGE_SIZE"):
            raise InvalidArgs(
                f"sector-size: this kernel does not take {request.sector_size}"
            ) from exc
        if exc.errno in (errno.EINVAL, errno.ENOTTY):
            raise NotSupported("this kernel has no LOOP_CONFIGURE (Linux 5.8)") from exc
        raise


def _verify(loop_fd: int, request: AttachRequest) -> None:
    """Make sure that the kernel did what LOOP_CONFIGURE said; Linux 5.8 itself forgets parts."""
    if kernel.blksszget(loop_fd) != request.sector_size:
        raise NotSupported("this kernel's LOOP_CONFIGURE does not set the sector size")
    if request.size_limit and kernel.blkgetsize64(loop_fd) != request.size_limit:
        raise NotSupported("this kernel's LOOP_CONFIGURE does not set the size limit")
    direct_io = bool(kernel.loop_get_status64(loop_fd).lo_flags & kernel.LO_FLAGS_DIRECT_IO)
    if request.direct_io and not direct_io:
        raise _DirectIORefused
    if direct_io and not request.direct_io:
        # A file open with O_DIRECT turns it on by itself; the option is what counts.
        kernel.loop_set_direct_io(loop_fd, False)


def _clear(loop_fd: int) -> None:
    """Undo a binding that nobody has seen; autoclear finishes what this cannot."""
    try:
        kernel.loop_clr_fd(loop_fd)
    except OSError as exc:
        log.debug("cannot clear a half-made loop device: %s", exc)


# --- describe -----------------------------------------------------------------------------------


def status(number: int) -> Status:
    """How a bound device is set up, from sysfs alone: no ioctl, so no filesystem is asked.

    Raises NoSuchDevice if it is not bound.
    """

    def number_in(attribute: str) -> int:
        return int(kernel.loop_attribute(number, attribute))

    try:
        return Status(
            diskseq=number_in("diskseq"),
            device_number=os.makedev(*_numbers(number)),
            backing_file=kernel.loop_attribute(number, "loop/backing_file"),
            offset=number_in("loop/offset"),
            size_limit=number_in("loop/sizelimit"),
            size=number_in("size") * 512,
            sector_size=number_in("queue/logical_block_size"),
            read_only=number_in("ro") != 0,
            direct_io=number_in("loop/dio") != 0,
            autoclear=number_in("loop/autoclear") != 0,
            partition_scan=number_in("loop/partscan") != 0,
        )
    except OSError as exc:
        raise NoSuchDevice(f"loop{number} has no file attached") from exc


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What only the device itself tells about its binding."""

    diskseq: int
    backing_device: int
    """st_dev of the file; 0 where the device did not tell."""
    backing_inode: int
    reference: bytes


def binding(number: int) -> Binding:
    """Ask a device that someone else set up.

    GET_STATUS64 asks the file's filesystem and may never return, so the caller needs a deadline.
    Raises NoSuchDevice if the device is not bound.
    """
    try:
        with blockdev.opened(kernel.open_loop(number, os.O_RDONLY)) as loop_fd:
            fd = loop_fd.fileno()
            info = kernel.loop_get_status64(fd)
            return Binding(
                diskseq=kernel.blkgetdiskseq(fd),
                backing_device=info.lo_device,
                backing_inode=info.lo_inode,
                reference=info.lo_file_name,
            )
    except OSError as exc:
        raise NoSuchDevice(f"loop{number} has no file attached") from exc


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a passed fd can mean."""

    number: int | None
    """The loop device it is open on, or on a partition of which."""
    partition: bool
    file: FileIdentity


def named_by(fd: OwnedFd) -> Named:
    """Find out what a passed fd is open on, in any mode; closes it, since it may be an opener."""
    with fd:
        file = identify(fd.fileno())
    number = kernel.loop_of_block_device(*file.block_device) if file.block_device else None
    partition = number is not None and file.block_device != _numbers(number)
    return Named(number=number, partition=partition, file=file)


def _numbers(number: int) -> tuple[int, int]:
    major, _, minor = kernel.loop_attribute(number, "dev").partition(b":")
    return int(major), int(minor)


def open_existing(number: int, diskseq: int) -> LoopDevice:
    """Open a device that someone else attached, for one operation; closing it changes nothing.

    Raises NoSuchDevice if another one has the number now.
    """
    writable = True
    try:
        try:
            fd = kernel.open_loop(number, os.O_RDWR)
        except OSError as exc:
            if exc.errno not in (errno.EROFS, errno.EACCES):
                raise
            writable = False
            fd = kernel.open_loop(number, os.O_RDONLY)
        with blockdev.opened(fd) as loop_fd:
            if kernel.blkgetdiskseq(loop_fd.fileno()) != diskseq:
                raise NoSuchDevice(f"loop{number} is another device now")
            writable = writable and kernel.loop_attribute(number, "ro") == b"0"
            return LoopDevice(
                number=number,
                fd=loop_fd.move(),
                file=None,
                diskseq=diskseq,
                writable=writable,
            )
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise NoSuchDevice(f"loop{number} is gone") from exc
        raise


# --- resize -------------------------------------------------------------------------------------


def resize(device: LoopDevice, *, offset: int | None, size_limit: int | None, force: bool) -> int:
    """Change offset and limit, or with neither take up the file's size; returns the new size.

    All in bytes; a limit of 0 means to the end of the file. Numbers that are in effect already
    cause no call. Raises InvalidArgs for a range outside the file and DeviceBusy, unless `force`,
    if a device in use would shrink or move.
    """
    loop_fd = device.fd.fileno()
    info = kernel.loop_get_status64(loop_fd)
    old = info.lo_offset, info.lo_sizelimit
    new_offset = info.lo_offset if offset is None else offset
    new_limit = info.lo_sizelimit if size_limit is None else size_limit
    sector_size = kernel.blksszget(loop_fd)
    if new_offset % 512:
        raise InvalidArgs("offset: not a multiple of 512")
    if new_limit % sector_size:
        raise InvalidArgs(f"size-limit: not a multiple of the sector size, {sector_size}")
    old_size = kernel.blkgetsize64(loop_fd)
    new_size = new_limit or old_size
    if device.file is not None:
        file_size = kernel.statx(device.file.fileno(), 0).stx_size
        room = file_size - new_offset
        if room < sector_size:
            raise InvalidArgs(f"offset: not inside the file, which has {file_size} bytes")
        if size_limit and size_limit > room:
            raise InvalidArgs(f"size-limit: reaches past the end of the file of {file_size} bytes")
        new_size = min(new_limit or room, room) // 512 * 512
    moves = new_offset != info.lo_offset
    if (new_size < old_size or moves) and not force and blockdev.in_use(device.number):
        raise DeviceBusy(
            f"{device.node} is in use and would shrink or move: unmount it first, or pass force"
        )
    if (new_offset, new_limit) == old:
        # SET_STATUS64 with the old numbers would not look at the file: a grown one needs this.
        kernel.loop_set_capacity(loop_fd)
        return kernel.blkgetsize64(loop_fd)
    if device.ours:
        # The client may have turned it off by an fd of its own, and a lease relies on it.
        info.lo_flags |= kernel.LO_FLAGS_AUTOCLEAR
    info.lo_offset, info.lo_sizelimit = new_offset, new_limit
    kernel.loop_set_status64(loop_fd, info)
    size = kernel.blkgetsize64(loop_fd)
    if size == 0 or (size_limit and size != size_limit):
        # Only now a file that we do not hold has shown its size: the kernel clamps.
        info.lo_offset, info.lo_sizelimit = old
        kernel.loop_set_status64(loop_fd, info)
        raise InvalidArgs("size-limit: the range is not inside the file")
    return size


def sync(device: LoopDevice) -> None:
    """Write back what is dirty, and let the caller see the error (OSError)."""
    kernel.fsync(device.fd.fileno())


def open_node(device: LoopDevice, *, writable: bool) -> OwnedFd:
    """Open the device anew for a client, and make sure that it will still go by itself.

    Raises InvalidArgs when asked for more access than the backing file was attached with.
    """
    if writable and not device.writable:
        raise InvalidArgs(f"mode: {device.node} is read-only, so it cannot be opened for writing")
    with blockdev.opened(
        kernel.open_loop(device.number, os.O_RDWR if writable else os.O_RDONLY)
    ) as fd:
        if kernel.blkgetdiskseq(fd.fileno()) != kernel.blkgetdiskseq(device.fd.fileno()):
            raise NoSuchDevice(f"{device.node} is another device now")
        info = kernel.loop_get_status64(device.fd.fileno())
        if device.ours and not info.lo_flags & kernel.LO_FLAGS_AUTOCLEAR:
            info.lo_flags |= kernel.LO_FLAGS_AUTOCLEAR
            kernel.loop_set_status64(device.fd.fileno(), info)
        return fd.move()


# --- detach -------------------------------------------------------------------------------------


def detach(device: LoopDevice) -> None:
    """Let go of a device: write back, remove partitions, clear, close.

    The kernel finishes when the last opener is gone, which `kernel.loop_bound` tells. Nothing is
    raised: autoclear and the closing of our fd end the device even where a step fails.
    """
    with closing(device):
        loop_fd = device.fd.fileno()
        # Before any lock: it takes as long as the dirty data needs.
        with _tolerated("write back", device.node):
            kernel.fsync(loop_fd)
        # On our own fd, unlike at attach: the lock is to last through CLR_FD, and a second opener
        # would make that a lazy one. Anyone who may read the device may hold its lock for ever.
        if not blockdev.try_lock(loop_fd, fcntl.LOCK_EX, timeout=_DEVICE_LOCK_TIMEOUT):
            log.debug("%s stays locked by someone else; clearing it without the lock", device.node)
        with _tolerated("remove partitions", device.node):
            blockdev.remove_partitions(loop_fd, device.number)
        with _tolerated("clear", device.node):
            kernel.loop_clr_fd(loop_fd)


@contextmanager
def _tolerated(step: str, node: str) -> Iterator[None]:
    """Log an OSError of a step of detach, and go on."""
    try:
        yield
    except OSError as exc:
        log.debug("cannot %s %s: %s", step, node, exc)


def wait_until_unbound(number: int, timeout: float) -> bool:
    """Wait until the kernel has let go of the file, at most `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.0002
    while kernel.loop_bound(number):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.01)
    return True


def remove(number: int) -> bool:
    """Remove an unbound device, as long as nobody uses it again; false when it stays.

    Takes 5.73 s at worst. loop-control's lock is not taken: each call waits for an RCU grace
    period, some 46 ms in which nobody could allocate, and GET_FREE hides a device that is going.
    """
    with blockdev.opened(kernel.open_loop_control()) as control_fd:
        for pause in (*blockdev.removal_pauses(), None):
            try:
                kernel.loop_ctl_remove(control_fd.fileno(), number)
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    return True
                if exc.errno != errno.EBUSY or kernel.loop_bound(number):
                    break
            else:
                return True
            if pause is not None:
                time.sleep(pause)
    log.debug("loop%d stays, unbound or in use again", number)
    return False
