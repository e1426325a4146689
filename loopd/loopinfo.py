# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a loop device: its status, its binding, and which one a passed fd names.

Reading only, and sysfs first: what asks the device itself may never return, and says so.
"""

import errno
import os
from dataclasses import dataclass

from . import blockdev, kernel
from .backing import FileIdentity, identify
from .errors import NoSuchDevice
from .fd import OwnedFd


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
    sector_size: int
    read_only: bool
    direct_io: bool
    autoclear: bool
    partition_scan: bool


def status(number: int) -> Status:
    """How a bound device is set up, from sysfs alone: no ioctl, so no filesystem is asked.

    Raises NoSuchDevice if it is not bound, OSError if sysfs cannot be read now.
    """

    def number_in(attribute: str) -> int:
        return int(kernel.loop_attribute(number, attribute))

    before = kernel.loop_binding(number)
    if before is None:
        raise NoSuchDevice(f"loop{number} has no file attached")
    try:
        told = Status(
            binding=before,
            diskseq=number_in("diskseq"),
            device_number=os.makedev(*_numbers(number)),
            backing_file=_backing_file(number),
            offset=number_in("loop/offset"),
            size_limit=number_in("loop/sizelimit"),
            size=number_in("size") * 512,
            sector_size=number_in("queue/logical_block_size"),
            read_only=number_in("ro") != 0,
            direct_io=number_in("loop/dio") != 0,
            autoclear=number_in("loop/autoclear") != 0,
            partition_scan=number_in("loop/partscan") != 0,
        )
    except OSError:
        if kernel.loop_binding(number) == before:
            raise
        told = None
    if told is None or kernel.loop_binding(number) != before:
        # Gone meanwhile; half of what was read may be of the next one.
        return status(number)
    return told


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
    """Find out what a passed fd is open on, in any mode, and close it.

    A block device at once, because it may be an opener in the way; a file in the owner's way.
    """
    with fd:
        file = identify(fd.fileno())
        if file.block_device:
            os.close(fd.release())
    number = kernel.loop_of_block_device(*file.block_device) if file.block_device else None
    partition = number is not None and file.block_device != _numbers(number)
    return Named(number=number, partition=partition, file=file)


def _numbers(number: int) -> tuple[int, int]:
    major, _, minor = kernel.loop_attribute(number, "dev").partition(b":")
    return int(major), int(minor)
