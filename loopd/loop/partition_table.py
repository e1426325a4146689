# SPDX-License-Identifier: LGPL-2.1-or-later
"""The partition table of a loop device, read by a child that can do nothing else, and checked.

libblkid does the reading (`loop.partition_table_child`), as for partx. Its answer is as trustworthy
as the image.
"""

import os
import select
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from contextlib import ExitStack, suppress
from pathlib import Path

from loopd.errors import Failed, TimedOut
from loopd.fd import OwnedFd

from . import block_device, kernel
from .kernel import PartitionExtent
from .uapi import BLKGETSIZE64, BLKSSZGET, DISK_MAX_PARTS

_READER = Path(__file__).with_name("partition_table_child.py")
# A child's start and some reads from a file take 12 to 30 ms; a file that hangs takes for ever.
_TIMEOUT = 10.0
_GRACE = 1.0
_MAX_ANSWER = 64 * 1024
# An extended partition only holds others: as by partx and the kernel, its boot sector is shown, as
# far as the first of them leaves room.
_EXTENDED_SIZE = 1024


Table = dict[int, PartitionExtent | None]
"""The partitions of a table by number; None for one that the device cannot have."""


def read(number: int) -> Table:
    """The partitions that the table on a loop device tells of, none without a table.

    The child has the device open while it reads. Raises TimedOut, Failed, OSError.
    """
    with block_device.open_loop(number, os.O_RDONLY) as device_fd:
        answer = _ask(device_fd.fileno())
        size = kernel.blkgetsize64(device_fd.fileno())
        sector_size = kernel.blksszget(device_fd.fileno())
    return check(answer, size=size, sector_size=sector_size)


def check(answer: bytes, *, size: int, sector_size: int) -> Table:
    """The partitions in a child's answer, as a device of `size` bytes can have them.

    One that reaches past the end is cut there, as by the kernel's own parser. One that begins past
    the end, or not at a whole sector, cannot be had. Raises Failed if the answer is none.
    """
    try:
        told = [tuple(map(int, line.split())) for line in answer.decode("ascii").splitlines()]
        starts = sorted(start for _, start, _, _ in told)
        found: Table = {}
        for number, start, length, extended in told:
            if extended:
                behind = bisect_right(starts, start)
                room = starts[behind] - start if behind < len(starts) else length
                length = min(length, room, max(_EXTENDED_SIZE, sector_size) // 512)
            if 0 < number < DISK_MAX_PARTS and length > 0:
                extent = PartitionExtent(number, start * 512, length * 512)
                found[number] = found.get(number) or _cut(extent, size, sector_size)
    except ValueError as exc:
        raise Failed("the child that reads partition tables makes no sense") from exc
    return dict(sorted(found.items()))


def _cut(extent: PartitionExtent, size: int, sector_size: int) -> PartitionExtent | None:
    length = min(extent.size, size // sector_size * sector_size - extent.start)
    if extent.start < 0 or length <= 0 or extent.start % sector_size or length % sector_size:
        return None
    return extent._replace(size=length)


def _ask(device_fd: int) -> bytes:
    with ExitStack() as running:
        answers, answering = map(OwnedFd, os.pipe())
        running.enter_context(answers)
        with answering:
            # -I -S: its modules are Python's own, whatever the environment or a directory says.
            child = subprocess.Popen(
                [
                    *(sys.executable or "/usr/bin/python3", "-I", "-S", _READER),
                    *map(str, (BLKGETSIZE64, BLKSSZGET)),
                ],
                stdin=device_fd,
                stdout=answering.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        running.callback(_end, child)
        answer = _all_of(answers.fileno())
        try:
            # It has closed all it had: this is about its exit status.
            status = child.wait(_GRACE)
        except subprocess.TimeoutExpired as exc:
            raise TimedOut("the child that reads partition tables does not end") from exc
    if status != 0:
        raise Failed("the partition table cannot be read")
    return answer


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that runs; a file that hangs may keep it for longer than we wait."""
    if child.poll() is None:
        # Its group: where nothing keeps it from that, it may have made others.
        os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)


def _all_of(answers_fd: int) -> bytes:
    """What comes through a pipe up to its end, within bounds of time and size."""
    deadline = time.monotonic() + _TIMEOUT
    poll = select.poll()
    poll.register(answers_fd, select.POLLIN)
    answer = b""
    while len(answer) <= _MAX_ANSWER:
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise TimedOut(f"the partition table was not read within {_TIMEOUT:g} s")
        piece = os.read(answers_fd, _MAX_ANSWER)
        if not piece:
            return answer
        answer += piece
    raise Failed("the child that reads partition tables says too much")
