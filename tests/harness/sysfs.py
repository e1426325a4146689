# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sysfs of block devices that this machine has not, as directories and links."""

from collections.abc import Sequence
from pathlib import Path


class Sysfs:
    """A tree like /sys, below `root`."""

    def __init__(self, root: Path) -> None:
        """Make an empty one."""
        self.root = root
        (root / "block").mkdir(parents=True)
        (root / "dev/block").mkdir(parents=True)

    def add(
        self,
        numbers: tuple[int, int],
        path: str,
        *,
        slaves: Sequence[Path] = (),
        name: str = "",
        partition_of: Path | None = None,
        transports: dict[str, str] | None = None,
    ) -> Path:
        """Add a device below devices/, of this device-mapper name; return its directory.

        `transports` are of NVMe controllers, each by its place below the device.
        """
        directory = partition_of / path if partition_of else self.root / "devices" / path
        (directory / "slaves").mkdir(parents=True)
        for slave in slaves:
            (directory / "slaves" / slave.name).symlink_to(slave)
        if partition_of:
            (directory / "slaves").rmdir()
            (directory / "partition").write_text("1\n")
        else:
            (self.root / "block" / directory.name).symlink_to(directory)
        if name:
            (directory / "dm").mkdir()
            (directory / "dm/name").write_text(f"{name}\n")
        for place, transport in (transports or {}).items():
            (directory / place).mkdir(parents=True)
            (directory / place / "transport").write_text(f"{transport}\n")
        major, minor = numbers
        (self.root / f"dev/block/{major}:{minor}").symlink_to(directory)
        return directory

    def btrfs(self, uuid: str, name: str, device: Path) -> None:
        """Add a device to a mounted btrfs."""
        devices = self.root / "fs/btrfs" / uuid / "devices"
        devices.mkdir(parents=True, exist_ok=True)
        (devices / name).symlink_to(device)
