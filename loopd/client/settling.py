# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits until udev is done with one attachment of a loop device, and udisks2 has heard of that.

Both tell every user. The events of other devices are not waited for: on a busy machine they never
end.
"""

import asyncio
import time
from pathlib import Path

from loopd import errors
from loopd.loop import kernel

from .link import Link

_UDEV = Path("/run/udev")
_UDISKS = "org.freedesktop.UDisks2"
_UDISKS_PATH = "/org/freedesktop/UDisks2/block_devices/"
_NOT_FOR_UDISKS = b"E:DM_UDEV_DISABLE_OTHER_RULES_FLAG=1"
"""udisks2 has no object for such a device. A user's disk with partitions is one."""
_PAUSE = 0.005
"""Seconds between looks at udev's database, which is in memory."""
_IDLE = 3.0
"""Seconds without any event in udev's queue, after which none of the device's will come there."""
_UDISKS_TIMEOUT = 5.0
"""Seconds for udisks2, which some disk can keep busy, and which few of those who attach need."""


async def settled(link: Link, number: int, diskseq: int, timeout: float) -> bool:
    """Wait until both are done with /dev/loopN; false if udev is not within so many seconds.

    True at once where no udev runs, and when the device is gone.
    """
    begun = busy = time.monotonic()
    while not _is_done(entries := _entries(number, diskseq), diskseq):
        now = time.monotonic()
        if now - begun > timeout:
            return False
        if (_UDEV / "queue").exists():
            busy = now
        elif now - busy > _IDLE:
            return True  # it was killed, or has started since the event
        await asyncio.sleep(_PAUSE)
    named = [
        name
        for name, entry in entries.items()
        if _by_diskseq(name, diskseq) in entry and _NOT_FOR_UDISKS not in entry
    ]
    if named and await link.has_owner(_UDISKS):
        try:
            async with asyncio.timeout(_UDISKS_TIMEOUT):
                for name in named:
                    await _known_to_udisks(link, name, _by_diskseq(name, diskseq))
        except TimeoutError:
            pass
    return True


def _entries(number: int, diskseq: int) -> dict[str, list[bytes]]:
    """udev's entries for the disk and its partitions, by their names; none where none will come."""
    if not (_UDEV / "control").exists():
        return {}  # no udev runs, or not for this /run
    disk = f"loop{number}"
    try:
        if int(kernel.loop_attribute(number, "diskseq")) != diskseq:
            return {}  # it is gone, or its owner has put another file behind it
        names = {disk: "dev"}
        for each in kernel.loop_partitions(number):
            names[f"{disk}p{each.number}"] = f"{disk}p{each.number}/dev"
        return {name: _entry(kernel.loop_attribute(number, dev)) for name, dev in names.items()}
    except FileNotFoundError:
        return {}  # removed meanwhile


def _entry(device: bytes) -> list[bytes]:
    """The lines of udev's entry for a device of a number such as 7:3."""
    try:
        return (_UDEV / "data" / f"b{device.decode()}").read_bytes().splitlines()
    except FileNotFoundError:
        return []


def _is_done(entries: dict[str, list[bytes]], diskseq: int) -> bool:
    """Whether udev has looked at the device and all its partitions.

    udev writes an entry when it has made the links that stand in it. loopd keeps the device locked
    against udev until it is complete, so the first entry of a diskseq is about all of it.
    """
    # By loopd's rule, which also older versions of udev, and partitions, have it from.
    recorded = b"E:LOOPD_DISKSEQ=%d" % diskseq
    if any(recorded in entry for entry in entries.values()):
        return all(recorded in entry for entry in entries.values())
    # Without the rule, the entry of a partition may not say of which disk it is.
    return all(
        entry if "p" in name.removeprefix("loop") else _by_diskseq(name, diskseq) in entry
        for name, entry in entries.items()
    )


def _by_diskseq(name: str, diskseq: int) -> bytes:
    """The line for the link that names this attachment and no other."""
    _, part, number = name.removeprefix("loop").partition("p")
    return f"S:disk/by-diskseq/{diskseq}{'-part' + number if part else ''}".encode()


async def _known_to_udisks(link: Link, name: str, line: bytes) -> None:
    """Wait until udisks2's object for a device has the link that this line is for."""
    wanted = b"/dev/" + line.removeprefix(b"S:") + b"\0"
    while True:
        try:
            symlinks = await link.property_of(
                _UDISKS, _UDISKS_PATH + name, f"{_UDISKS}.Block", "Symlinks"
            )
        except errors.LoopError:
            symlinks = None  # it has no such object yet
        if isinstance(symlinks, list) and wanted in symlinks:
            return
        await asyncio.sleep(_PAUSE)
