# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on a loop device that is bound: resize, sync, open for a client.

Synchronous, for threads. They work on a device of ours and on one that somebody else attached,
which `open_existing` opens for the while.
"""

import errno
import os

from . import blockdev, kernel
from .errors import DeviceBusy, InvalidArgs, NoSuchDevice
from .fd import OwnedFd
from .loopdev import LoopDevice


def open_existing(number: int, binding: int) -> LoopDevice:
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
            if kernel.loop_binding(number) != binding:
                raise NoSuchDevice(f"loop{number} is another device now")
            writable = writable and kernel.loop_attribute(number, "ro") == b"0"
            diskseq = kernel.blkgetdiskseq(loop_fd.fileno())
            return LoopDevice(
                number=number,
                fd=loop_fd.move(),
                file=None,
                diskseq=diskseq,
                binding=binding,
                writable=writable,
            )
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise NoSuchDevice(f"loop{number} is gone") from exc
        raise


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
        # By sysfs first: asking the device asks its file's filesystem.
        if device.ours and kernel.loop_attribute(device.number, "loop/autoclear") != b"1":
            info = kernel.loop_get_status64(device.fd.fileno())
            info.lo_flags |= kernel.LO_FLAGS_AUTOCLEAR
            kernel.loop_set_status64(device.fd.fileno(), info)
        return fd.move()
