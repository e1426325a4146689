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
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import pyudev

from loopd.loop import kernel
from tests.harness.area import CHECKOUT
from tests.harness.area import area as make_area
from tests.harness.images import make_ext4, make_gpt, make_sparse
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
# What newer versions of udev find out, before our rules are asked.
NEWER = """
KERNEL!="loop[6-9]?????*", GOTO="loopd_newer_end"
ENV{ID_PART_GPT_AUTO_ROOT_DISK}="1", ENV{ID_PART_GPT_AUTO_ROOT_ORIGIN}="1"
ENV{ID_PART_GPT_AUTO_ROOT_UUID}="x", ENV{ID_PART_GPT_AUTO_ROOT}="1"
ENV{ID_LOOP_BACKING_DEVICE}="1:2", ENV{ID_LOOP_BACKING_INODE}="3"
ENV{ID_LOOP_BACKING_FILENAME}="x", ENV{ID_LOOP_BACKING_FILENAME_ENC}="x"
LABEL="loopd_newer_end"
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
        tests = {
            "60-zz-loopd-test.rules": NEWER,
            "62-zz-loopd-test.rules": ASSEMBLERS,
            "99-zz-loopd-test.rules": LATECOMER,
        }
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
    place = struct.pack("<3Q16x16s", 2048, 60_000, 8, uuid.uuid4().bytes).ljust(128, b"\0")
    total = sum(struct.unpack("<64I", head + array + place))
    place = place[:88] + struct.pack("<I", (total & 0xFFFFFFFF) + (total >> 32)) + place[92:]
    return write(blank(path), 4096, head + array + place)


def btrfs(path: Path) -> Path:
    superblock = bytearray(4096)
    superblock[32:48] = uuid.uuid4().bytes
    struct.pack_into("<QQ8s", superblock, 48, 65536, 0, b"_BHRfS_M")
    superblock[:4] = crc32c(bytes(superblock[32:]))
    return write(blank(path), 65536, bytes(superblock))


def crc32c(data: bytes) -> bytes:
    """The checksum bit by bit: zlib has only another one."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0x82F63B78 if checksum & 1 else 0)
    return struct.pack("<I", checksum ^ 0xFFFFFFFF)


def stratis(path: Path) -> Path:
    pool, disk = (uuid.uuid4().hex.encode() for _ in range(2))
    sizes = struct.pack("<QQQQ", 4096, 4096, 0, 0)
    content = b"!Stra0tis\x86\xff\x02^\x41rh" + struct.pack("<Q4x", 65536) + pool + disk + sizes
    content = content.ljust(508, b"\0")
    return write(blank(path), 512, crc32c(content) + content)


def zfs_member(path: Path) -> Path:
    uberblock = struct.pack("<Q", 0x00BAB10C).ljust(1024, b"\0")
    os.truncate(blank(path), 64 << 20)
    return write(path, 128 << 10, uberblock * 16)


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


def iso9660(path: Path) -> Path:
    """With each name that such a filesystem can have."""
    words = b"system", b"volume", b"set", b"publisher", b"preparer", b"application"
    places = 8, 40, 190, 318, 446, 574
    descriptor = bytearray(b"\1CD001\1".ljust(2048, b"\0"))
    for place, word in zip(places, words, strict=True):
        size = 32 if place < 190 else 128
        descriptor[place : place + size] = word.ljust(size)
    boot = b"\0CD001\1" + b"boot".ljust(32)
    data = bytes(descriptor) + boot.ljust(2048, b"\0") + b"\xffCD001\1"
    return write(blank(path), 32768, data)


def gpt(path: Path) -> Path:
    """A partition with a name, and a filesystem with names in it."""
    make_gpt(path, [(2048, 8192)], 8 << 20)
    return write(path, 1 << 20, ext4(path.with_suffix(".inside"), uuid.uuid4()).read_bytes())


# What udev may know of a user's device: what the kernel and our rules say, what libblkid calls the
# kind of it, and numbers. A key that is not here is to be looked at: could a user choose its words?
KNOWN = {
    *("DEVPATH", "DEVNAME", "DEVTYPE", "DISKSEQ", "PARTN", "MAJOR", "MINOR", "SUBSYSTEM"),
    *("USEC_INITIALIZED", "DEVLINKS", "TAGS", "CURRENT_TAGS"),
    *("LOOPD_UNPRIVILEGED", "LOOPD_DISKSEQ", "UDISKS_IGNORE", "UDISKS_AUTO"),
    *("SYSTEMD_READY", "DM_UDEV_DISABLE_OTHER_RULES_FLAG"),
    *("ID_FS_TYPE", "ID_FS_USAGE", "ID_FS_SIZE", "ID_FS_LASTBLOCK", "ID_FS_BLOCKSIZE"),
    *("ID_PART_TABLE_TYPE", "ID_PART_ENTRY_SCHEME", "ID_PART_ENTRY_NUMBER"),
    *("ID_PART_ENTRY_OFFSET", "ID_PART_ENTRY_SIZE", "ID_PART_ENTRY_DISK"),
    *("ID_LOOP_BACKING_DEVICE", "ID_LOOP_BACKING_INODE"),
}
WORDS = {
    *("ID_FS_UUID", "ID_FS_UUID_ENC", "ID_FS_UUID_SUB", "ID_FS_UUID_SUB_ENC"),
    *("ID_FS_LABEL", "ID_FS_LABEL_ENC", "ID_FS_VERSION"),
    *("ID_FS_SYSTEM_ID", "ID_FS_BOOT_SYSTEM_ID", "ID_FS_PUBLISHER_ID", "ID_FS_APPLICATION_ID"),
    *("ID_FS_DATA_PREPARER_ID", "ID_FS_VOLUME_SET_ID"),
    *("ID_PART_TABLE_UUID", "ID_PART_ENTRY_UUID", "ID_PART_ENTRY_NAME", "ID_PART_ENTRY_TYPE"),
    *("ID_PART_GPT_AUTO_ROOT", "ID_PART_GPT_AUTO_ROOT_UUID", "ID_PART_GPT_AUTO_ROOT_DISK"),
    *("ID_PART_GPT_AUTO_ROOT_ORIGIN", "ID_LOOP_BACKING_FILENAME", "ID_LOOP_BACKING_FILENAME_ENC"),
}


def listen() -> pyudev.Monitor:
    """Hear from now on what udevd tells of block devices."""
    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), "udev")
    monitor.filter_by("block")
    monitor.start()
    return monitor


# The stories


def test_no_word_of_a_user_is_in_udevs_database(udev: MarkedUdev, area: Path) -> None:
    """Lines of fstab."""
    words = set()
    for make in (iso9660, gpt, btrfs, md_member, lvm2_physical_volume, bcache):
        image = make(area / make.__name__)
        with bound(udev, image, marked=False) as disk, partition(udev, disk, 2048, 8192) as part:
            words |= (properties(udev, disk) | properties(udev, part)).keys() & WORDS
        heard = listen()
        with bound(udev, image, marked=True) as disk, partition(udev, disk, 2048, 8192) as part:
            events = [each for each in iter(partial(heard.poll, 0), None) if disk in each.sys_name]
            assert {disk, part} == {each.sys_name for each in events}
            told = [dict(each.properties) for each in events]
            for found in (properties(udev, disk), properties(udev, part), *told):
                # Others have no way to see what begins with a dot, but by listening.
                keys = {key for key in found if not key.startswith(".")}
                assert keys <= KNOWN | {"ACTION", "SEQNUM", "SYNTH_UUID"}
                assert {Path(link).parent.name for link in found["DEVLINKS"].split()} == {
                    "by-diskseq"
                }
    # There was something to take away.
    assert words == WORDS


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
            assert properties(udev, theirs)["ID_FS_TYPE"] == "ext4"  # udev has looked
            assert lasting_links(udev, theirs) == set()
            assert by_uuid.resolve().name == ours
            assert by_label.resolve().name == ours
        with bound(udev, forged, marked=False) as theirs:
            assert by_uuid.resolve().name == theirs
            assert by_label.resolve().name == theirs


@pytest.mark.parametrize(
    ("diskseq", "binding", "holds"),
    [
        ("the same", "the same", True),
        # After LOOP_CHANGE_FD.
        ("another", "the same", True),
        # The number is somebody else's by now.
        ("another", "another", False),
        # About to be bound.
        ("another", "", True),
    ],
)
def test_a_mark_is_of_one_binding(
    udev: MarkedUdev, area: Path, diskseq: str, binding: str, holds: bool
) -> None:
    """Stale marks."""
    image = gpt(area / "image")
    with bound(udev, image, marked=True) as disk, partition(udev, disk, 2048, 8192) as part:
        mark = udev.marks / disk
        seq = int(Path(f"/sys/block/{disk}/diskseq").read_text()) - (diskseq != "the same")
        of = (kernel.loop_binding(int(disk.removeprefix("loop"))) or 0) + (binding != "the same")
        if binding:
            mark.write_text(f"LOOPD_OWNER=1\nLOOPD_DISKSEQ={seq}\nLOOPD_BINDING={of}\n")
        link = udev.marks / f"{disk}_{seq}"
        link.symlink_to(mark.name)
        try:
            run("udevadm", "trigger", "--action=change", f"/dev/{disk}", f"/dev/{part}")
            udev.settle()
            for name in (disk, part):
                assert ("LOOPD_UNPRIVILEGED" in properties(udev, name)) is holds
            assert bool(lasting_links(udev, part)) is not holds
        finally:
            link.unlink()


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
        assert properties(udev, name)["ID_FS_TYPE"] == "ext4"
        assert properties(udev, name)["ID_PART_ENTRY_NUMBER"] == "1"
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


@pytest.mark.parametrize("image", [stratis, zfs_member])
def test_what_a_daemon_would_assemble_by_its_type_alone_has_none(
    udev: MarkedUdev, area: Path, image: Callable[[Path], Path]
) -> None:
    """Links of udev."""
    path = image(area / "image")
    with bound(udev, path, marked=True) as name:
        found = properties(udev, name)
        assert "ID_FS_TYPE" not in found
        assert found["SYSTEMD_READY"] == "0"
    with bound(udev, path, marked=False) as name:
        assert properties(udev, name)["ID_FS_TYPE"] == image.__name__


def test_an_ordinary_filesystem_stays_visible_to_systemd(udev: MarkedUdev, area: Path) -> None:
    with bound(udev, ext4(area / "image", uuid.uuid4()), marked=True) as name:
        assert "SYSTEMD_READY" not in properties(udev, name)


def test_a_marked_image_is_not_found_by_its_label_where_blkid_asks_udev(
    udev: MarkedUdev, area: Path
) -> None:
    """Without EVALUATE=udev blkid and mount go on to read all devices of the machine."""
    filesystem = uuid.uuid4()
    image = ext4(area / "image", filesystem)
    settings = area / "blkid.conf"
    settings.write_text(f"EVALUATE=udev\nCACHE_FILE={area}/cache\n")
    environment = os.environ | {"BLKID_CONF": str(settings)}
    found = []
    for marked in (True, False):
        with bound(udev, image, marked=marked) as name:
            command = ["blkid", "-L", label_of(filesystem)]
            told = subprocess.run(
                command, env=environment, check=False, capture_output=True, text=True, timeout=60
            )
            found.append(told.stdout.strip() == f"/dev/{name}")
    assert found == [False, True]
