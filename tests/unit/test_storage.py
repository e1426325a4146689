# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a block device stands on, in trees like sysfs."""

import os
from pathlib import Path

import pytest

from loopd.loop import storage
from tests.harness.sysfs import Sysfs

NUMBERS = (8, 0)
DEVICE = os.makedev(*NUMBERS)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("pci0000:00/0000:00:02.0/virtio1/block/vda", set()),
        ("pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda", set()),
        ("pci0000:00/0000:00:14.0/usb1/1-1/1-1:1.0/host6/target6:0:0/6:0:0:0/block/sdb", set()),
        ("pci0000:00/host1/rport-1:0-2/target1:0:0/1:0:0:0/block/sdc", set()),
        ("platform/mmc0/mmc0:0001/block/mmcblk0", set()),
        ("virtual/block/zram0", set()),
        ("virtual/block/ram3", set()),
        ("virtual/block/dm-7", set()),  # of targets that need no device
        ("virtual/block/md127", set()),
        ("virtual/block/loop12", {12}),
        ("virtual/block/nbd0", {"nbd"}),
        ("virtual/block/ublkb1", {"ublkb"}),
        ("virtual/block/drbd1", {"drbd"}),
        ("virtual/block/etherd!e0.0", {"etherd"}),  # ATA over Ethernet
        ("virtual/block/anything0", {"anything"}),
        ("rbd/0/block/rbd0", {"rbd"}),
        ("platform/host2/session1/target2:0:0/2:0:0:1/block/sdd", {"iscsi"}),
        ("platform/vhci_hcd.0/usb5/5-1/5-1:1.0/host7/target7:0:0/7:0:0:0/block/sde", {"usbip"}),
        ("tcm_loop_0/tcm_loop_adapter_0/host3/target3:0:1/3:0:1:0/block/sdf", {"tcm_loop"}),
    ],
)
def test_a_disk_is_known_by_its_name_and_its_way(
    sysfs: Sysfs, path: str, found: set[int | str]
) -> None:
    """Trust by type."""
    sysfs.add(NUMBERS, path)
    assert storage.foundations(DEVICE, sysfs.root) == found


@pytest.mark.parametrize(
    ("transports", "found"),
    [
        ({"device": "pcie"}, set()),
        ({"device": "apple-nvme"}, set()),
        ({"device": "tcp"}, {"nvme-of"}),
        ({"device": "loop"}, {"nvme-of"}),
        ({"device/nvme0": "pcie"}, set()),
        ({"device/nvme0": "pcie", "device/nvme1": "rdma"}, {"nvme-of"}),
        ({}, {"nvme-of"}),
    ],
)
def test_an_nvme_tells_its_transport(
    sysfs: Sysfs, transports: dict[str, str], found: set[int | str]
) -> None:
    """Trust by type."""
    sysfs.add(NUMBERS, "virtual/nvme-subsystem/nvme-subsys0/nvme0n1", transports=transports)
    assert storage.foundations(DEVICE, sysfs.root) == found


def test_what_stands_on_several_stands_on_all_of_them(sysfs: Sysfs) -> None:
    """Trust by type: LUKS on LVM on MD on a disk and a network one, and on a loop device."""
    disk = sysfs.add((8, 1), "pci0/block/sda")
    remote = sysfs.add((43, 0), "virtual/block/nbd0")
    part = sysfs.add((43, 1), "nbd0p1", partition_of=remote)
    loop = sysfs.add((7, 3), "virtual/block/loop3")
    array = sysfs.add((9, 0), "virtual/block/md0", slaves=[disk, part])
    volume = sysfs.add((253, 0), "virtual/block/dm-0", slaves=[array, loop])
    sysfs.add(NUMBERS, "virtual/block/dm-1", slaves=[volume])
    assert storage.foundations(DEVICE, sysfs.root) == {"nbd", 3}


def test_a_device_that_sysfs_does_not_have_is_not_known(sysfs: Sysfs) -> None:
    """Trust by type."""
    assert storage.foundations(DEVICE, sysfs.root) == {storage.UNKNOWN}
    assert storage.foundations_of_btrfs("/dev/sda", sysfs.root) == {storage.UNKNOWN}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("/dev/sda", set()),
        ("/dev/dm-0", {"nbd"}),
        ("/dev/mapper/pool-data", {"nbd"}),
        ("/dev/nbd0", {"nbd"}),
        ("/dev/mapper/gone", {"nbd"}),
        ("/dev/disk/by-uuid/x", {"nbd"}),
        ("/dev/root", {"nbd"}),
    ],
)
def test_a_btrfs_is_found_by_any_of_its_devices(
    sysfs: Sysfs, source: str, found: set[int | str]
) -> None:
    """Trust by type: where the source does not tell which one it is, it is about all of them."""
    disk = sysfs.add((8, 1), "pci0/block/sda")
    remote = sysfs.add((43, 0), "virtual/block/nbd0")
    mapped = sysfs.add((253, 0), "virtual/block/dm-0", slaves=[disk], name="pool-data")
    sysfs.btrfs("one", "sda", disk)
    sysfs.btrfs("two", "dm-0", mapped)
    sysfs.btrfs("two", "nbd0", remote)
    assert storage.foundations_of_btrfs(source, sysfs.root) == found


@pytest.mark.parametrize(
    ("task", "journals", "thread", "found"),
    [
        ("12", ("sda-8", "sdb-8"), "jbd2/sda-8", set()),
        ("12", ("sda1-8", "loop3"), "jbd2/loop3", {3}),
        ("12", ("nbd0",), "jbd2/nbd0", {"nbd"}),
        ("12", ("gone",), "jbd2/gone", {storage.UNKNOWN}),
        ("12", ("loop3",), "", {storage.UNKNOWN}),
        ("<none>", ("loop3",), "", set()),
        ("", (), "", set()),
    ],
)
def test_a_journal_may_be_on_another_device(
    sysfs: Sysfs,
    tmp_path: Path,
    task: str,
    journals: tuple[str, ...],
    thread: str,
    found: set[int | str],
) -> None:
    """Trust by type."""
    sysfs.add(NUMBERS, "pci0000:00/ata1/block/sda")
    others = {"loop3": (7, 3), "nbd0": (43, 0)}
    (sysfs.root / "class/block").mkdir(parents=True)
    for name, numbers in others.items():
        directory = sysfs.add(numbers, f"virtual/block/{name}")
        (sysfs.root / "class/block" / name).symlink_to(directory)
    proc = tmp_path / "proc"
    for journal in journals:
        (proc / "fs/jbd2" / journal).mkdir(parents=True)
    if task:
        (sysfs.root / "fs/ext4/sda").mkdir(parents=True)
        (sysfs.root / "fs/ext4/sda/journal_task").write_text(f"{task}\n")
    if thread:
        (proc / task).mkdir()
        (proc / task / "comm").write_text(f"{thread}\n")
    assert storage.foundations_of_journal(DEVICE, sysfs.root, proc) == found
