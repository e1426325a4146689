# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a loop device: its status, its binding, and which one a passed fd names.

Reading only, and sysfs first: what asks the device itself may never return, and says so.
"""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from loopd.errors import NoSuchDevice
from loopd.fd import OwnedFd

from . import backing_file as loop_backing_file
from . import block_device, kernel
from .backing_file import FileIdentity
from .kernel import PartitionExtent
from .uapi import (
    LO_FLAGS_AUTOCLEAR,
    LO_FLAGS_DIRECT_IO,
    LO_FLAGS_PARTSCAN,
    LO_FLAGS_READ_ONLY,
)


def node(number: int) -> str:
    """The device node of a loop number."""
    return f"/dev/loop{number}"


@dataclass(frozen=True, kw_only=True)
class Status:
    """How a bound loop device is set up now; sizes and offsets in bytes."""

    binding: int
    """Which binding it is, see `kernel.loop_binding`."""
    diskseq: int
    device_number: int
    backing_file: bytes
    """The kernel's idea of the path, for showing only."""
    offset: int
    size_limit: int
    size: int
    read_only: bool
    direct_io: bool
    autoclear: bool
    partition_scan: bool
    partitions: tuple[PartitionExtent, ...]
    seqnum: int = field(default=0, compare=False)
    """The event of the kernel's up to which all that they told was seen; 0 if that is not known."""
    looked_at: float = field(default=0, compare=False)
    """When the look began, by CLOCK_MONOTONIC; 0 for the look at attach, which is the first."""

    @property
    def order(self) -> tuple[int, float]:
        """Says of two looks which one began later: what the kernel does not tell of counts, too."""
        return self.seqnum, self.looked_at


def diskseq(block_fd: int, binding: int) -> int:
    """The diskseq of an open device; before Linux 5.15 the binding stands in, as unique as it."""
    try:
        return kernel.blkgetdiskseq(block_fd)
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOTTY):  # a loop device says the former
            return binding
        raise


def status(number: int) -> Status:
    """How a bound device is set up, from sysfs alone: no ioctl, so no filesystem is asked.

    Nothing below queue/ is read, where a change that waits for a hanging file makes readers wait.
    Raises NoSuchDevice if it is not bound, OSError if sysfs cannot be read now.
    """

    def number_in(attribute: str) -> int:
        return int(kernel.loop_attribute(number, attribute))

    looked_at = time.monotonic()
    seqnum = kernel.uevent_seqnum()  # first: the kernel changes a device, and then tells of it
    before = kernel.loop_binding(number)
    if before is None:
        raise NoSuchDevice(f"loop{number} has no file attached")
    try:
        told = Status(
            binding=before,
            diskseq=_diskseq_in_sysfs(number, before),
            device_number=os.makedev(*_numbers(number)),
            backing_file=_backing_file(number),
            offset=number_in("loop/offset"),
            size_limit=number_in("loop/sizelimit"),
            size=number_in("size") * 512,
            read_only=number_in("ro") != 0,
            direct_io=number_in("loop/dio") != 0,
            autoclear=number_in("loop/autoclear") != 0,
            partition_scan=number_in("loop/partscan") != 0,
            partitions=tuple(kernel.loop_partitions(number)),
            seqnum=seqnum,
            looked_at=looked_at,
        )
    except OSError:
        if kernel.loop_binding(number) == before:
            raise
        told = None
    if told is None or kernel.loop_binding(number) != before:
        # Gone meanwhile; half of what was read may be of the next one.
        return status(number)
    return told


def is_as_it_was(number: int, known: Status) -> bool:
    """Whether a device is as it was in what the kernel changes without an event.

    That is all but its size, its partitions and its diskseq, and takes half the time of `status`.
    Raises OSError, also if the device is unbound.
    """

    def number_in(attribute: str) -> int:
        return int(kernel.loop_attribute(number, attribute))

    return (
        kernel.loop_binding(number) == known.binding
        and _backing_file(number) == known.backing_file
        and number_in("loop/offset") == known.offset
        and number_in("loop/sizelimit") == known.size_limit
        and number_in("ro") == known.read_only
        and number_in("loop/dio") == known.direct_io
        and number_in("loop/autoclear") == known.autoclear
        and number_in("loop/partscan") == known.partition_scan
    )


def status_by_fd(loop_fd: int, number: int, binding: int, diskseq: int) -> Status:
    """The same of a device that is open, and known to be bound so, in a third of the time.

    GET_STATUS64 asks the file's filesystem, so not for one that may hang. Raises NoSuchDevice if
    the device was unbound, OSError.
    """
    seqnum = kernel.uevent_seqnum()
    try:
        info = kernel.loop_get_status64(loop_fd)
        stat = kernel.statx(loop_fd)
        return Status(
            binding=binding,
            diskseq=diskseq,
            device_number=os.makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
            backing_file=_backing_file(number),
            offset=info.lo_offset,
            size_limit=info.lo_sizelimit,
            size=kernel.blkgetsize64(loop_fd),
            read_only=bool(info.lo_flags & LO_FLAGS_READ_ONLY),
            direct_io=bool(info.lo_flags & LO_FLAGS_DIRECT_IO),
            autoclear=bool(info.lo_flags & LO_FLAGS_AUTOCLEAR),
            partition_scan=bool(info.lo_flags & LO_FLAGS_PARTSCAN),
            partitions=tuple(kernel.loop_partitions(number)),
            seqnum=seqnum,
        )
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
            raise NoSuchDevice(f"loop{number} has no file attached any more") from exc
        raise


def is_read_only(number: int) -> bool:
    """Whether the kernel takes the device for read-only, partitions included.

    Each device that takes LOOP_CHANGE_FD is: the driver's own flag sets this one, and since Linux
    5.11 BLKROSET does not clear it. Raises NoSuchDevice, OSError.
    """
    try:
        return kernel.loop_attribute(number, "ro") != b"0"
    except FileNotFoundError as exc:
        raise NoSuchDevice(f"{node(number)} is gone") from exc


def block_status(number: int, *, read_only: bool) -> Status:
    """The same of a block device that needs no loop device; `number` is as os.makedev makes it.

    It is read-only if the device is, and if `read_only` says that it is open so.
    Raises NoSuchDevice if it is gone, OSError if sysfs cannot be read now.
    """
    looked_at = time.monotonic()
    read = partial(kernel.block_attribute, os.major(number), os.minor(number))
    try:
        name = kernel.block_name(os.major(number), os.minor(number))
        block = loop_backing_file.block(os.major(number), os.minor(number))
        disk = "" if block.number == block.disk else "../"  # what a partition has from its disk
        return Status(
            binding=0,
            diskseq=_diskseq_of_block(read, disk),
            device_number=number,
            backing_file=f"/dev/{name.replace('!', '/')}".encode(),
            offset=0,
            size_limit=0,
            size=int(read("size")) * 512,
            read_only=read_only or read("ro") != b"0",
            direct_io=False,
            autoclear=False,
            partition_scan=block_device.scans_partitions(read),
            partitions=tuple(kernel.block_partitions(os.major(number), os.minor(number))),
            looked_at=looked_at,
        )
    except FileNotFoundError as exc:
        raise NoSuchDevice("the block device is gone") from exc


def _diskseq_of_block(read: Callable[[str], bytes], disk: str) -> int:
    try:
        return int(read(f"{disk}diskseq"))
    except FileNotFoundError:
        return 0


def _diskseq_in_sysfs(number: int, binding: int) -> int:
    try:
        return int(kernel.loop_attribute(number, "diskseq"))
    except FileNotFoundError:
        return binding


def _backing_file(number: int) -> bytes:
    try:
        return kernel.loop_attribute(number, "loop/backing_file")
    except OSError as exc:
        # Whoever owns a directory above the file can make its path too long for sysfs.
        if exc.errno != errno.ENAMETOOLONG:
            raise
        return b""


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What only the device itself tells about its binding."""

    file: FileIdentity
    reference: bytes
    sector_size: int


def binding(number: int, which: int) -> Binding:
    """Ask a device that someone else set up; `which` binding is meant, as in `Status`.

    GET_STATUS64 asks the file's filesystem and may never return, so the caller needs a deadline.
    Raises NoSuchDevice if that binding is gone.
    """
    try:
        with block_device.open_loop(number, os.O_RDONLY) as loop_fd:
            info = kernel.loop_get_status64(loop_fd.fileno())
            sector_size = kernel.blksszget(loop_fd.fileno())
            still = kernel.loop_binding(number)
        # Kernels that say st_dev where a file has no st_rdev are not to be taken for block devices.
        is_block = info.lo_rdevice not in (0, info.lo_device)
        rdevice = os.major(info.lo_rdevice), os.minor(info.lo_rdevice)
        block = loop_backing_file.block(*rdevice) if is_block else None
    except OSError as exc:
        raise NoSuchDevice(f"loop{number} does not say what is attached") from exc
    if still != which:
        raise NoSuchDevice(f"loop{number} is another device now")
    return Binding(
        file=FileIdentity(
            device=info.lo_device,
            inode=info.lo_inode,
            block=block,
        ),
        reference=info.lo_file_name,
        sector_size=sector_size,
    )


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a passed fd can mean."""

    file: FileIdentity
    number: int | None = None
    """The loop device it is open on, or on a partition of which."""
    partition: int | None = None
    """The number of the partition, if it is one."""


def named_by(fd: OwnedFd) -> Named:
    """Find out what a passed fd is open on, in any mode, and close it.

    A block device at once, because it may be an opener in the way; a file in the owner's way.
    """
    with fd:
        file = loop_backing_file.identify(fd.fileno())
        if file.block:
            kernel.close(fd.release())
    if not file.block:
        return Named(file=file)
    major, minor = os.major(file.block.number), os.minor(file.block.number)
    number = kernel.loop_of_block_device(major, minor)
    if number is None or file.block.number == file.block.disk:
        return Named(file=file, number=number)
    partition = int(kernel.block_attribute(major, minor, "partition"))
    return Named(file=file, number=number, partition=partition)


def _numbers(number: int) -> tuple[int, int]:
    major, _, minor = kernel.loop_attribute(number, "dev").partition(b":")
    return int(major), int(minor)
