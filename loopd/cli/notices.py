# SPDX-License-Identifier: LGPL-2.1-or-later
"""What loopctl says of a device that it has attached: what it lacks, and what may be wrong with it.

None of it is an error. loopctl looks at the beginning of its own file; loopd does not.
"""

import argparse
import asyncio
import os
import stat
import threading
from contextlib import suppress

from loopd.client.image import direct_io_alignment, sector_size
from loopd.client.properties import NO_NUMBER, Properties, is_node
from loopd.errors import LoopError
from loopd.fd import OwnedFd
from loopd.loop.block_device import beginning, sector_size_of

from . import output
from .formats import recognized
from .stream import say

_READING = 1.0
"""Seconds that the beginning of a file may take: what it tells is not worth a longer wait."""


async def tell(found: argparse.Namespace, file: OwnedFd, device: Properties) -> None:
    """Tell what there is to tell of a device that has just been attached."""
    if not _has_node(device):
        say(
            f"{device.node} is not there in this /dev, as in a sandbox: 'loopctl open' has a "
            "command use the device without a node"
        )
    if found.direct_io == "on" and not device.direct_io and device.number != NO_NUMBER:
        say(without_direct_io(device, None if found.in_memory else file, in_memory=found.in_memory))
    if device.missing_partitions:
        say(output.missing_partitions(device))
    status = os.fstat(file.fileno())
    if device.partitions or not (found.partscan or stat.S_ISREG(status.st_mode)):
        return
    begins = await _beginning(file, device.offset)
    if (format_ := recognized(begins)) is not None:
        say(
            f"{output.name(found.file)} seems to be {format_.name}, and no image of a disk as it "
            f"is: make one of it with '{format_.remedy}'"
        )
    elif found.partscan and not device.missing_partitions:
        _tell_why_no_partitions(device, begins, is_block=stat.S_ISBLK(status.st_mode))


def without_direct_io(device: Properties, file: OwnedFd | None, *, in_memory: bool = False) -> str:
    """What to say of a device without direct I/O, where that was asked for.

    `file` is the backing file, if it is at hand.
    """
    return f"{device.node} does without direct I/O: {_why_buffered(device, file, in_memory)}"


def _why_buffered(device: Properties, file: OwnedFd | None, in_memory: bool) -> str:
    """What the loop driver asks of a file, a device and its offset."""
    if in_memory:
        return "a copy in memory has no use for it"
    if file is None:
        disk = _disk_below(device)
        alignment: int | None = sector_size(os.major(disk), os.minor(disk))
    else:
        alignment = direct_io_alignment(file.fileno())
    if alignment and device.offset % alignment:
        return f"its offset, {device.offset}, is no multiple of {alignment}, as the file asks for"
    if alignment and device.sector_size < alignment:
        return (
            f"its sectors have {device.sector_size} bytes, and the file asks for {alignment}, as "
            f"-b {alignment} makes them"
        )
    return "the filesystem of its file does not allow it"


def _disk_below(device: Properties) -> int:
    """The number of the block device that the file is on, or that it is."""
    identity = device.backing_device, device.backing_inode
    if is_node(node := os.fsdecode(device.backing_file)):
        with suppress(OSError):
            status = os.stat(node)
            if stat.S_ISBLK(status.st_mode) and (status.st_dev, status.st_ino) == identity:
                return status.st_rdev
    return device.backing_device


def _tell_why_no_partitions(device: Properties, begins: bytes, *, is_block: bool) -> None:
    try:
        size = sector_size_of(begins)
    except LoopError as exc:
        say(f"{device.node} has no partitions: {exc}")
        return
    if size is not None and size != device.sector_size:
        say(
            f"{device.node} has no partitions: the table in the file is for sectors of {size} "
            "bytes; -b 0 takes them"
        )
    elif size is not None:
        say(
            f"{device.node} has no partitions: the table in the file cannot be read; the file may "
            "have been cut off"
        )
    elif is_block and device.number != NO_NUMBER:
        say(
            f"{device.node} has no partitions, as there is no table: a block device can be used "
            "without a loop device then"
        )


def _has_node(device: Properties) -> bool:
    """Whether the node is there, for this process."""
    try:
        status = os.stat(device.node)
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == device.device_number


async def _beginning(file: OwnedFd, start: int) -> bytes:
    """The first bytes of an image; none if they are not to be had soon.

    In a thread that the end of the program does not wait for: the file's filesystem may hang.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[bytes] = loop.create_future()

    def read(copy: OwnedFd) -> None:
        data = b""
        with copy, suppress(OSError):
            data = beginning(copy.fileno(), start)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(result.set_result, data)

    copy = OwnedFd(os.dup(file.fileno()))
    threading.Thread(target=read, args=[copy], name="beginning", daemon=True).start()
    await asyncio.wait([result], timeout=_READING)
    return result.result() if result.done() else b""
