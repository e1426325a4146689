# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which devices a filesystem stands on in the end, as sysfs tells, and which of them can hang.

Only sysfs is read, which asks no device and never waits. What lies below a loop device is not
looked for here, because sysfs has no more of it than a path.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SYSFS = Path("/sys")
PROC = Path("/proc")
UNKNOWN = ""

# What the kernel calls the devices that a network or a process stands behind, wherever it has them.
_REMOTE = frozenset("drbd nbd rbd ublkb".split())
# Devices without a bus that are the kernel's own. Those with slaves are judged by them.
_OWN = frozenset("bcache dm- md nullb pmem ram zd zram".split())
# Parts of a device's path that tell of a transport, and what it is called here. Fibre Channel
# counts as local: its disks are the machine's as much as those in the case.
_TRANSPORTS = {
    "session": "iscsi",
    "vhci_hcd": "usbip",
    "tcm_loop": "tcm_loop",  # a target of this machine, over a file or a process
}
_NVME_TRANSPORTS = frozenset("apple-nvme fc pcie".split())
_STEM = re.compile(r"[a-zA-Z]+-?")


def foundations(device: int, sysfs: Path = SYSFS) -> frozenset[int | str]:
    """What is below a block device, its number as os.makedev makes it, besides local disks.

    A number is that of a loop device; a text names what can hang, such as nbd, and is UNKNOWN where
    sysfs does not have the device. Raises OSError if sysfs cannot be read now.
    """
    return frozenset(_below(sysfs / f"dev/block/{os.major(device)}:{os.minor(device)}"))


def foundations_of_btrfs(source: str, sysfs: Path = SYSFS) -> frozenset[int | str]:
    """The same for the btrfs that has `source`, as mountinfo names it, among its devices.

    The device number of a btrfs is none of its devices'. Where the source is in no way that can be
    followed without a look outside of sysfs, this is about all that are mounted.
    """
    name = _kernel_name(source, sysfs)
    mounted = [[*each.iterdir()] for each in sysfs.glob("fs/btrfs/*/devices")]
    meant = [each for each in mounted if name in (device.name for device in each)] or mounted
    return _below_all(device for each in meant for device in each)


def foundations_of_btrfs_with(fsid: str, sysfs: Path = SYSFS) -> frozenset[int | str]:
    """The same for the btrfs with a UUID, as it is written in sysfs."""
    return _below_all((sysfs / "fs/btrfs" / fsid / "devices").glob("*"))


_NONE = frozenset({UNKNOWN})


def foundations_of_journal(
    device: int, sysfs: Path = SYSFS, proc: Path = PROC
) -> frozenset[int | str]:
    """The same for the journal of the ext3 or ext4 on a block device, if it is on another device.

    Which one that is stands in the image, so its user can choose it. The kernel tells it by the
    name of the thread that writes the journal.
    """
    link = sysfs / f"dev/block/{os.major(device)}:{os.minor(device)}"
    name = os.path.basename(os.path.realpath(link))
    try:
        task = (sysfs / f"fs/ext4/{name}/journal_task").read_text().strip()
    except FileNotFoundError:
        return frozenset()  # another driver's ext2
    # With an inode for the journal both of them have the name of that.
    if not task.isdecimal() or any((proc / "fs/jbd2").glob(f"{name}-[0-9]*")):
        return frozenset()
    try:
        thread = (proc / task / "comm").read_text().strip()
    except FileNotFoundError:
        return _NONE
    return frozenset(_below(sysfs / "class/block" / thread.removeprefix("jbd2/")))


def _kernel_name(source: str, sysfs: Path) -> str:
    """What the kernel calls a device node; empty if only the node could tell."""
    path = source.removeprefix("/dev/")
    if path.startswith("mapper/"):
        for each in sysfs.glob("block/dm-*/dm/name"):
            if each.read_text().rstrip("\n") == path.removeprefix("mapper/"):
                return each.parent.parent.name
        return ""
    return path.replace("/", "!")


def _below_all(links: Iterable[Path]) -> frozenset[int | str]:
    """What is below devices together, of which there is to be one."""
    devices = [*links]
    return frozenset(kind for device in devices for kind in _below(device)) if devices else _NONE


def _below(link: Path) -> Iterator[int | str]:
    """What is below the device that a link in sysfs leads to."""
    directory = Path(os.path.realpath(link))
    if not directory.is_dir():
        yield UNKNOWN
        return
    if (directory / "partition").exists():
        directory = directory.parent
    # Of device-mapper, MD and bcache: what they are made of.
    slaves = [*(directory / "slaves").iterdir()] if (directory / "slaves").is_dir() else []
    for slave in slaves:
        yield from _below(slave)
    number = directory.name.removeprefix("loop")
    if number != directory.name and number.isdecimal():
        yield int(number)
    elif not slaves and (kind := _remote(directory)):
        yield kind


def _remote(directory: Path) -> str:
    """What can make a disk hang, by its name and its way to the machine; empty if it is local."""
    stem = _STEM.match(directory.name)
    name = stem[0] if stem else directory.name
    if name in _REMOTE:
        return name
    for part in directory.parts:
        for transport, kind in _TRANSPORTS.items():
            if re.fullmatch(rf"{transport}[\d._]*", part):
                return kind
    if name == "nvme":
        # With several paths to it the disk is a subsystem's, and has a controller for each.
        controllers = directory / "device"
        told = [*controllers.glob("transport"), *controllers.glob("nvme*/transport")]
        transports = {each.read_text().strip() for each in told}
        return "" if transports and transports <= _NVME_TRANSPORTS else "nvme-of"
    # A driver without a bus may have a process behind it. Those that are not known here have to be
    # trusted by name.
    return name if "virtual" in directory.parts and name not in _OWN else ""
