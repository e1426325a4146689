# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on a loop device that is bound: resize, set, lock, sync, scan, open for a client.

Synchronous, for threads. They work on a device of ours and on one that somebody else attached,
which `open_existing` opens for the while. What is as it should be already causes no call.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from loopd.errors import DeviceBusy, InvalidArgs, NoSuchDevice
from loopd.fd import OwnedFd

from . import backing_file, block_device, configure, kernel, query
from . import partitions as partitions
from .block_device import Lock
from .kernel import PartitionExtent
from .loop_device import NO_CUT, Cut, LoopDevice
from .request import DEFAULT_SECTOR_SIZE, MAX_SECTOR_SIZE
from .uapi import LO_FLAGS_AUTOCLEAR, LO_FLAGS_PARTSCAN, LO_NAME_SIZE, loop_info64

log = logging.getLogger(__name__)

# How long an attempt to lock waits for what lasts an instant: others' attempts, and looks.
_LOCK_TIMEOUT = 0.05


def open_existing(number: int, which: int | None = None) -> LoopDevice:
    """Open a device that someone else attached; closing it changes nothing.

    `which` binding is meant (`kernel.loop_binding`); None means the one there is.
    Raises NoSuchDevice if there is none, or another one.
    """
    with _none_is_no_such_device(number):
        # For reading, which is enough for whoever has CAP_SYS_ADMIN: the close of a writable fd
        # makes udev read the partition table again.
        with block_device.open_loop(number, os.O_RDONLY) as loop_fd:
            there = kernel.loop_binding(number)
            if there is None:
                raise NoSuchDevice(f"loop{number} has no file attached")
            if which not in (None, there):
                raise NoSuchDevice(f"loop{number} is another device now")
            writable = kernel.loop_attribute(number, "ro") == b"0"
            diskseq = query.diskseq(loop_fd.fileno(), there)
            return LoopDevice(
                number=number,
                fd=loop_fd.move(),
                file=None,
                diskseq=diskseq,
                binding=there,
                writable=writable,
                ours=False,
                autoclear=False,
            )


def take_back(
    number: int, which: int, fd: OwnedFd | None, *, autoclear: bool, is_new: bool
) -> LoopDevice:
    """A device that a former loopd attached, which is ours now.

    `which` binding is meant; `fd` is the former one's, and taken over; without it the device is
    opened. It is made to go at its last close, or not, as `autoclear` says. Where that has to be
    set the file's filesystem is asked, so the caller needs a deadline.
    Raises NoSuchDevice if the device is gone, OSError.
    """
    if fd is None:
        device = open_existing(number, which)
    else:
        with fd, _none_is_no_such_device(number):
            stat = kernel.statx(fd.fileno())
            if kernel.loop_of_block_device(stat.stx_rdev_major, stat.stx_rdev_minor) != number:
                raise NoSuchDevice(f"what was kept of loop{number} is another device")
            if kernel.loop_binding(number) != which:
                raise NoSuchDevice(f"loop{number} is another device now")
            writable = kernel.loop_attribute(number, "ro") == b"0"
            diskseq = query.diskseq(fd.fileno(), which)
            device = LoopDevice(
                number=number,
                fd=fd.move(),
                file=None,
                diskseq=diskseq,
                binding=which,
                writable=writable,
                ours=True,
                autoclear=autoclear,
            )
    device.ours, device.autoclear, device.is_new = True, autoclear, is_new
    # As far as known, a client has an fd from the former one.
    device.handed_out = True
    try:
        if kernel.loop_attribute(number, "loop/autoclear") != (b"1" if autoclear else b"0"):
            set_autoclear(device, autoclear)
    except OSError as exc:
        # It is cleared in the end, whatever it says until then.
        log.debug("cannot set autoclear of loop%d: %s", number, exc.strerror)
    return device


@contextmanager
def _none_is_no_such_device(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise NoSuchDevice(f"loop{number} is gone") from exc
        raise


def resize(device: LoopDevice, *, offset: int | None, size_limit: int | None, force: bool) -> int:
    """Change offset and limit, or with neither take up the file's size; returns the new size.

    All in bytes; a limit of 0 means to the end of the file. Partitions that reach past the new end
    are cut, or go; a device that moves has those of the table at its new place.
    Raises InvalidArgs for a range outside the file and DeviceBusy, unless `force`, if a device in
    use would shrink or move.
    """
    loop_fd = device.fd.fileno()
    info = kernel.loop_get_status64(loop_fd)
    old = info.lo_offset, info.lo_sizelimit
    new_offset = info.lo_offset if offset is None else offset
    new_limit = device.asked_limit(info.lo_sizelimit) if size_limit is None else size_limit
    sector_size = kernel.blksszget(loop_fd)
    if new_limit % sector_size:
        raise InvalidArgs(f"size-limit: not a multiple of the sector size, {sector_size}")
    old_size = kernel.blkgetsize64(loop_fd)
    new_size = new_limit or old_size
    if device.file is not None:
        file_size = backing_file.size(device.file.fileno())
        room = file_size - new_offset
        if room < sector_size:
            raise InvalidArgs(f"offset: not inside the file, which has {file_size} bytes")
        if size_limit and size_limit > room:
            raise InvalidArgs(f"size-limit: reaches past the end of the file of {file_size} bytes")
        new_size = min(new_limit or room, room) // sector_size * sector_size
    moves = new_offset != info.lo_offset
    if (new_size < old_size or moves) and not force and block_device.in_use(device.number):
        raise DeviceBusy(
            f"{device.node} is in use and would shrink or move: unmount it first, or pass force"
        )
    former = _withdrawn(device, force=force) if moves else []
    try:
        if (new_offset, new_limit) == old:
            # SET_STATUS64 with the old numbers would not look at the file: a grown one needs this.
            kernel.loop_set_capacity(loop_fd)
        else:
            _set_range(device, info, new_offset, new_limit, exactly=bool(size_limit))
        _keep_whole_sectors(device, new_limit)
    except BaseException:
        partitions.restore(loop_fd, former)
        raise
    if moves and _scans_partitions(device):
        with suppress(DeviceBusy):  # by force: one that is in use stays
            device.table = partitions.scan(loop_fd, device.number)
    partitions.fit(loop_fd, device.number)
    return kernel.blkgetsize64(loop_fd)


def _withdrawn(device: LoopDevice, *, force: bool) -> list[PartitionExtent]:
    """Remove the partition devices of a device that is about to move; which they were.

    Raises DeviceBusy, unless `force`, if one is in use.
    """
    loop_fd = device.fd.fileno()
    former = kernel.loop_partitions(device.number)
    if force:
        partitions.remove_all(loop_fd, device.number)
    else:
        partitions.withdraw(loop_fd, device.number, former)
    return former


def _set_range(
    device: LoopDevice, info: loop_info64, offset: int, limit: int, *, exactly: bool
) -> None:
    """Set offset and limit; with `exactly` the device has to come to have the limit's size."""
    old = info.lo_offset, info.lo_sizelimit
    info.lo_offset, info.lo_sizelimit = offset, limit
    _set_status(device, info)
    size = kernel.blkgetsize64(device.fd.fileno())
    if size < kernel.blksszget(device.fd.fileno()) or (exactly and size != limit):
        # Only now a file that we do not hold has shown its size: the kernel clamps.
        info.lo_offset, info.lo_sizelimit = old
        _set_status(device, info)
        raise InvalidArgs("size-limit: the range is not inside the file")


def _keep_whole_sectors(device: LoopDevice, limit: int) -> None:
    """Leave out a tail of less than a sector, which the kernel shows and cannot read.

    `limit` is the one that was asked for. A device of somebody else's is left as it is.
    """
    loop_fd = device.fd.fileno()
    sector_size = kernel.blksszget(loop_fd)
    if not device.ours or not (device.cut.limit or kernel.blkgetsize64(loop_fd) % sector_size):
        return
    info = kernel.loop_get_status64(loop_fd)
    if info.lo_sizelimit != limit:
        info.lo_sizelimit = limit
        _set_status(device, info)
    size = kernel.blkgetsize64(loop_fd)
    whole = size // sector_size * sector_size
    device.cut = NO_CUT
    if whole not in (0, size):
        info.lo_sizelimit = whole
        _set_status(device, info)
        device.cut = Cut(whole, limit)


def _set_status(device: LoopDevice, info: loop_info64) -> None:
    if device.autoclear:
        # The client may have turned it off by an fd of its own, and a lease relies on it.
        info.lo_flags |= LO_FLAGS_AUTOCLEAR
    try:
        configure.set_status(device.fd.fileno(), info)
    except OSError as exc:
        if exc.errno == errno.EBUSY:  # from Linux 6.19 on
            raise DeviceBusy(f"{device.node} is mounted or exclusively open") from exc
        raise


def set_reference(device: LoopDevice, reference: bytes) -> bool:
    """Set the free-form name, lo_file_name; whether that changed it.

    At most 63 bytes, else InvalidArgs. After systemd's loop_device_set_filename.
    """
    if len(reference) >= LO_NAME_SIZE:
        raise InvalidArgs(f"reference: longer than {LO_NAME_SIZE - 1} bytes")
    info = kernel.loop_get_status64(device.fd.fileno())
    if info.lo_file_name == reference:
        return False
    info.lo_file_name = reference
    _set_status(device, info)
    return True


def set_autoclear(device: LoopDevice, enable: bool) -> bool:
    """Have a device go at its last close, or not; whether that changed.

    After systemd's loop_device_set_autoclear.
    """
    device.autoclear = device.ours and enable
    info = kernel.loop_get_status64(device.fd.fileno())
    if bool(info.lo_flags & LO_FLAGS_AUTOCLEAR) == enable:
        return False
    info.lo_flags ^= LO_FLAGS_AUTOCLEAR
    _set_status(device, info)
    return True


def set_direct_io(device: LoopDevice, enable: bool) -> bool:
    """Turn direct I/O to the backing file on or off; returns which of them is in effect now."""
    if _direct_io(device) == enable:
        return enable
    try:
        kernel.loop_set_direct_io(device.fd.fileno(), enable)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # the file's filesystem cannot, or not at this offset
            raise
    return _direct_io(device)


def _direct_io(device: LoopDevice) -> bool:
    return kernel.loop_attribute(device.number, "loop/dio") == b"1"


def sector_size(device: LoopDevice) -> int:
    """The logical sector size in bytes. Waits for nobody, unlike the same in sysfs."""
    return kernel.blksszget(device.fd.fileno())


def set_sector_size(device: LoopDevice, size: int | None) -> int:
    """Change the logical sector size, in bytes; returns it.

    None means as the partition table says, 512 without one. Partitions that are scanned for are
    brought in step with the table, which is another one for another sector size.
    Raises InvalidArgs for a size that does not fit, and DeviceBusy if the device is in use.
    """
    loop_fd = device.fd.fileno()
    if size is None:
        size = block_device.probe_sector_size(loop_fd) or DEFAULT_SECTOR_SIZE
    if kernel.blksszget(loop_fd) == size:
        return size
    limit = device.asked_limit(int(kernel.loop_attribute(device.number, "loop/sizelimit")))
    if limit % size:
        raise InvalidArgs(f"sector-size: the size limit, {limit}, is not a multiple of it")
    if kernel.blkgetsize64(loop_fd) < size:
        raise InvalidArgs("sector-size: larger than the device")
    if size > MAX_SECTOR_SIZE:
        raise InvalidArgs(f"sector-size: larger than a page, which has {MAX_SECTOR_SIZE} bytes")
    busy = DeviceBusy(f"{device.node} is mounted or exclusively open: unmount it first")
    if block_device.in_use(device.number):
        raise busy
    scans = _scans_partitions(device)
    # Those of the old sector size say nothing for the new one: first see that they can go.
    former = kernel.loop_partitions(device.number) if scans else []
    partitions.withdraw(loop_fd, device.number, former)
    try:
        block_device.patiently(partial(kernel.loop_set_block_size, loop_fd, size))
    except OSError as exc:
        partitions.restore(loop_fd, former)
        if exc.errno == errno.EINVAL:
            raise InvalidArgs(f"sector-size: this kernel does not take {size}") from exc
        if exc.errno == errno.EBUSY:
            raise busy from exc
        raise
    _keep_whole_sectors(device, limit)
    if scans:
        device.table = partitions.scan(loop_fd, device.number)
    return size


def _scans_partitions(device: LoopDevice) -> bool:
    return block_device.scans_partitions(partial(kernel.loop_attribute, device.number))


class LockLost(DeviceBusy):
    """A lock could not be changed, and somebody else has taken the one there was."""


def take_lock(device: LoopDevice, kind: Lock) -> OwnedFd:
    """Take the BSD lock, on a second fd, which is returned.

    Waits for no more than a glance of somebody else's. Raises DeviceBusy if others hold a lock
    that is in the way. After systemd's loop_device_flock, as is `change_lock`.
    """
    with block_device.open_loop(device.number, os.O_RDONLY) as lock_fd:
        _require_binding(device)
        if not block_device.try_lock(lock_fd.fileno(), kind.operation, timeout=_LOCK_TIMEOUT):
            raise DeviceBusy(f"{device.node} is locked by someone else")
        return lock_fd.move()


def change_lock(device: LoopDevice, lock_fd: OwnedFd, kind: Lock, *, held: Lock) -> None:
    """Change the lock that is `held` by an fd of `take_lock`.

    Raises DeviceBusy if others hold one that is in the way, and LockLost if the old one is gone.
    """
    fd = lock_fd.fileno()
    if block_device.try_lock(fd, kind.operation, timeout=_LOCK_TIMEOUT):
        return
    # flock(2) has let go of the old one before it tried for the new.
    if not block_device.try_lock(fd, held.operation):
        raise LockLost(f"{device.node} is locked by someone else, who took our lock's place")
    raise DeviceBusy(f"{device.node} is locked by someone else")


def _require_binding(device: LoopDevice) -> None:
    if kernel.loop_binding(device.number) != device.binding:
        raise NoSuchDevice(f"{device.node} is another device now")


def sync(device: LoopDevice) -> None:
    """Write back what is dirty, and let the caller see the error (OSError)."""
    kernel.fsync(device.fd.fileno())


def rescan_partitions(device: LoopDevice) -> list[PartitionExtent]:
    """Bring the partition devices in step with the table, and return them.

    Raises DeviceBusy if one in use would have to change, TimedOut.
    """
    loop_fd = device.fd.fileno()
    if not _scans_partitions(device):
        # Before any is made: without it partitions outlive their device. A kernel that has a parser
        # of its own uses it now, which could be kept from it only by shrinking the device.
        info = kernel.loop_get_status64(loop_fd)
        info.lo_flags |= LO_FLAGS_PARTSCAN
        _set_status(device, info)
    # As the kernel does before it reads a table: somebody may have written it to the file.
    kernel.blkflsbuf(loop_fd)
    device.table = partitions.scan(loop_fd, device.number)
    return kernel.loop_partitions(device.number)


def resize_partition(device: LoopDevice, partition: int, *, size: int | None) -> int:
    """Change the size of a partition device; see `loop.partitions.resize`."""
    return partitions.resize(device.fd.fileno(), device.number, partition, size)


def open_node(
    device: LoopDevice,
    *,
    writable: bool,
    partition: int | None = None,
    read_only_too: bool = True,
) -> OwnedFd:
    """Open the device or a partition of it for a client, and make sure that it will still go.

    Without `read_only_too` a device that the kernel takes for read-only is not opened. Raises
    InvalidArgs when asked for more access than the backing file was attached with, NoSuchDevice if
    there is no such partition, DeviceBusy for a read-only device that is not to be opened.
    """
    if writable and not device.writable:
        raise InvalidArgs(f"mode: {device.node} is read-only, so it cannot be opened for writing")
    with _opened_node(device, os.O_RDWR if writable else os.O_RDONLY, partition) as fd:
        _require_binding(device)
        if not read_only_too and query.is_read_only(device.number):
            raise DeviceBusy(f"{device.node} became read-only while it was opened: try again")
        # By sysfs first: asking the device asks its file's filesystem.
        if device.autoclear and kernel.loop_attribute(device.number, "loop/autoclear") != b"1":
            _set_status(device, kernel.loop_get_status64(device.fd.fileno()))
        return fd.move()


def _opened_node(device: LoopDevice, flags: int, partition: int | None) -> OwnedFd:
    if partition is None:
        return block_device.open_loop(device.number, flags)
    try:
        return block_device.opened(kernel.open_partition(device.number, partition, flags))
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise NoSuchDevice(f"{device.node} has no partition {partition}") from exc
        raise
