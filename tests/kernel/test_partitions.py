# SPDX-License-Identifier: LGPL-2.1-or-later
"""Partitions on kernels that have parsers of their own, and on which nobody but loopd makes any."""

import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.emulated import Emulated
from tests.harness.images import MIB, make_gpt, make_mbr, make_plain, make_sparse
from tests.kernel.steps import (
    attach,
    name_of,
    partitions,
    settled,
    show,
    smoking,
    wait_unbound,
)

HEARD = "/run/heard"
_RESCAN = """
import asyncio
from loopd.client import Client

async def main():
    async with await Client.connect() as client:
        device = await client.device_by_node({node!r})
        print(await device.rescan_partitions())

asyncio.run(main())
"""


@contextmanager
def listening(machine: Emulated) -> Iterator[None]:
    """Write to HEARD what the kernel tells of block devices."""
    machine.shell(
        f"rm -f {HEARD}\n"
        f"systemd-run --quiet --unit=heard --property=StandardOutput=file:{HEARD} "
        "udevadm monitor --kernel --subsystem-match=block\n"
        f"until grep -q KERNEL {HEARD}; do sleep 0.1; done"
    )
    try:
        yield
    finally:
        machine.run("systemctl", "stop", "heard")


def heard(machine: Emulated, node: str) -> list[tuple[str, str]]:
    """What the kernel has told of the partitions of a device."""
    said = machine.run("cat", HEARD)
    return re.findall(rf"(\w+)\s+\S*/({name_of(node)}p\d+) ", said)


def parsed(machine: Emulated, node: str) -> list[str]:
    """What the kernel's parser has said of a device: it says what it finds."""
    said = [line for line in machine.run("dmesg").splitlines() if f"{name_of(node)}:" in line]
    return [line for line in said if "detected capacity change" not in line]


def isohybrid(path: Path) -> Path:
    """An image as distributions ship them: an ISO, all of it a partition, with an MBR before it."""
    tree = path.with_name("tree")
    tree.mkdir()
    (tree / "file").write_bytes(bytes(MIB))
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", path, tree], check=True)
    size = path.stat().st_size // 512
    with path.open("r+b") as file:
        file.seek(440)
        file.write(struct.pack("<IH", 0x1DE0CA75, 0))
        for start, count, kind in ((0, size, 0), (256, 512, 0xEF)):
            file.write(
                struct.pack("<B3sB3sII", 0x80 if not start else 0, b"", kind, b"", start, count)
            )
        file.write(bytes(32) + b"\x55\xaa")
    return path


def from_sector_0(path: Path) -> Path:
    """An MBR whose first entry is the whole disk, the table included."""
    make_mbr(path, ((2048, 2048),))
    with path.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 0, 8192))
    return path


def sun_label(path: Path) -> Path:
    """A disk label of SunOS: big-endian, in sector 0, with a checksum over it."""
    make_sparse(path, 4 * MIB)
    label = bytearray(512)
    struct.pack_into(">I", label, 128, 1)  # version
    struct.pack_into(">H", label, 140, 8)  # partitions
    struct.pack_into(">HH", label, 142, 0x83, 0)
    struct.pack_into(">I", label, 188, 0x600DDEEE)  # it has a VTOC
    struct.pack_into(">HHHH", label, 432, 64, 0, 16, 16)  # cylinders, alternates, heads, sectors
    struct.pack_into(">II", label, 444, 0, 8192)
    struct.pack_into(">H", label, 508, 0xDABE)
    checksum = 0
    for (word,) in struct.iter_unpack(">H", label[:510]):
        checksum ^= word
    struct.pack_into(">H", label, 510, checksum)
    with path.open("r+b") as file:
        file.write(label)
    return path


TABLES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "gpt": (make_gpt, ()),
    "gpt of 4096": (
        lambda path: make_gpt(path, ((256, 256), (512, 256)), 8 * MIB, sector_size=4096),
        ("-b", "4096"),
    ),
    "mbr with logicals": (
        lambda path: make_mbr(path, ((2048, 2048),), (4096, 8192), ((4160, 1024), (6208, 1024))),
        (),
    ),
    "isohybrid": (isohybrid, ()),
    "from sector 0": (from_sector_0, ()),
    "sun": (sun_label, ()),
}


@pytest.mark.parametrize("table", smoking(TABLES, "isohybrid", "from sector 0", "sun"))
def test_partitions_are_made_once_and_not_by_the_kernels_parser(
    machine: Emulated, images: Path, table: str
) -> None:
    """Kernel's parser."""
    make, options = TABLES[table]
    image = machine.image(make(images / "image"))
    with listening(machine):
        node = attach(machine.alice, image, "-P", *options)
        settled(machine)
        made = partitions(machine, node)
        told = show(machine.alice, node)["partitions"]
    assert [each["number"] for each in told] == [number for number, _, _ in made]
    name = name_of(node)
    assert sorted(heard(machine, node)) == sorted(
        ("add", f"{name}p{number}") for number, _, _ in made
    )
    assert parsed(machine, node) == []
    machine.alice.run("loopctl", "detach", node)
    wait_unbound(machine, node)
    assert partitions(machine, node) == []


def test_the_parser_would_have_found_something(machine: Emulated, images: Path) -> None:
    """The control: losetup lets it look, and it says so. Debian's has no parser for "sun"."""
    for table in ("gpt", "isohybrid", "from sector 0"):
        make, _ = TABLES[table]
        image = machine.image(make(images / table.replace(" ", "-")))
        node = machine.run("losetup", "--find", "--show", "--partscan", image).strip()
        settled(machine)
        assert parsed(machine, node), table
        assert partitions(machine, node), table
        machine.run("losetup", "--detach", node)
        wait_unbound(machine, node)
        machine.run("dmesg", "--clear")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.smoke, id="without -P"),
        pytest.param(("-P",), id="with -P"),
    ],
)
def test_a_rescan_finds_partitions_that_end_with_their_device(
    machine: Emulated, images: Path, options: tuple[str, ...]
) -> None:
    """Old partitions: without PARTSCAN they would outlive the binding if loopd were killed now."""
    first = machine.image(make_gpt(images / "first"))
    second = machine.image(make_plain(images / "second", 4 * MIB))
    node = attach(machine.alice, first, *options)
    told = machine.alice.python(_RESCAN.format(node=node))
    assert told == "2\n"
    assert [number for number, _, _ in partitions(machine, node)] == [1, 2]
    assert machine.run("cat", f"/sys/block/{name_of(node)}/loop/partscan") == "1\n"
    settled(machine)
    # What it leaves is for the kernel to clean: no other loopd comes.
    machine.shell("systemctl mask --runtime --quiet loopd; systemctl kill --signal=KILL loopd")
    try:
        machine.shell("while systemctl --quiet is-active loopd; do sleep 0.1; done")
        machine.result("systemctl", "stop", "loopd")
        wait_unbound(machine, node)
        settled(machine)
        machine.run("losetup", node, second)
        assert partitions(machine, node) == []
        settled(machine)  # or else udev would read what is not there any more
        machine.run("losetup", "--detach", node)
    finally:
        machine.run("systemctl", "unmask", "--runtime", "--quiet", "loopd")


def test_a_writers_close_leaves_the_partitions_as_they_were(
    machine: Emulated, images: Path
) -> None:
    """udev has the kernel read the table again (BLKRRPART), whose parser makes all of them anew."""
    image = machine.image(make_gpt(images / "gpt"))
    node = attach(machine.alice, image, "-P")
    settled(machine)
    before = partitions(machine, node)
    told = show(machine.alice, node)["partitions"]
    with listening(machine):
        machine.shell(f": 1<>{node}")
        machine.shell(f"until grep -q 'add .*/{name_of(node)}p2 ' {HEARD}; do sleep 0.1; done")
        settled(machine)
    assert partitions(machine, node) == before
    assert show(machine.alice, node)["partitions"] == told
    machine.alice.run("loopctl", "detach", node)
    wait_unbound(machine, node)
    assert partitions(machine, node) == []
