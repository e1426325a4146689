# SPDX-License-Identifier: LGPL-2.1-or-later
"""The udev rules, in a real udevd: nothing of a user's image reaches the system by itself.

Each case is also run on a device without a mark, which shows that there was something to prevent.
What assembles arrays and volumes stands in no rule here: it would take root's devices of the other
half of each case, too. Rules of ours in the same place ask what theirs ask, and leave a note.
"""

import os
import struct
import subprocess
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from loopd import kernel
from tests.harness.area import CHECKOUT
from tests.harness.area import area as make_area
from tests.harness.images import make_ext4, make_sparse
from tests.harness.udev import Udev

# Numbers that LOOP_CTL_GET_FREE gives nobody: a mark set before binding is on no other's device.
_numbers = count(600_000 + os.getpid() % 4000 * 100)

# After our rules and before those of the real assemblers, which heed the same flags.
ASSEMBLERS = """
KERNEL!="loop[6-9]?????*", GOTO="loopd_test_end"
# as 64-md-raid-assembly.rules and 64-btrfs.rules
ENV{ID_FS_TYPE}=="linux_raid_member|btrfs", ENV{SYSTEMD_READY}!="0", ENV{LOOPD_TEST}="assembled"
# as 69-lvm.rules and 69-bcache.rules; the latter looks for itself at what has no type
ENV{ID_FS_TYPE}=="LVM2_member|bcache|", ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}!="1", \\
  ENV{LOOPD_TEST}="assembled"
# The real ones must not get this machine's unmarked devices.
ENV{LOOPD_TEST}=="assembled", ENV{SYSTEMD_READY}="0", ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1"
LABEL="loopd_test_end"
"""
LATECOMER = 'KERNEL=="loop[6-9]?????*", SYMLINK+="disk/by-loopd-test/%k"\n'


def run(*command: str | Path) -> str:
    """Run a tool that must succeed; return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


class MarkedUdev(Udev):
    """One whose rules look for marks where no loopd does, which would remove ours as it starts."""

    def __init__(self, runtime: Path) -> None:
        self.marks = runtime / "unprivileged"
        ours = {
            path.name: path.read_text().replace("/run/loopd/", f"{runtime}/")
            for path in (CHECKOUT / "systemd").glob("*.rules")
        }
        tests = {"62-zz-loopd-test.rules": ASSEMBLERS, "99-zz-loopd-test.rules": LATECOMER}
        super().__init__(ours | tests)


@pytest.fixture(scope="module")
def udev() -> Iterator[MarkedUdev]:
    """A running udevd with the checkout's rules."""
    with make_area("run") as runtime, MarkedUdev(runtime) as running:
        running.marks.mkdir()
        yield running


@contextmanager
def bound(udev: MarkedUdev, image: Path, *, marked: bool) -> Iterator[str]:
    """A loop device over the image, as loopd marks and binds it; yields its kernel name."""
    number = next(_numbers)
    name = f"loop{number}"
    if marked:
        (udev.marks / name).touch()
    try:
        run("losetup", f"/dev/{name}", image)
        try:
            udev.settle()
            yield name
        finally:
            run("losetup", "--detach", f"/dev/{name}")
            udev.settle()
    finally:
        (udev.marks / name).unlink(missing_ok=True)
        control_fd = kernel.open_loop_control()
        try:
            # Others on this machine may look at it, or have been given the number, now that it is
            # free; then it is theirs to remove.
            with suppress(OSError):
                kernel.loop_ctl_remove(control_fd, number)
        finally:
            os.close(control_fd)


@contextmanager
def partition(udev: Udev, disk: str, start: int, sectors: int) -> Iterator[str]:
    """The disk's first partition; yields its kernel name."""
    run("addpart", f"/dev/{disk}", "1", str(start), str(sectors))
    try:
        udev.settle()
        yield f"{disk}p1"
    finally:
        run("delpart", f"/dev/{disk}", "1")
        udev.settle()


def properties(udev: Udev, name: str) -> dict[str, str]:
    """What udev's database knows of a device."""
    return udev.properties(f"/dev/{name}")


def lasting_links(udev: Udev, name: str) -> set[str]:
    """The links to a device that would look the same for another attachment."""
    links = udev.links(f"/dev/{name}")
    return {link for link in links if not link.startswith("/dev/disk/by-diskseq/")}


# Images


def blank(path: Path) -> Path:
    return make_sparse(path, 32 << 20)


def write(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def ext4(path: Path, filesystem: uuid.UUID) -> Path:
    return make_ext4(path, uuid=str(filesystem), label=label_of(filesystem))


def label_of(filesystem: uuid.UUID) -> str:
    return filesystem.hex[:16]


def lvm2_physical_volume(path: Path) -> Path:
    content = struct.pack("<I8s32sQ", 32, b"LVM2 001", uuid.uuid4().hex.encode(), 32 << 20)
    content = content.ljust(492, b"\0")
    # LVM's checksum is the usual one with another start and without the final complement.
    checksum = zlib.crc32(content, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return write(blank(path), 512, struct.pack("<8sQI", b"LABELONE", 1, checksum) + content)


def md_member(path: Path) -> Path:
    head = struct.pack("<4I16s32s", 0xA92B4EFC, 1, 0, 0, uuid.uuid4().bytes, b"host:0")
    array = struct.pack("<QIIQII", 0, 1, 0, 60_000, 0, 2).ljust(64, b"\0")
    place = struct.pack("<3Q", 2048, 60_000, 8).ljust(128, b"\0")
    total = sum(struct.unpack("<64I", head + array + place))
    place = place[:88] + struct.pack("<I", (total & 0xFFFFFFFF) + (total >> 32)) + place[92:]
    return write(blank(path), 4096, head + array + place)


def btrfs(path: Path) -> Path:
    superblock = bytearray(4096)
    superblock[32:48] = uuid.uuid4().bytes
    struct.pack_into("<QQ8s", superblock, 48, 65536, 0, b"_BHRfS_M")
    # The checksum is CRC-32C, bit by bit: zlib has only the other one.
    checksum = 0xFFFFFFFF
    for byte in superblock[32:]:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    superblock[:4] = struct.pack("<I", checksum ^ 0xFFFFFFFF)
    return write(blank(path), 65536, bytes(superblock))


def bcache(path: Path) -> Path:
    magic = bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81")
    superblock = struct.pack("<QQ16s16s", 8, 1, magic, uuid.uuid4().bytes).ljust(200, b"\0")
    checksum = (1 << 64) - 1
    for byte in superblock:
        checksum ^= byte << 56
        for _ in range(8):
            top, checksum = checksum >> 63, checksum << 1 & (1 << 64) - 1
            checksum ^= 0x42F0E1EBA9EA3693 if top else 0
    checksum ^= (1 << 64) - 1
    return write(blank(path), 4096, struct.pack("<Q", checksum) + superblock)


# The stories


def test_a_marked_image_takes_no_link_from_the_device_that_has_it(
    udev: MarkedUdev, area: Path
) -> None:
    """Links of udev."""
    filesystem = uuid.uuid4()
    by_uuid = Path(f"/dev/disk/by-uuid/{filesystem}")
    by_label = Path(f"/dev/disk/by-label/{label_of(filesystem)}")
    system = ext4(area / "system", filesystem)
    forged = ext4(area / "forged", filesystem)

    with bound(udev, system, marked=False) as ours:
        assert by_uuid.resolve().name == ours
        assert by_label.resolve().name == ours
        with bound(udev, forged, marked=True) as theirs:
            run("udevadm", "trigger", "--action=change", f"/dev/{theirs}")
            udev.settle()
            assert properties(udev, theirs)["ID_FS_UUID"] == str(filesystem)
            assert lasting_links(udev, theirs) == set()
            assert by_uuid.resolve().name == ours
            assert by_label.resolve().name == ours
        with bound(udev, forged, marked=False) as theirs:
            assert by_uuid.resolve().name == theirs
            assert by_label.resolve().name == theirs


def test_a_marked_disk_keeps_the_name_of_its_attachment(udev: MarkedUdev, area: Path) -> None:
    with bound(udev, blank(area / "blank"), marked=True) as name:
        diskseq = Path(f"/sys/block/{name}/diskseq").read_text().strip()
        assert Path(f"/dev/disk/by-diskseq/{diskseq}").resolve().name == name


def test_a_partition_goes_by_the_mark_of_its_disk(udev: MarkedUdev, area: Path) -> None:
    """Links of udev."""
    filesystem = uuid.uuid4()
    image = blank(area / "disk")
    write(image, 440, filesystem.bytes[:4])
    write(image, 446, struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 8192) + bytes(48))
    write(image, 510, b"\x55\xaa")
    write(image, 2048 * 512, ext4(area / "filesystem", filesystem).read_bytes())

    with bound(udev, image, marked=True) as disk, partition(udev, disk, 2048, 8192) as name:
        assert properties(udev, name)["ID_FS_UUID"] == str(filesystem)
        assert properties(udev, name)["ID_PART_ENTRY_UUID"].endswith("-01")
        assert lasting_links(udev, name) == set()
    with bound(udev, image, marked=False) as disk, partition(udev, disk, 2048, 8192) as name:
        kinds = {Path(link).parent.name for link in lasting_links(udev, name)}
        assert {"by-uuid", "by-label", "by-partuuid"} <= kinds


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (lvm2_physical_volume, "LVM2_member"),
        (md_member, "linux_raid_member"),
        (btrfs, "btrfs"),
        (bcache, "bcache"),
        (blank, None),
    ],
    ids=["an LVM physical volume", "an MD member", "btrfs", "bcache", "what blkid cannot name"],
)
def test_nothing_assembles_a_marked(
    udev: MarkedUdev, area: Path, image: Callable[[Path], Path], kind: str | None
) -> None:
    """Links of udev."""
    path = image(area / "image")
    with bound(udev, path, marked=True) as name:
        found = properties(udev, name)
        assert found.get("ID_FS_TYPE") == kind
        assert "LOOPD_TEST" not in found
        assert "ID_BTRFS_READY" not in found
        assert lasting_links(udev, name) == set()
        # systemd, too, is to see nothing there that it might wait for; an empty device is no such.
        assert found.get("SYSTEMD_READY") == (None if kind is None else "0")
    with bound(udev, path, marked=False) as name:
        assert properties(udev, name)["LOOPD_TEST"] == "assembled"


def test_an_ordinary_filesystem_stays_visible_to_systemd(udev: MarkedUdev, area: Path) -> None:
    with bound(udev, ext4(area / "image", uuid.uuid4()), marked=True) as name:
        assert "SYSTEMD_READY" not in properties(udev, name)
