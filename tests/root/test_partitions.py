# SPDX-License-Identifier: LGPL-2.1-or-later
"""Partition devices: made from the table, kept in step with it, resized, opened, and gone in time.

The kernel of a test machine may have no parser of its own: all that is here was made by loopd.
"""

import ctypes
import fcntl
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import CHECKOUT
from tests.harness.area import area as make_area
from tests.harness.caller import MANAGER, MANAGER_PATH, Attached, Caller, File, Variant, options
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_gpt, make_mbr, pattern
from tests.harness.polkit import RULES_ALLOW_ALL, rules_allowing
from tests.harness.process import Process
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World, make_world

ERROR = f"{MANAGER}.Error."
INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"

MANAGING = "mail"
"""A user who may manage what is others'."""
TABLE_READER = CHECKOUT / "loopd" / "loop" / "partition_table_child.py"

BLKPG = 0x1269
ADD_PARTITION = 1
LOOP_CTL_REMOVE = 0x4C81

# Far from what GET_FREE gives out, and from what other test runs take.
_unlikely = itertools.count(361100 + os.getpid() % 50000 * 2)

Extents = dict[int, tuple[int, int]]
"""Start and size in bytes by number."""


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    allowed = ("attach", "open-device", "open-read-only-device")
    rules = rules_allowing(*(f"org.example.loop1.{action}" for action in allowed))
    managing = ("org.example.loop1.manage-others", "org.example.loop1.open-others-device")
    rules += rules_allowing(*managing, users=(MANAGING,))
    return {"authority": rules}


@pytest.fixture
def number() -> Iterator[int]:
    """The number of a loop device that does not exist.

    Once it does, and is free, anybody may take it: a test that goes on with it is alone.
    """
    wanted = next(each for each in _unlikely if not os.path.exists(f"/sys/block/loop{each}"))
    yield wanted
    with suppress(OSError), opened("/dev/loop-control") as control:
        fcntl.ioctl(control, LOOP_CTL_REMOVE, wanted)  # unless loopd has


def gpt(
    world: World,
    *parts: tuple[int, int],
    size: int = 4 * MIB,
    sector_size: int = 512,
    mode: int = 0o644,
) -> Path:
    """Make an image of a user's with a GPT."""
    image = world.new_path()
    image.write_bytes(_gpt(parts, size, sector_size))
    image.chmod(mode)
    shutil.chown(image, USER)
    return image


@cache
def _gpt(parts: tuple[tuple[int, int], ...], size: int, sector_size: int) -> bytes:
    # Most tests have one of a few, and the pattern takes its time.
    with make_area("gpt") as directory:
        return make_gpt(directory / "image", parts, size, sector_size=sector_size).read_bytes()


def in_bytes(*parts: tuple[int, int], sector_size: int = 512) -> Extents:
    """Return what parts given in sectors are in bytes, numbered from 1."""
    return {
        number: (start * sector_size, count * sector_size)
        for number, (start, count) in enumerate(parts, 1)
    }


def extents(attached: Attached) -> Extents:
    """Return the partitions as the kernel has them."""
    found = {}
    for name in loops.partitions(attached.number):
        directory = Path(f"/sys/block/loop{attached.number}/{name}")
        number, start, size = (
            int((directory / each).read_text()) for each in ("partition", "start", "size")
        )
        found[number] = start * 512, size * 512
    return found


def rows(attached: Attached, partitions: Extents) -> list[tuple[Any, ...]]:
    """Return what the property Partitions says of these."""
    return [
        (number, f"{attached.node}p{number}", *partitions[number]) for number in sorted(partitions)
    ]


def told(caller: Caller, attached: Attached) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in caller.get(attached.path, "Partitions")]


def check(
    caller: Caller, attached: Attached, partitions: Extents, missing: tuple[int, ...] = ()
) -> None:
    """Check that exactly these are there, have nodes, and are told of, as are those missing."""
    assert extents(attached) == partitions
    assert told(caller, attached) == rows(attached, partitions)
    assert caller.get(attached.path, "MissingPartitions") == list(missing)
    for number in partitions:
        node = os.stat(f"{attached.node}p{number}")
        device = Path(f"/sys/block/loop{attached.number}/loop{attached.number}p{number}/dev")
        assert device.read_text() == f"{os.major(node.st_rdev)}:{os.minor(node.st_rdev)}\n"


def changes(caller: Caller, attached: Attached) -> dict[str, Any]:
    """Return what a caller has heard of as changed since the last time; partitions as rows."""
    changed: dict[str, Any] = {}
    # Partitions come one by one, and may be told of so.
    for signal in [it for it in caller.signals if it.path == attached.path]:
        changed |= signal.args[1]
        caller.signals.remove(signal)
    if "Partitions" in changed:
        changed["Partitions"] = [tuple(row) for row in changed["Partitions"]]
    return changed


def rescan(caller: Caller, attached: Attached) -> int:
    with unprobed(attached):
        (count,) = caller.device(attached.path, "RescanPartitions", "a{sv}", {})
    return int(count)


@contextmanager
def unprobed(attached: Attached) -> Iterator[None]:
    """Keep a udevd away, to which a partition that it has open for a probe belongs."""
    with opened(attached.node) as fd:
        subprocess.run(
            ["flock", "--exclusive", "--timeout", "20", str(fd)], check=True, pass_fds=[fd]
        )
        yield


def rewrite(fd: Any, table: Path) -> None:
    """Write the table of another image through an fd of the device."""
    assert fd.write(table.read_bytes()[: 34 * 512]) == 34 * 512


def resize_by_fd(caller: Caller, fd: Any, mapping: dict[str, Any] | None = None) -> int:
    (size,) = caller.manager("Resize", "ha{sv}", 0, options(mapping), fds=[fd])
    return int(size)


def content(node: str, offset: int, length: int) -> bytes:
    with opened(node) as fd:
        return os.pread(fd, length, offset)


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file as root."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def wait_gone(attached: Attached) -> None:
    """Wait until a device is unbound and has no partitions, which the kernel drops last."""
    with loops.Uevents() as events:
        events.wait_until(
            lambda: (
                not loops.loop_is_bound(attached.number, attached.diskseq)
                and not loops.strays(attached.number)
            ),
            f"{attached.node} and its partitions to be gone",
        )


def add_partition(node: str, number: int, start: int, length: int) -> None:
    """Make a partition device, whatever any table says."""
    form = struct.Struct("qqi64s64s4x")
    described = ctypes.create_string_buffer(form.pack(start, length, number, b"", b""))
    argument = struct.pack("iiiP", ADD_PARTITION, 0, form.size, ctypes.addressof(described))
    # For reading: the close of a writable fd has a running udevd read the table.
    with opened(node) as fd:
        fcntl.ioctl(fd, BLKPG, argument)


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> CallError:
    """Return the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value


# What a table makes


@pytest.mark.parametrize(
    ("table_size", "given"), [(512, {}), (4096, {"sector-size": 4096}), (4096, {"sector-size": 0})]
)
def test_a_gpt_makes_partitions_that_hold_the_images_bytes(
    world: World, owner: Caller, table_size: int, given: dict[str, int]
) -> None:
    """Proves A16 by the bus: 0 finds the sector size."""
    parts = ((64, 128), (256, 512)) if table_size == 4096 else ((2048, 2048), (4096, 1000))
    image = gpt(world, *parts, sector_size=table_size)
    attached = owner.attach(image, partition_scan=True, mapping=given)
    partitions = in_bytes(*parts, sector_size=table_size)
    check(owner, attached, partitions)
    properties = owner.get_all(attached.path)
    assert (properties["PartitionScan"], properties["SectorSize"]) == (True, table_size)
    assert properties["Size"] == 4 * MIB
    for number, (start, size) in partitions.items():
        assert content(f"{attached.node}p{number}", 0, 4 * MIB) == pattern(start, size)


def test_a_gpt_for_another_sector_size_makes_none(world: World, owner: Caller) -> None:
    image = gpt(world, (64, 128), sector_size=4096)
    attached = owner.attach(image, partition_scan=True)
    check(owner, attached, {})
    assert owner.get(attached.path, "PartitionScan") is True


def test_an_mbr_makes_primary_extended_and_logical_partitions(world: World, owner: Caller) -> None:
    image = make_mbr(
        world.new_path(),
        ((2048, 2048), (4096, 512)),
        extended=(6144, 8192),
        logicals=((6208, 1000), (8192, 2048)),
        owner=USER,
    )
    attached = owner.attach(image, partition_scan=True)
    partitions = in_bytes((2048, 2048), (4096, 512), (6144, 2))
    partitions |= {5: (6208 * 512, 1000 * 512), 6: (8192 * 512, 2048 * 512)}
    check(owner, attached, partitions)
    for number in (1, 2, 5, 6):
        start, size = partitions[number]
        assert content(f"{attached.node}p{number}", 0, 8 * MIB) == pattern(start, size)


@pytest.mark.parametrize("sector_size", [0, 512, 4096])
def test_no_table_makes_none(world: World, owner: Caller, sector_size: int) -> None:
    attached = owner.attach(world.image(), partition_scan=True, sector_size=sector_size)
    check(owner, attached, {})
    properties = owner.get_all(attached.path)
    assert (properties["PartitionScan"], properties["Size"]) == (True, MIB)


def test_nothing_is_made_that_was_not_asked_for(world: World, owner: Caller) -> None:
    for given in ({}, {"partition-scan": False}):
        attached = owner.attach(gpt(world, (2048, 2048)), mapping=given)
        check(owner, attached, {})
        assert owner.get(attached.path, "PartitionScan") is False


def test_a_read_only_device_has_read_only_partitions(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), "r", partition_scan=True)
    check(owner, attached, in_bytes((2048, 2048)))
    assert Path(f"/sys/class/block/loop{attached.number}p1/ro").read_text() == "1\n"


def test_partitions_are_told_of_when_the_device_is(world: World, owner: Caller) -> None:
    watcher = world.caller(OTHER)
    attached = owner.attach(gpt(world, (2048, 2048), (4096, 100)), partition_scan=True)
    added = watcher.wait_signal("InterfacesAdded", lambda it: it.args[0] == attached.path)
    properties = added.args[1][f"{MANAGER}.Device"]
    expected = rows(attached, in_bytes((2048, 2048), (4096, 100)))
    assert [tuple(row) for row in properties["Partitions"]] == expected
    assert (properties["PartitionScan"], properties["Size"]) == (True, 4 * MIB)
    # Nothing was seen that came and went again.
    changed = [it for it in watcher.sync_signals() if it.member == "PropertiesChanged"]
    assert [it for it in changed if it.path == attached.path] == []


@pytest.mark.parametrize("sector_size", [512, 0])
def test_a_table_inside_a_piece_of_the_file_is_found(
    world: World, owner: Caller, sector_size: int
) -> None:
    disk = gpt(world, (2048, 2048), (4096, 512), size=3 * MIB)
    image = world.image(6 * MIB)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(disk.read_bytes())
    given = {"offset": MIB, "size-limit": 3 * MIB, "sector-size": sector_size}
    attached = owner.attach(image, partition_scan=True, mapping=given)
    check(owner, attached, in_bytes((2048, 2048), (4096, 512)))
    properties = owner.get_all(attached.path)
    assert [properties[name] for name in ("Offset", "SizeLimit", "Size")] == [
        *(MIB, 3 * MIB, 3 * MIB)
    ]
    assert content(f"{attached.node}p2", 0, MIB) == pattern(4096 * 512, 512 * 512)


def test_a_limit_cuts_off_the_partitions_behind_it(world: World, owner: Caller) -> None:
    image = make_mbr(world.new_path(), ((2048, 2048), (4096, 4096), (9000, 100)), owner=USER)
    attached = owner.attach(image, partition_scan=True, size_limit=3 * MIB)
    check(owner, attached, in_bytes((2048, 2048), (4096, 2048)), missing=(3,))


def test_a_file_that_was_cut_off_has_its_partitions_up_to_its_end(
    world: World, owner: Caller
) -> None:
    """As the kernel's own parser has it: a download that was broken off, a disk that was shrunk."""
    parts = ((2048, 2048), (4096, 4096), (9000, 100))
    image = make_mbr(world.new_path(), parts, owner=USER)
    os.truncate(image, 3 * MIB + 100)
    attached = owner.attach(image, partition_scan=True)
    check(owner, attached, in_bytes((2048, 2048), (4096, 2048)), missing=(3,))
    assert content(f"{attached.node}p2", 0, 4 * MIB) == pattern(2 * MIB, MIB)
    # The rest has come.
    make_mbr(image, parts, owner=USER)
    assert owner.resize(attached.path) == 8 * MIB
    changes(owner, attached)
    assert rescan(owner, attached) == 3
    check(owner, attached, in_bytes(*parts))
    told_of = {"Partitions": rows(attached, in_bytes(*parts)), "MissingPartitions": []}
    assert changes(owner, attached) == told_of


def test_an_isohybrid_image_says_what_it_has_inside_of_another_partition(
    world: World, owner: Caller, area: Path
) -> None:
    """systemd#12409: its EFI partition is a part of the first one; the kernel adds none such."""
    image = isohybrid(area, world.new_path())
    attached = owner.attach(image, "r", partition_scan=True)
    (only, *_), size = told(owner, attached), image.stat().st_size
    assert only == (1, f"{attached.node}p1", 0, size)
    check(owner, attached, {1: (0, size)}, missing=(2,))
    assert rescan(owner, attached) == 1
    check(owner, attached, {1: (0, size)}, missing=(2,))
    # Its bytes can be had by themselves.
    start, count = struct.unpack_from("<II", image.read_bytes(), 446 + 16 + 8)
    efi = owner.attach(
        image, "r", mapping={"offset": start * 512, "size-limit": count * 512, "sector-size": 512}
    )
    assert content(efi.node, 0, 512) == b"EFI".ljust(512, b".")


def isohybrid(directory: Path, image: Path) -> Path:
    """Make an ISO 9660 image that also is a disk, with an EFI partition inside of the first one."""
    (directory / "tree").mkdir()
    (directory / "tree" / "efi.img").write_bytes(b"EFI".ljust(512, b".").ljust(MIB, b"\0"))
    # What xorriso wants is a boot image of SYSLINUX's, by its signature at the end of a sector.
    (directory / "tree" / "boot.img").write_bytes(bytes(2048 * 4))
    (directory / "mbr").write_bytes(bytes(432))
    subprocess.run(
        [
            *("xorriso", "-as", "mkisofs", "-quiet", "-o", image),
            *("-isohybrid-mbr", directory / "mbr", "-partition_offset", "0"),
            *("-b", "boot.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
            *("-eltorito-alt-boot", "-e", "efi.img", "-no-emul-boot", "-isohybrid-gpt-basdat"),
            directory / "tree",
        ],
        check=True,
        capture_output=True,
    )
    image.chmod(0o644)
    shutil.chown(image, USER)
    return image


def test_a_slice_with_a_disklabel_says_what_it_has_inside(world: World, owner: Caller) -> None:
    """util-linux PR 913: BSD's partitions are inside of the slice; the kernel adds none such."""
    image = make_mbr(world.new_path(), ((2048, 4096), (8192, 1024)), owner=USER)
    with image.open("r+b") as file:
        file.seek(446 + 4)
        file.write(b"\xa5")  # FreeBSD
        file.seek(2049 * 512)
        file.write(disklabel((2064, 1000), (3072, 500)))
    attached = owner.attach(image, partition_scan=True)
    check(owner, attached, in_bytes((2048, 4096), (8192, 1024)), missing=(5, 6))


def disklabel(*parts: tuple[int, int]) -> bytes:
    """Return a disklabel of BSD's."""
    label = bytearray(512)
    struct.pack_into("<I", label, 0, 0x82564557)
    struct.pack_into("<IHHII", label, 132, 0x82564557, 0, len(parts), 8192, 8192)
    for index, (start, count) in enumerate(parts):
        struct.pack_into("<IIIBBH", label, 148 + 16 * index, count, start, 1024, 7, 8, 0)
    words = struct.unpack(f"<{(148 + 16 * len(parts)) // 2}H", label[: 148 + 16 * len(parts)])
    checksum = 0
    for word in words:
        checksum ^= word
    struct.pack_into("<H", label, 136, checksum)
    return bytes(label)


def test_what_is_missing_is_known_to_the_next_loopd(area: Path) -> None:
    with make_world(authority=RULES_ALLOW_ALL) as first, first.test():
        image = make_mbr(first.new_path(), ((2048, 2048), (3000, 100)), owner=USER)
        root = first.caller(None)
        attached = root.attach(image, partition_scan=True, lifetime="system")
        check(root, attached, in_bytes((2048, 2048)), missing=(2,))
        runtime = first.daemon.runtime_directory
        first.daemon.kill()
        with Daemon(first.bus, runtime_directory=runtime):
            check(root, attached, in_bytes((2048, 2048)), missing=(2,))
            assert root.detach(attached.path) is True


def test_partitions_come_with_every_other_option(world: World, owner: Caller) -> None:
    attached = owner.attach(
        gpt(world, (2048, 2048)),
        partition_scan=True,
        direct_io=False,
        reference="disk",
        lock="shared",
        read_only=True,
    )
    check(owner, attached, in_bytes((2048, 2048)))
    properties = owner.get_all(attached.path)
    assert (properties["DirectIO"], properties["Reference"]) == (False, "disk")
    assert (properties["Locked"], properties["ReadOnly"], properties["Autoclear"]) == (
        *("shared", True, True),
    )


def test_a_logical_partition_may_follow_its_table_at_once(world: World, owner: Caller) -> None:
    image = make_mbr(world.new_path(), (), (4096, 8192), ((4097, 1000), (6144, 10)), owner=USER)
    attached = owner.attach(image, partition_scan=True)
    assert extents(attached)[5] == (4097 * 512, 1000 * 512)


# Hostile tables


def test_of_entries_that_overlap_the_first_counts(world: World, owner: Caller) -> None:
    parts = ((2048, 2048), (3000, 2048), (2048, 2048), (2048, 1), (4096, 100))
    attached = owner.attach(gpt(world, *parts), partition_scan=True)
    partitions = in_bytes(*parts)
    check(owner, attached, {1: partitions[1], 5: partitions[5]}, missing=(2, 3, 4))


def test_entries_outside_of_the_device_make_nothing(world: World, owner: Caller) -> None:
    parts = ((1 << 40, 2048), (2048, 2048), (8000, 4096), (1 << 62, 1 << 62), (4096, 100))
    parts += (((1 << 64) - 100, 50), (2048, 1 << 55), (8192, 1))
    attached = owner.attach(gpt(world, *parts), partition_scan=True)
    partitions = extents(attached)
    assert partitions == {number: in_bytes(*parts)[number] for number in (2, 5)}
    check(owner, attached, partitions)


def test_an_entry_of_no_length_makes_nothing(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 0), (4096, 1)), partition_scan=True)
    check(owner, attached, {2: (4096 * 512, 512)})
    image = make_mbr(world.new_path(), ((2048, 0), (4096, 1), (0, 2048)), owner=USER)
    attached = owner.attach(image, partition_scan=True)
    assert set(extents(attached)) <= {2, 3}
    check(owner, attached, extents(attached))


def test_a_full_table_makes_a_full_set(world: World, owner: Caller) -> None:
    parts = [(64 + 8 * index, 8) for index in range(128)]
    attached = owner.attach(gpt(world, *parts), partition_scan=True)
    check(owner, attached, in_bytes(*parts))
    assert content(f"{attached.node}p128", 0, MIB) == pattern(*in_bytes(*parts)[128])
    assert owner.detach(attached.path) is True
    assert loops.strays(attached.number) == ()


def test_a_chain_of_logical_partitions_without_end_ends(world: World, owner: Caller) -> None:
    image = make_mbr(
        world.new_path(), (), (2048, 8192), ((2100, 10), (3000, 10), (4000, 10)), owner=USER
    )
    with image.open("r+b") as file:
        # The last one's table names its own place as that of the next.
        at = 3999
        file.seek(at * 512 + 446 + 16)
        file.write(struct.pack("<B3sB3sII", 0, b"", 5, b"", at - 2048, 11))
    attached = owner.attach(image, partition_scan=True)
    check(owner, attached, extents(attached))
    assert extents(attached)[5] == (2100 * 512, 10 * 512)


@pytest.mark.parametrize("seed", range(6))
def test_garbage_in_a_table_does_no_harm(world: World, owner: Caller, seed: int) -> None:
    image = gpt(world, (2048, 2048), (4096, 512))
    noise = bytes((7 * index * (seed + 3) + index // 5) % 256 for index in range(4096))
    with image.open("r+b") as file:
        if seed == 0:  # a wrong checksum, in both headers
            for sector in (1, 8191):
                file.seek(sector * 512 + 16)
                file.write(b"\xde\xad\xbe\xef")
        elif seed == 1:  # the entries are not those of the checksum
            for sector in (2, 8159):
                file.seek(sector * 512)
                file.write(noise)
        elif seed == 2:  # the first is broken, the backup is not
            file.seek(512)
            file.write(noise[:92])
        elif seed == 3:  # everything but the signatures
            file.seek(520)
            file.write(noise)
        elif seed == 4:  # a broken MBR alone
            file.seek(0)
            file.write(noise[:510] + b"\x55\xaa" + noise)
        else:
            file.seek(0)
            file.write(noise * 64)
    attached = owner.attach(image, partition_scan=True)
    partitions = extents(attached)
    check(owner, attached, partitions)
    if seed in (0, 1):
        assert partitions == {}
    if seed == 2:
        assert partitions == in_bytes((2048, 2048), (4096, 512))
    assert all(start > 0 and start + size <= 4 * MIB for start, size in partitions.values())


def test_a_file_that_is_all_table_does_no_harm(world: World, owner: Caller) -> None:
    image = gpt(world, (2048, 2048))
    os.truncate(image, 1024)
    attached = owner.attach(image, partition_scan=True)
    check(owner, attached, {})
    assert owner.get(attached.path, "Size") == 1024


# Rescan


def test_a_rewritten_table_is_taken_up(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    parts = ((2048, 1024), (4096, 512), (5000, 100))
    rewrite(fd, gpt(world, *parts))
    assert extents(attached) == in_bytes((2048, 2048))
    assert rescan(owner, attached) == 3
    assert changes(owner, attached) == {"Partitions": rows(attached, in_bytes(*parts))}
    check(owner, attached, in_bytes(*parts))
    assert content(f"{attached.node}p3", 0, MIB) == pattern(5000 * 512, 100 * 512)
    rewrite(fd, world.image())
    assert rescan(owner, attached) == 0
    check(owner, attached, {})
    assert owner.get(attached.path, "PartitionScan") is True
    fd.close()


@pytest.mark.parametrize("direct_io", [True, False])
def test_a_table_that_was_written_to_the_file_is_taken_up(
    world: World, owner: Caller, direct_io: bool
) -> None:
    image = gpt(world, (2048, 2048))
    attached = owner.attach(image, partition_scan=True, direct_io=direct_io)
    # What was read of the former table stays in the cache of whoever has the device open.
    fd = owner.open_device(attached.path, "r")
    before = fd.read(34 * 512)
    parts = ((2048, 1024), (4096, 512))
    with image.open("r+b") as file:
        file.write(gpt(world, *parts).read_bytes()[: 34 * 512])
    assert rescan(owner, attached) == 2
    check(owner, attached, in_bytes(*parts))
    assert fd.read(34 * 512) != before
    fd.close()


def test_a_table_that_is_as_before_changes_and_tells_nothing(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    before = os.stat(f"{attached.node}p1").st_ino
    assert rescan(owner, attached) == 1
    assert changes(owner, attached) == {}
    assert os.stat(f"{attached.node}p1").st_ino == before


def test_partitions_as_the_table_says_are_not_touched(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    with opened(f"{attached.node}p1", os.O_RDONLY | os.O_EXCL) as part:
        rewrite(fd, gpt(world, (2048, 2048), (4096, 512)))
        assert rescan(owner, attached) == 2
        check(owner, attached, in_bytes((2048, 2048), (4096, 512)))
        assert os.pread(part, 4096, 0) == pattern(MIB, 4096)
        rewrite(fd, gpt(world, (2048, 2048)))
        assert rescan(owner, attached) == 1
    check(owner, attached, in_bytes((2048, 2048)))
    fd.close()


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDONLY | os.O_EXCL])
def test_one_in_use_grows_in_place(world: World, owner: Caller, flags: int) -> None:
    """As by partx -u: a mounted root filesystem is grown so."""
    attached = owner.attach(gpt(world, (2048, 2048), (6000, 100)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    parts = ((2048, 3000), (6000, 200))
    rewrite(fd, gpt(world, *parts))
    before = os.stat(f"{attached.node}p1").st_ino
    with opened(f"{attached.node}p1", flags) as part:
        assert rescan(owner, attached) == 2
        assert changes(owner, attached) == {"Partitions": rows(attached, in_bytes(*parts))}
        assert os.lseek(part, 0, os.SEEK_END) == 3000 * 512
        assert os.pread(part, 512, 2999 * 512) == pattern(MIB + 2999 * 512, 512)
    check(owner, attached, in_bytes(*parts))
    assert os.stat(f"{attached.node}p1").st_ino == before
    fd.close()


def test_where_one_in_use_would_shrink_none_grows(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 1024), (4096, 512)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    rewrite(fd, gpt(world, (2048, 2048), (4096, 256)))
    with opened(f"{attached.node}p2"):
        assert error_of(rescan, owner, attached).name == f"{ERROR}DeviceBusy"
        check(owner, attached, in_bytes((2048, 1024), (4096, 512)))
    fd.close()


def test_one_grows_into_the_place_of_one_that_goes(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048), (4096, 512)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    rewrite(fd, gpt(world, (2048, 4096)))
    with opened(f"{attached.node}p1"):
        assert rescan(owner, attached) == 1
    check(owner, attached, in_bytes((2048, 4096)))
    fd.close()


# Resize of the device


def test_a_device_that_becomes_smaller_cuts_its_partitions(world: World, owner: Caller) -> None:
    parts = ((2048, 2048), (4096, 4096), (9000, 100))
    image = make_mbr(world.new_path(), parts, owner=USER)
    attached = owner.attach(image, partition_scan=True)
    with opened(f"{attached.node}p2") as part:
        changes(owner, attached)
        assert owner.resize(attached.path, size_limit=3 * MIB) == 3 * MIB
        smaller = in_bytes((2048, 2048), (4096, 2048))
        check(owner, attached, smaller, missing=(3,))
        told_of = changes(owner, attached)
        assert (told_of["Partitions"], told_of["MissingPartitions"]) == (
            *(rows(attached, smaller), [3]),
        )
        assert os.lseek(part, 0, os.SEEK_END) == MIB
        # It grows again, and those that are there with the next look at the table.
        assert owner.resize(attached.path, size_limit=0) == 8 * MIB
        check(owner, attached, smaller, missing=(3,))
        assert rescan(owner, attached) == 3
    check(owner, attached, in_bytes(*parts))


def test_a_device_that_moves_has_the_partitions_of_its_new_place(
    world: World, owner: Caller
) -> None:
    """Else they would go on to be what they were, over other bytes."""
    image = gpt(world, (2048, 2048), (4096, 512), size=3 * MIB)
    with image.open("ab") as file:
        file.write(gpt(world, (2048, 1024), size=3 * MIB).read_bytes())
    attached = owner.attach(image, partition_scan=True, size_limit=3 * MIB)
    check(owner, attached, in_bytes((2048, 2048), (4096, 512)))
    with opened(f"{attached.node}p1"):
        error = error_of(owner.resize, attached.path, offset=3 * MIB, size_limit=3 * MIB)
        assert error.name == f"{ERROR}DeviceBusy"
        check(owner, attached, in_bytes((2048, 2048), (4096, 512)))
    assert owner.resize(attached.path, offset=3 * MIB, size_limit=3 * MIB) == 3 * MIB
    check(owner, attached, in_bytes((2048, 1024)))
    assert content(f"{attached.node}p1", 0, MIB) == pattern(MIB, MIB // 2)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDONLY | os.O_EXCL])
def test_one_in_use_that_would_have_to_change_is_busy_and_stays(
    world: World, owner: Caller, flags: int
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    for parts in (((2048, 1024),), ((2049, 2047), (4096, 512)), ()):
        rewrite(fd, gpt(world, *parts))
        with opened(f"{attached.node}p1", flags) as part:
            error = error_of(rescan, owner, attached)
            assert error.name == f"{ERROR}DeviceBusy"
            assert f"{attached.node}p1" in error.message
            check(owner, attached, in_bytes((2048, 2048)))
            assert os.pread(part, 512, 0) == pattern(MIB, 512)
    assert rescan(owner, attached) == 0
    fd.close()


def test_where_one_in_use_would_have_to_change_the_others_stay_too(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048), (4096, 512)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw")
    rewrite(fd, gpt(world, (2048, 1024), (4096, 256), (5000, 100)))
    with opened(f"{attached.node}p2"):
        assert error_of(rescan, owner, attached).name == f"{ERROR}DeviceBusy"
        check(owner, attached, in_bytes((2048, 2048), (4096, 512)))
    fd.close()


def test_a_device_attached_without_partition_scan_can_be_scanned_later(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048), (4096, 512)))
    assert rescan(owner, attached) == 2
    partitions = in_bytes((2048, 2048), (4096, 512))
    assert changes(owner, attached) == {
        "PartitionScan": True,
        "Partitions": rows(attached, partitions),
    }
    check(owner, attached, partitions)
    properties = owner.get_all(attached.path)
    assert (properties["PartitionScan"], properties["Autoclear"]) == (True, True)
    # They go with it from now on.
    assert owner.detach(attached.path) is True
    assert loops.strays(attached.number) == ()


def test_a_rescan_has_no_options_yet(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)))
    wrong = {"force": Variant("b", True)}
    error = error_of(owner.device, attached.path, "RescanPartitions", "a{sv}", wrong)
    assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "'force'")
    check(owner, attached, {})


def test_rescans_at_once_agree(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048), (4096, 512)))
    second = world.caller(USER)
    calls = [
        caller.call_begin(attached.path, f"{MANAGER}.Device", "RescanPartitions", "a{sv}", {})
        for caller in (owner, second) * 3
    ]
    assert [call.end() for call in calls] == [(2,)] * 6
    check(owner, attached, in_bytes((2048, 2048), (4096, 512)))


def test_another_user_rescans_and_resizes_nothing(world: World, owner: Caller) -> None:
    image = gpt(world, (2048, 2048), mode=0o666)
    attached = owner.attach(image)
    other = world.caller(OTHER)
    refusal = "InteractiveAuthorizationRequired"
    assert error_of(rescan, other, attached).name.endswith(refusal)
    check(owner, attached, {})
    assert rescan(owner, attached) == 1
    with opened(f"{attached.node}p1") as part:
        for given in ({}, {"size-limit": 512}, {"size-limit": 0}):
            assert error_of(resize_by_fd, other, part, given).name.endswith(refusal)
    check(owner, attached, in_bytes((2048, 2048)))
    # Another connection of the owner may, and so may root.
    assert rescan(world.caller(USER), attached) == rescan(world.caller(None), attached) == 1


def test_who_may_manage_others_rescans_and_resizes(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 1024), (4096, 512)))
    manager = world.caller(MANAGING)
    assert rescan(manager, attached) == 2
    with opened(f"{attached.node}p1") as part:
        assert resize_by_fd(manager, part, {"size-limit": 0}) == MIB
    check(owner, attached, {1: (MIB, MIB), 2: (2 * MIB, 512 * 512)})


def test_partitions_of_somebody_elses_device(world: World, owner: Caller) -> None:
    image = gpt(world, (2048, 1024), (4096, 512))
    node = loops.losetup(image)
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    foreign = Attached(
        f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}", node, loop.diskseq
    )
    try:
        manager = world.caller(MANAGING)
        for caller in (owner, manager):
            if foreign.path not in caller.managed_objects():
                caller.wait_signal("InterfacesAdded", lambda it: it.args[0] == foreign.path)
        assert error_of(rescan, owner, foreign).name.endswith("InteractiveAuthorizationRequired")
        assert rescan(manager, foreign) == 2
        check(owner, foreign, in_bytes((2048, 1024), (4096, 512)))
        assert owner.get(foreign.path, "PartitionScan") is True
        with opened(f"{node}p1") as part:
            error = error_of(resize_by_fd, owner, part, {"size-limit": 512})
            assert error.name.endswith("InteractiveAuthorizationRequired")
            assert resize_by_fd(manager, part, {"size-limit": 0}) == MIB
        fd = manager.open_device(foreign.path, "rw", partition=2)
        assert fd.read(512) == pattern(2 * MIB, 512)
        fd.close()
        # It is as much theirs as before, and its partitions go with it.
        assert loops.loop_is_bound(loop.number, loop.diskseq)
        assert owner.get(foreign.path, "Autoclear") is False
    finally:
        loops.detach_leaked(loop)
    wait_gone(foreign)


# Resize by a partition's fd


def test_a_partition_grows_into_free_room_and_shrinks(world: World, owner: Caller) -> None:
    """Proves A23."""
    attached = owner.attach(gpt(world, (2048, 1024), (6144, 512)), partition_scan=True)
    part = owner.open_device(attached.path, "r", partition=1)
    second = (6144 * 512, 512 * 512)
    for given, size in (
        ({"size-limit": 512}, 512),
        ({"size-limit": MIB}, MIB),
        ({}, MIB),
        ({"size-limit": 0}, 4096 * 512),
        ({"size-limit": 4096 * 512}, 4096 * 512),
        ({"size-limit": 2 * 4096}, 2 * 4096),
    ):
        before = extents(attached)
        assert resize_by_fd(owner, part, given) == size
        partitions = {1: (MIB, size), 2: second}
        told_of = {} if before == partitions else {"Partitions": rows(attached, partitions)}
        assert changes(owner, attached) == told_of
        check(owner, attached, partitions)
    # Once open it goes by its new size.
    assert part.evaluate("os.lseek(fd, 0, os.SEEK_END)") == 2 * 4096
    assert resize_by_fd(owner, part, {"size-limit": 0}) == 4096 * 512
    assert part.evaluate("os.lseek(fd, 0, os.SEEK_END)") == 4096 * 512
    assert part.read(512, 4095 * 512) == pattern(6143 * 512, 512)
    part.close()
    # The table says what it said.
    assert rescan(owner, attached) == 2
    check(owner, attached, in_bytes((2048, 1024), (6144, 512)))


def test_the_last_partition_has_room_up_to_the_end_of_the_device(
    world: World, owner: Caller
) -> None:
    image = gpt(world, (2048, 1024))
    attached = owner.attach(image, partition_scan=True)
    part = owner.open_device(attached.path, "r", partition=1)
    assert resize_by_fd(owner, part, {"size-limit": 0}) == 3 * MIB
    os.truncate(image, 6 * MIB)
    assert owner.resize(attached.path) == 6 * MIB
    assert resize_by_fd(owner, part, {"size-limit": 0}) == 5 * MIB
    check(owner, attached, {1: (MIB, 5 * MIB)})
    part.close()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"size-limit": 1}, "size-limit"),
    ({"size-limit": 513}, "size-limit"),
    ({"size-limit": 2049 * 512}, "size-limit"),
    ({"size-limit": 3 * MIB}, "size-limit"),
    ({"size-limit": 2**63}, "size-limit"),
    ({"size-limit": 2**64 - 512}, "size-limit"),
    ({"offset": 0}, "offset"),
    ({"offset": MIB, "size-limit": 512}, "offset"),
    ({"force": True}, "force"),
    ({"force": True, "size-limit": 512}, "force"),
    ({"partition": 1}, "'partition'"),
    ({"size-limit": Variant("u", 512)}, "size-limit"),
]


def test_a_wrong_option_for_a_partition_is_told_with_its_key_and_changes_nothing(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(gpt(world, (2048, 1024), (4096, 512)), partition_scan=True)
    for given, key in WRONG:
        with opened(f"{attached.node}p1") as part:
            error = error_of(resize_by_fd, owner, part, given)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, key), given
        check(owner, attached, in_bytes((2048, 1024), (4096, 512)))


def test_a_partition_has_whole_sectors(world: World, owner: Caller) -> None:
    image = gpt(world, (64, 64), (256, 64), sector_size=4096)
    attached = owner.attach(image, partition_scan=True, sector_size=4096)
    with opened(f"{attached.node}p1") as part:
        error = error_of(resize_by_fd, owner, part, {"size-limit": 4096 + 512})
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "size-limit")
        assert resize_by_fd(owner, part, {"size-limit": 8192}) == 8192
        assert resize_by_fd(owner, part, {"size-limit": 0}) == 192 * 4096


def test_a_partition_in_use_grows_and_does_not_shrink(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 1024), (6144, 512)), partition_scan=True)
    with opened(f"{attached.node}p1", os.O_RDONLY | os.O_EXCL) as part:
        error = error_of(resize_by_fd, owner, part, {"size-limit": 512})
        assert error.name == f"{ERROR}DeviceBusy"
        assert f"{attached.node}p1" in error.message
        check(owner, attached, in_bytes((2048, 1024), (6144, 512)))
        assert resize_by_fd(owner, part) == MIB // 2
        assert resize_by_fd(owner, part, {"size-limit": MIB}) == MIB
        # The other one is not in use.
        with opened(f"{attached.node}p2") as second:
            assert resize_by_fd(owner, second, {"size-limit": 512}) == 512
    with opened(f"{attached.node}p1") as part:
        assert resize_by_fd(owner, part, {"size-limit": 512}) == 512
    check(owner, attached, {1: (MIB, 512), 2: (3 * MIB, 512)})


def test_a_logical_partition_is_resized_as_any_other(world: World, owner: Caller) -> None:
    image = make_mbr(
        world.new_path(), ((2048, 2048),), (4096, 8192), ((4160, 100), (8192, 100)), owner=USER
    )
    attached = owner.attach(image, partition_scan=True)
    with opened(f"{attached.node}p5") as part:
        assert resize_by_fd(owner, part, {"size-limit": 512 * 512}) == 512 * 512
        error = error_of(resize_by_fd, owner, part, {"size-limit": 4096 * 512})
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "size-limit")
    assert extents(attached)[5] == (4160 * 512, 512 * 512)
    with opened(f"{attached.node}p2") as part:
        assert resize_by_fd(owner, part, {"size-limit": 0}) == 64 * 512


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_PATH])
def test_a_partition_open_in_any_mode_names_itself_and_its_device(
    world: World, owner: Caller, flags: int
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    root = world.caller(None)
    part = File(f"{attached.node}p1", flags)
    assert root.manager("GetDevice", "h", 0, fds=[part]) == (attached.path,)
    assert resize_by_fd(root, part, {"size-limit": 512}) == 512
    check(owner, attached, {1: (MIB, 512)})
    # Who names a partition does not mean the whole disk.
    error = error_of(root.manager, "Detach", "ha{sv}", 0, {}, fds=[part])
    assert error.name == INVALID_ARGS
    assert attached.node in error.message
    check(owner, attached, {1: (MIB, 512)})
    disk = File(attached.node, flags)
    assert root.manager("Detach", "ha{sv}", 0, {}, fds=[disk]) == (True,)
    assert loops.strays(attached.number) == ()


# Open


def test_an_ordinary_user_reads_and_writes_its_partition(world: World, owner: Caller) -> None:
    image = gpt(world, (2048, 2048), (4096, 512))
    attached = owner.attach(image, partition_scan=True, direct_io=False)
    with pytest.raises(PermissionError):
        owner.open(f"{attached.node}p2", os.O_RDONLY)
    fd = owner.open_device(attached.path, "rw", partition=2)
    assert fd.evaluate("os.fstat(fd).st_rdev") == os.stat(f"{attached.node}p2").st_rdev
    assert fd.flags() & os.O_ACCMODE == os.O_RDWR
    assert fd.evaluate("os.lseek(fd, 0, os.SEEK_END)") == 512 * 512
    assert fd.read(4096) == pattern(2 * MIB, 4096)
    assert fd.write(b"by nobody".ljust(4096, b"."), 8192) == 4096
    with pytest.raises(OSError, match="No space left on device"):
        fd.write(bytes(512), 512 * 512)
    fd.evaluate("os.fsync(fd)")
    assert image.read_bytes()[2 * MIB + 8192 :][:4096] == b"by nobody".ljust(4096, b".")
    reader = owner.open_device(attached.path, "r", partition=2)
    assert reader.read(9, 8192) == b"by nobody"
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.write(bytes(512))
    for each in (fd, reader):
        assert owner.manager("GetDevice", "h", 0, fds=[each]) == (attached.path,)
        each.close()
    assert owner.detach(attached.path) is True


@pytest.mark.parametrize("number", [0, 2, 5, 255, 256, 2**32 - 1])
def test_a_partition_that_is_not_there_is_no_device(
    world: World, owner: Caller, number: int
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    for mode in ("r", "rw"):
        error = error_of(owner.open_device, attached.path, mode, partition=number)
        assert error.name == f"{ERROR}NoSuchDevice"
    # With no partition at all, too.
    assert owner.detach(attached.path) is True
    attached = owner.attach(world.image())
    error = error_of(owner.open_device, attached.path, "r", partition=number)
    assert error.name == f"{ERROR}NoSuchDevice"


def test_a_partition_of_a_read_only_device_is_not_opened_for_writing(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), "r", partition_scan=True)
    for caller in (owner, world.caller(None)):
        error = error_of(caller.open_device, attached.path, "rw", partition=1)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "mode")
    fd = owner.open_device(attached.path, "r", partition=1)
    assert fd.read(512) == pattern(MIB, 512)
    fd.close()


def test_another_user_opens_no_partition(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    error = error_of(world.caller(OTHER).open_device, attached.path, "r", partition=1)
    assert error.name.endswith("InteractiveAuthorizationRequired")


# The end


def test_no_partition_is_left_after_detach(world: World, owner: Caller) -> None:
    for ends in ("detached", "killed"):
        attached = owner.attach(gpt(world, (2048, 2048), (4096, 512)), partition_scan=True)
        if ends == "detached":
            assert owner.detach(attached.path) is True
        else:
            owner.kill()
        wait_gone(attached)
        # Whoever has the number by now may have one.
        assert not os.path.exists(f"{attached.node}p1") or loops.loop_is_bound(attached.number)


def test_an_open_partition_keeps_the_device_until_it_is_closed(world: World, owner: Caller) -> None:
    attached = owner.attach(gpt(world, (2048, 2048), (4096, 512)), partition_scan=True)
    fd = owner.open_device(attached.path, "rw", partition=1)
    assert owner.detach(attached.path) is False
    assert owner.get(attached.path, "State") == "detaching"
    assert fd.read(512) == pattern(MIB, 512)
    error = error_of(rescan, owner, attached)
    assert error.name == f"{ERROR}NoSuchDevice"
    fd.close()
    wait_gone(attached)


def test_an_exclusive_opener_of_a_partition_makes_the_detach_busy(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(gpt(world, (2048, 2048)), partition_scan=True)
    with opened(f"{attached.node}p1", os.O_RDONLY | os.O_EXCL):
        assert error_of(owner.detach, attached.path).name == f"{ERROR}DeviceBusy"
        check(owner, attached, in_bytes((2048, 2048)))
        assert owner.detach(attached.path, lazy=True) is False
    wait_gone(attached)


@pytest.mark.alone
def test_a_partition_that_root_added_goes_with_the_device(number: int, world: World) -> None:
    root = world.caller(None)
    attached = root.attach(world.image(4 * MIB), number=number)
    add_partition(attached.node, 1, 0, MIB)
    assert root.detach(attached.path) is True
    assert loops.partitions(attached.number) == ()
    # Nor does the next one on that number have it.
    following = root.attach(world.image(4 * MIB), number=number)
    check(root, following, {})


@pytest.mark.alone
def test_partitions_of_a_killed_loopd_go_with_their_device(number: int) -> None:
    """Old partitions: only autoclear cleans up, and the next image is not seen through an old
    partition.
    """
    with make_world(authority=RULES_ALLOW_ALL) as killed:
        with killed.test():
            owner, root = killed.caller(USER), killed.caller(None)
            image = gpt(killed, (2048, 2048), (4096, 512))
            attached = owner.attach(image, partition_scan=True, number=number)
            check(owner, attached, in_bytes((2048, 2048), (4096, 512)))
            killed.daemon.kill()
            wait_gone(attached)
            with Daemon(killed.bus):
                following = root.attach(killed.image(4 * MIB), number=number)
                check(root, following, {})
                assert root.detach(following.path) is True


@pytest.mark.alone
def test_an_old_partition_that_is_open_shows_the_old_image_until_it_is_closed(
    number: int,
) -> None:
    """Old partitions."""
    with make_world(authority=RULES_ALLOW_ALL) as killed:
        with killed.test():
            owner, root = killed.caller(USER), killed.caller(None)
            image = gpt(killed, (2048, 2048))
            attached = owner.attach(image, partition_scan=True, number=number)
            remote = owner.open_device(attached.path, "r", partition=1)
            killed.daemon.kill()
            with Daemon(killed.bus):
                error = error_of(root.attach, killed.image(4 * MIB), number=number)
                assert error.name == f"{ERROR}DeviceBusy"
                assert remote.read(512) == pattern(MIB, 512)
                remote.close()
                wait_gone(attached)
                following = root.attach(killed.image(4 * MIB), number=number)
                check(root, following, {})
                assert root.detach(following.path) is True


@pytest.mark.alone
def test_a_partition_that_outlived_a_killed_loopd_never_shows_the_next_image(number: int) -> None:
    """Old partitions. Proves A9: what was added without partition-scan stays, until somebody takes
    it away.
    """
    with make_world(authority=RULES_ALLOW_ALL) as killed:
        with killed.test():
            owner, root = killed.caller(USER), killed.caller(None)
            attached = owner.attach(killed.image(4 * MIB), number=number)
            add_partition(attached.node, 1, MIB, MIB)
            killed.daemon.kill()
            loops.wait_unbound(attached.number, attached.diskseq)
            with Daemon(killed.bus):
                following = root.attach(gpt(killed, (4096, 512)), number=number)
                check(root, following, {})
                assert rescan(root, following) == 1
                check(root, following, in_bytes((4096, 512)))
                assert root.detach(following.path) is True
            assert loops.partitions(attached.number) == ()


def delete_partition(node: str, number: int) -> None:
    form = struct.Struct("qqi64s64s4x")
    described = ctypes.create_string_buffer(form.pack(0, 0, number, b"", b""))
    with suppress(OSError), opened(node) as fd:
        fcntl.ioctl(fd, BLKPG, struct.pack("iiiP", 2, 0, form.size, ctypes.addressof(described)))


WATCHED_CLEAN = """
from loopd.loop import kernel, loop_device as loopdev
clean = loopdev.clean
def watched(number):
    for when, do in (("Before", lambda _: None), ("After", clean)):
        do(number)
        print(when, [each.number for each in kernel.loop_partitions(number)], flush=True)
loopdev.clean = watched
"""


def restart_after_kill(user: str | None, number: int) -> str:
    """Kill a loopd whose device has a partition too many; return what the next one prints."""
    with make_world(authority=RULES_ALLOW_ALL) as killed, killed.test():
        left = killed.caller(user).attach(killed.image(4 * MIB), number=number)
        add_partition(left.node, 1, MIB, MIB)
        killed.daemon.kill()
        loops.wait_unbound(left.number, left.diskseq)
        try:
            runtime = killed.daemon.runtime_directory
            with Daemon(killed.bus, runtime_directory=runtime, prelude=WATCHED_CLEAN) as following:
                deadline = Deadline()
                while not re.search(r"^After \[.*\]$", following.log, re.MULTILINE):
                    assert deadline.remaining
                return following.log
        finally:
            delete_partition(left.node, 1)


@pytest.mark.alone
@pytest.mark.parametrize("user", [USER, None], ids=["user", "root"])
def test_a_partition_that_outlived_a_killed_loopd_is_removed_by_the_next_one(
    number: int, user: str | None
) -> None:
    """Old partitions."""
    for _ in range(5):
        printed = restart_after_kill(user, number)
        # A udevd that runs here, too, may be faster, when it is told of the device's last close.
        if "Before [1]" in printed:
            break
    assert "Before [1]\nAfter []" in printed


# The child that reads the table


@pytest.fixture(scope="module")
def reader() -> Iterator[Path]:
    """The program that reads tables in the world `bent`, for each test to write."""
    with make_area("reader") as directory:
        yield directory / "reader.py"


@pytest.fixture(scope="module")
def shared_bent(reader: Path) -> Iterator[World]:
    prelude = (
        "from pathlib import Path\n"
        "from loopd.loop import partition_table as table\n"
        f"table._READER, table._TIMEOUT, table._GRACE = Path({str(reader)!r}), 1.0, 0.25\n"
    )
    with make_world(authority=RULES_ALLOW_ALL, prelude=prelude) as made:
        yield made


@pytest.fixture
def bent(shared_bent: World) -> Iterator[World]:
    """A world whose reader of tables does as it is told."""
    with shared_bent.test() as testing:
        yield testing


def over(image: Path) -> list[loops.BoundLoop]:
    return [loop for loop in loops.bound_loops().values() if loop.backing_file == str(image)]


PLACES = "1 2048 2048 0\\n2 4096 512 0\\n"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import signal; signal.pause()", "TimedOut"),
        (f"import signal; print('{PLACES}', flush=True); signal.pause()", "TimedOut"),
        (
            "import signal; [signal.signal(n, 1) for n in (1, 2, 3, 13, 14, 15)]; signal.pause()",
            "TimedOut",
        ),
        ("import os, signal; os.close(1); os.closerange(0, 99); signal.pause()", "TimedOut"),
        ("import os\nwhile True: os.write(1, b'1 2048 2048 0\\n' * 99)", "Failed"),
        ("import os\nwhile True: os.write(1, b'9' * 9999)", "Failed"),
        ("print('9' * 9999)", "Failed"),
        (f"print('{PLACES}'); raise SystemExit(1)", "Failed"),
        (f"import os; print('{PLACES}', flush=True); os.kill(os.getpid(), 9)", "Failed"),
        ("print('1 2048')", "Failed"),
        ("print('1 2048 2048 0 0')", "Failed"),
        ("print('one two three four')", "Failed"),
        ("import os; os.write(1, b'\\xff\\xfe\\n')", "Failed"),
        ("this is no Python", "Failed"),
    ],
)
def test_a_reader_that_makes_trouble_ends_the_call_and_leaves_nothing(
    bent: World, reader: Path, program: str, error: str
) -> None:
    """libblockdev #1171."""
    reader.write_text(program)
    caller = bent.caller()
    image = gpt(bent, (2048, 2048))
    assert error_of(caller.attach, image, partition_scan=True).name == f"{ERROR}{error}"
    with loops.Uevents() as events:
        events.wait_until(lambda: not over(image), "what was bound to be gone")
    assert bent.daemon.children() == []
    assert bent.device_count() == 0
    bent.wait_idle_fds()
    # What is there already stays as it is.
    attached = caller.attach(image)
    assert error_of(rescan, caller, attached).name == f"{ERROR}{error}"
    check(caller, attached, {})
    assert bent.daemon.children() == []
    assert caller.detach(attached.path) is True


def test_a_reader_that_says_what_cannot_be_makes_nothing_of_it(bent: World, reader: Path) -> None:
    lines = [
        *("0 2048 2048 0", "256 2048 2048 0", "-1 2048 2048 0", f"{2**31} 2048 2048 0"),
        *("1 -1 2048 0", "1 2048 0 0", "1 2048 -1 0", "1 8191 2 0", "1 8192 1 0"),
        *(f"1 {2**55} {2**55} 0", f"1 {2**64} 1 0", f"1 1 {2**64} 0", f"1 {-(2**64)} {2**65} 0"),
        *("3 4096 1 0", "3 5000 1 0", "4 4096 1 0", "255 8191 1 0", "7 6000 500 1"),
    ]
    reader.write_text(f"print({chr(10).join(lines)!r})")
    caller = bent.caller()
    attached = caller.attach(gpt(bent), partition_scan=True)
    made = {1: (8191 * 512, 512), 3: (2 * MIB, 512), 7: (6000 * 512, 1024)}
    check(caller, attached, made, missing=(4, 255))


ATTEMPTS = """
import ctypes, fcntl, importlib.util, json, os, resource, signal, socket, struct, sys
reader, victim, file, seccomp = sys.argv[1:]
description = importlib.util.spec_from_file_location("tablereader", reader)
module = importlib.util.module_from_spec(description)
description.loader.exec_module(module)
libc = ctypes.CDLL(None, use_errno=True)

def call(function, *arguments):
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def blkpg(operation):
    extent = ctypes.create_string_buffer(struct.pack("qqi64s64s4x", 1 << 20, 1 << 20, 1, b"", b""))
    fcntl.ioctl(0, 0x1269, struct.pack("iiiP", operation, 0, 152, ctypes.addressof(extent)))

def fork():
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]:
            raise OSError(1, "")
    else:
        try:
            os.open(file, os.O_RDONLY)
        except OSError:
            os._exit(1)
        os._exit(0)

attempts = {
    "open a file for reading": lambda: os.open(file, os.O_RDONLY),
    "open a file for writing": lambda: os.open(file, os.O_WRONLY),
    "open a device": lambda: os.open("/dev/loop-control", os.O_RDWR),
    "open the device again": lambda: os.open("/proc/self/fd/0", os.O_RDWR),
    "open a place only": lambda: os.open("/", os.O_PATH),
    "list a directory": lambda: os.listdir("/"),
    "make a file": lambda: os.open(file + ".new", os.O_CREAT | os.O_WRONLY),
    "make a directory": lambda: os.mkdir(file + ".new"),
    "make a link": lambda: os.link(file, file + ".new"),
    "make a device node": lambda: os.mknod(file + ".new", 0o60600, os.makedev(7, 0)),
    "rename a file": lambda: os.rename(file, file + ".new"),
    "remove a file": lambda: os.unlink(file),
    "truncate a file": lambda: os.truncate(file, 0),
    "run a program": lambda: os.execv("/bin/true", ["true"]),
    "make a unix socket": lambda: socket.socket(socket.AF_UNIX),
    "make a network socket": lambda: socket.socket(socket.AF_INET),
    "make a memfd": lambda: os.memfd_create("file"),
    "make a pipe": os.pipe,
    "copy an fd": lambda: os.dup(0),
    "fork a child that may more": fork,
    "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "signal another process": lambda: os.kill(int(victim), signal.SIGTERM),
    "limit another process": lambda: resource.prlimit(int(victim), resource.RLIMIT_CPU, (1, 1)),
    "change a file's mode": lambda: os.chmod(file, 0o4755),
    "give a file away": lambda: os.chown(file, 1, 1),
    "trace another process": lambda: call(libc.ptrace, 16, int(victim), 0, 0),
    "mount": lambda: call(libc.mount, b"none", b"/mnt", b"tmpfs", 0, None),
    "take a mount namespace": lambda: call(libc.unshare, 0x20000),
    "become somebody else": lambda: os.setresuid(1, 1, 1),
    "change the root": lambda: os.chroot("/tmp"),
    "make a partition": lambda: blkpg(1),
    "remove a partition": lambda: blkpg(2),
    "drop all partitions": lambda: fcntl.ioctl(0, 0x125F),
    "change the device": lambda: fcntl.ioctl(0, 0x4C04, bytes(232)),
    "change the sector size": lambda: fcntl.ioctl(0, 0x4C09, 4096),
    "make the device read-only": lambda: fcntl.ioctl(0, 0x125D, struct.pack("i", 1)),
    "write to the device": lambda: os.pwrite(0, bytes(512), 0),
    "discard": lambda: fcntl.ioctl(0, 0x1277, struct.pack("QQ", 0, 4096)),
}
told = {}
module.lock_in([0x80081272, 0x1268], seccomp=seccomp == "True")
for name, attempt in attempts.items():
    try:
        attempt()
    except (OSError, ValueError) as exc:
        told[name] = str(exc)
    else:
        told[name] = None
if len(os.pread(0, 4096, 0)) == 4096:
    print(json.dumps(told))
"""


@pytest.mark.parametrize("seccomp", [True, False])
def test_the_child_that_reads_a_table_can_do_nothing_else(
    world: World, owner: Caller, seccomp: bool
) -> None:
    """CVE-2025-6019: also where seccomp, of which one look would be enough, is not to be had."""
    attached = owner.attach(gpt(world, (2048, 2048)))
    file = world.image(owner="root", mode=0o666)
    before = file.stat()
    with opened(attached.node) as device, Process(["sleep", "infinity"], name="victim") as victim:
        done = subprocess.run(
            [
                *(sys.executable, "-I", "-c", ATTEMPTS),
                *(TABLE_READER, str(victim.pid), file, str(seccomp)),
            ],
            stdin=device,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        assert [name for name, error in told.items() if error is None] == []
        assert victim.status is None
    after = file.stat()
    assert (after.st_size, after.st_nlink, after.st_mtime_ns) == (
        *(before.st_size, before.st_nlink, before.st_mtime_ns),
    )
    check(owner, attached, {})
    assert owner.get(attached.path, "SectorSize") == 512


def locked_in(pid: int) -> bool:
    """Say whether a process has given up its capabilities, the last thing before it reads."""
    status = Path(f"/proc/{pid}/status").read_text()
    return "CapEff:\t0000000000000000" in status


def test_the_child_that_reads_a_table_ends_with_loopd(area: Path) -> None:
    """Killed at any point: else it keeps the device, which autoclear would have taken away."""
    hangs = area / "reader.py"
    # The real one, which gives up what it has, but then reads for ever.
    hangs.write_text(
        "import importlib.util, pathlib, signal\n"
        f"found = importlib.util.spec_from_file_location('reader', {str(TABLE_READER)!r})\n"
        "module = importlib.util.module_from_spec(found)\n"
        "found.loader.exec_module(module)\n"
        "module.lock_in([], seccomp=False)\n"
        "signal.pause()\n"
    )
    prelude = (
        "from pathlib import Path; from loopd.loop import partition_table; "
        f"partition_table._READER = Path('{hangs}')"
    )
    with make_world(authority=RULES_ALLOW_ALL, prelude=prelude) as killed, killed.test():
        image = gpt(killed, (2048, 2048))
        with loops.Uevents() as events:
            killed.caller(USER).attach_begin(image, partition_scan=True)
            events.wait_until(lambda: bool(over(image)), "the file to be bound")
        deadline = Deadline()
        while not (children := killed.daemon.children()) or not locked_in(children[0]):
            assert deadline.remaining
        try:
            killed.daemon.kill()
            with loops.Uevents() as events:
                events.wait_until(lambda: not over(image), "the device to go", 5)
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, 9)
