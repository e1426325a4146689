# SPDX-License-Identifier: LGPL-2.1-or-later
"""Partition devices of a loop device: made from the table, kept in step with it, removed, resized.

All of it by BLKPG, because a kernel need not have a parser for the table. Partitions that are made
without PARTSCAN outlive the binding, and the next image on the number would be read through them.
"""

import errno
import logging
import time
from collections.abc import Callable

from loopd.errors import DeviceBusy, InvalidArgs, NoSuchDevice, TimedOut

from . import block_device, kernel, partition_table
from .kernel import PartitionExtent

log = logging.getLogger(__name__)

# The nodes are there at once on devtmpfs; what else may be in charge of /dev gets this long.
_NODE_TIMEOUT = 5.0
# How long others may have a partition open for a glance.
_IN_USE_TIMEOUT = 1.0
_INTERVAL = 0.001


def node(number: int, partition: int) -> str:
    """The device node of a partition."""
    return f"/dev/loop{number}p{partition}"


def remove_all(loop_fd: int, number: int) -> int:
    """Remove all partition devices that are not in use, and return how many there were.

    After systemd's block_device_remove_all_partitions.
    """
    found = kernel.loop_partitions(number)
    for each in found:
        _remove(loop_fd, each.number)
    return len(found)


def _remove(loop_fd: int, partition: int) -> bool:
    """Remove a partition device; false if somebody has it open."""
    try:
        kernel.blkpg_del_partition(loop_fd, partition)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        if exc.errno != errno.ENXIO:  # the kernel has dropped it meanwhile
            raise
    return True


def scan(loop_fd: int, number: int) -> tuple[int, ...]:
    """Bring the partition devices in step with the table on the device.

    Returns the numbers that the table has, once the nodes exist; what the kernel does not take, as
    it overlaps another one, has none. PARTSCAN has to be set on the device before. Partitions that
    are as the table says are not touched, and those that are larger there grow in place.

    Raises DeviceBusy if one in use would have to move or shrink, and leaves all as they were;
    TimedOut, OSError.
    """
    told = partition_table.read(number)
    wanted = [each for each in told.values() if each]
    there = kernel.loop_partitions(number)
    growing = [each for each in there if _grows(each, told.get(each.number))]
    kept = {each.number for each in growing}
    withdraw(
        loop_fd, number, [each for each in there if each not in wanted and each.number not in kept]
    )
    for each in wanted:
        if each.number in kept:
            _change(kernel.blkpg_resize_partition, loop_fd, each)
        elif each not in there:
            _change(kernel.blkpg_add_partition, loop_fd, each)
    _wait_for_nodes(number, kernel.loop_partitions(number))
    return tuple(told)


def _grows(now: PartitionExtent, then: PartitionExtent | None) -> bool:
    return then is not None and then.start == now.start and then.size > now.size


def fit(loop_fd: int, number: int) -> None:
    """Cut the partition devices to a device that has become smaller, or remove them.

    What begins past the end and is in use stays.
    """
    sector_size = kernel.blksszget(loop_fd)
    end = kernel.blkgetsize64(loop_fd) // sector_size * sector_size
    for each in kernel.loop_partitions(number):
        if each.start >= end:
            _remove(loop_fd, each.number)
        elif each.start + each.size > end:
            _change(kernel.blkpg_resize_partition, loop_fd, each._replace(size=end - each.start))


def withdraw(loop_fd: int, number: int, partitions: list[PartitionExtent]) -> None:
    """Remove these partition devices, all or none. Raises DeviceBusy if one is in use."""
    deadline = time.monotonic() + _IN_USE_TIMEOUT
    removed: list[PartitionExtent] = []
    for each in partitions:
        # udev opens a partition for a moment to see what is in it.
        while not _remove(loop_fd, each.number):
            if time.monotonic() >= deadline:
                restore(loop_fd, removed)
                raise DeviceBusy(
                    f"{node(number, each.number)} is in use and would have to go, move or shrink: "
                    "unmount it first"
                )
            time.sleep(_INTERVAL)
        removed.append(each)


def restore(loop_fd: int, partitions: list[PartitionExtent]) -> None:
    """Make partition devices again that `withdraw` has removed."""
    for each in partitions:
        _change(kernel.blkpg_add_partition, loop_fd, each)


def _change(call: Callable[[int, int, int, int], None], loop_fd: int, to: PartitionExtent) -> None:
    try:
        call(loop_fd, to.number, to.start, to.size)
    except OSError as exc:
        # A table may say anything, and the kernel takes nothing that overlaps a partition.
        if exc.errno not in (errno.EBUSY, errno.EINVAL):
            raise
        log.debug("the kernel does not take partition %d: %s", to.number, exc.strerror)


def _wait_for_nodes(number: int, partitions: list[PartitionExtent]) -> None:
    deadline = time.monotonic() + _NODE_TIMEOUT
    for each in partitions:
        while not kernel.partition_node_exists(number, each.number):
            if time.monotonic() >= deadline:
                raise TimedOut(f"{node(number, each.number)} did not appear")
            time.sleep(_INTERVAL)


def resize(loop_fd: int, number: int, partition: int, size: int | None) -> int:
    """Change the size of a partition device, not of the partition in the table; returns the size.

    `size` is in bytes; 0 means up to the next partition or the end of the device, None as it is.
    A size that is in effect already causes no call. After systemd's resize_partition.

    Raises InvalidArgs, NoSuchDevice, DeviceBusy if a partition in use would shrink, OSError.
    """
    partitions = kernel.loop_partitions(number)
    now = next((each for each in partitions if each.number == partition), None)
    if now is None:
        raise NoSuchDevice(f"{node(number, partition)} is gone")
    if size is None:
        return now.size
    limit = min(
        (each.start for each in partitions if each.start > now.start),
        default=kernel.blkgetsize64(loop_fd),
    )
    sector_size = kernel.blksszget(loop_fd)
    room = (limit - now.start) // sector_size * sector_size
    wanted = size or room
    if wanted % sector_size:
        raise InvalidArgs(f"size-limit: not a multiple of the sector size, {sector_size}")
    if wanted > room:
        raise InvalidArgs(
            f"size-limit: the partition has room for {room} bytes up to the next one or the end"
        )
    if wanted < now.size and block_device.in_use(number, partition):
        raise DeviceBusy(f"{node(number, partition)} is in use and would shrink: unmount it first")
    if wanted != now.size:
        kernel.blkpg_resize_partition(loop_fd, partition, now.start, wanted)
    return wanted
