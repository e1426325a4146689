# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd on Debian's kernels, with their parsers, their modules and what they assemble.

Each case asks for what is, after everything has come to rest; none asks how long it took.
"""

import json
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.emulated import Emulated, Session
from tests.harness.images import MIB, make_ext4, make_gpt, make_mbr, make_plain, make_sparse

NODE = re.compile(r"/dev/loop\d+")


def attach(session: Session, image: str, *options: str) -> str:
    """Attach an image; return the device's node."""
    node = session.run("loopctl", "attach", *options, image).split()[0]
    assert NODE.fullmatch(node)
    return node


def settled(machine: Emulated) -> None:
    machine.run("udevadm", "settle", "--timeout=250")


def show(session: Session, node: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(session.run("loopctl", "show", "--json", node))
    return told


def unbound(machine: Emulated) -> set[str]:
    """Devices that are there for nothing."""
    script = "for d in /sys/block/loop*; do [ -e $d/loop ] || echo ${d##*/}; done"
    return set(machine.shell(script).split())


def partitions(machine: Emulated, node: str) -> list[tuple[int, int, int]]:
    """Number, first sector and count of sectors of the partitions that the kernel has."""
    name = node.removeprefix("/dev/")
    script = f"for p in /sys/block/{name}/{name}p*; do [ -e $p ] || continue; "
    script += "echo $(cat $p/partition $p/start $p/size); done"
    rows = [line.split() for line in machine.shell(script).splitlines()]
    return sorted((int(number), int(start), int(size)) for number, start, size in rows)


def properties(machine: Emulated, node: str) -> dict[str, str]:
    """What udev's database has of a device."""
    settled(machine)
    told = machine.run("udevadm", "info", "--query=property", node)
    return dict(line.split("=", 1) for line in told.splitlines())


# --- what the driver of this kernel is like


def test_the_first_call_starts_loopd(machine: Emulated) -> None:
    told = machine.run(
        *("busctl", "get-property", "org.example.Loop1", "/org/example/Loop1"),
        *("org.example.Loop1", "MaxDevices"),
    )
    assert told == "u 1024\n"
    assert machine.run("systemctl", "is-active", "loopd") == "active\n"
    assert machine.run("uname", "-r").strip() == machine.kernel


def test_a_user_attaches_grows_and_detaches(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain", MIB))
    node = attach(machine.alice, image)
    assert machine.run("blockdev", "--getsize64", node) == f"{MIB}\n"
    assert machine.run("cmp", image, node) == ""
    machine.run("truncate", "--size=2M", image)
    machine.alice.run("loopctl", "resize", node)
    assert machine.run("blockdev", "--getsize64", node) == f"{2 * MIB}\n"
    machine.alice.run("loopctl", "detach", node)
    assert node not in machine.run("losetup", "--list")


def test_a_killed_client_leaves_nothing(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    node = machine.alice.shell(
        f"loopctl hold {image} >/tmp/node & holder=$!\n"
        "until [ -s /tmp/node ]; do sleep 0.1; done; cat /tmp/node; kill -9 $holder"
    ).split()[0]
    machine.shell(f"while losetup {node}; do sleep 0.1; done")


def test_a_killed_loopd_loses_nothing(machine: Emulated, images: Path) -> None:
    image = machine.image(make_gpt(images / "gpt"))
    node = attach(machine.alice, image, "-P")
    before = show(machine.alice, node)
    pid = machine.run("systemctl", "show", "--value", "--property=MainPID", "loopd").strip()
    machine.run("systemctl", "kill", "--signal=KILL", "loopd")
    after = show(machine.alice, node)
    assert after["diskseq"] == before["diskseq"]
    assert after["partitions"] == before["partitions"]
    assert machine.run("systemctl", "show", "--value", "--property=MainPID", "loopd").strip() != pid
    machine.alice.run("loopctl", "detach", node)


def test_a_hold_keeps_the_device(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    script = f"""
import asyncio
from loopd.client import Client

async def main():
    async with await Client.connect() as client:
        device = await client.attach({image!r})
        hold = await device.hold()
        node = device.node
    async with await Client.connect() as client:
        print(len([device for device, _ in await client.devices() if device.node == node]))
        hold.close()

asyncio.run(main())
"""
    told = machine.alice.run("env", "PYTHONPATH=/usr/lib/loopd", "/usr/bin/python3", "-c", script)
    assert told == "1\n"
    machine.shell(f"while losetup --list --noheadings | grep {image}; do sleep 0.1; done")


def test_open_is_for_root_alone_before_6_11(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    node = attach(machine.alice, image)
    command = ["loopctl", "open", node, "--", "sh", "-c", "head -c 512 <&$LOOPFD | wc -c"]
    done = machine.alice.result(*command)
    if machine.version < (6, 11):
        assert done.returncode != 0
        assert "6.11" in done.stdout
    else:
        assert (done.returncode, done.stdout) == (0, "512\n")
    assert machine.run(*command) == "512\n"


def test_a_mounted_device_goes_lazily_and_its_number_is_clean(
    machine: Emulated, images: Path
) -> None:
    image = machine.image(make_ext4(images / "ext4"), owner="root")
    node = attach(machine, image)
    machine.shell(f"mkdir -p /mnt/test && mount -o nosuid,nodev {node} /mnt/test")
    assert machine.result("loopctl", "detach", node).returncode != 0
    machine.run("loopctl", "detach", "--lazy", node)
    machine.run("test", "-e", "/mnt/test/lost+found")
    machine.run("umount", "/mnt/test")
    machine.shell(f"while losetup {node}; do sleep 0.1; done")


def test_500_pairs_leave_no_devices(machine: Emulated, images: Path) -> None:
    """What is made and not removed does not grow; udevd looks at every device meanwhile."""
    image = machine.image(make_plain(images / "plain"))
    before = unbound(machine)
    script = f"""
import asyncio
from loopd.client import Client

async def main():
    async with await Client.connect() as client:
        for _ in range(500):
            device = await client.attach({image!r})
            await device.detach()

asyncio.run(main())
"""
    machine.alice.run("env", "PYTHONPATH=/usr/lib/loopd", "/usr/bin/python3", "-c", script)
    assert len(unbound(machine) - before) <= 8
    assert before <= unbound(machine)


def test_what_the_module_made_stays(machine: Emulated, images: Path) -> None:
    """loop0 to loop7 are there from the start, and others name them."""
    made = {f"loop{number}" for number in range(8)}
    assert made <= unbound(machine)
    image = machine.image(make_plain(images / "plain"))
    nodes = [attach(machine.alice, image, "-r") for _ in range(10)]
    machine.alice.run("loopctl", "detach", *nodes)
    machine.run("systemctl", "stop", "loopd")
    settled(machine)
    assert made <= unbound(machine)


# --- partitions


def isohybrid(path: Path) -> Path:
    """An image as distributions ship them: an ISO whose first sector is an MBR."""
    tree, boot = path.with_name("tree"), path.with_name("mbr")
    tree.mkdir()
    (tree / "file").write_bytes(bytes(MIB))
    boot.write_bytes(bytes(432))
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", path, "-isohybrid-mbr", boot]
    command += ["-partition_offset", "0", "-append_partition", "2", "0xef", tree / "file", tree]
    subprocess.run(command, check=True, capture_output=True)
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


@pytest.mark.parametrize("table", TABLES)
def test_partitions_are_made_once_and_not_by_the_kernels_parser(
    machine: Emulated, images: Path, table: str
) -> None:
    make, options = TABLES[table]
    image = machine.image(make(images / "image"))
    machine.shell(
        "rm -f /run/heard; systemd-run --quiet --unit=heard --property=StandardOutput=file:/run/heard "
        "udevadm monitor --kernel --subsystem-match=block\n"
        "until grep -q KERNEL /run/heard; do sleep 0.1; done"
    )
    try:
        node = attach(machine.alice, image, "-P", *options)
        settled(machine)
        made = partitions(machine, node)
        told = show(machine.alice, node)["partitions"]
    finally:
        machine.run("systemctl", "stop", "heard")
    assert [each["number"] for each in told] == [number for number, _, _ in made]
    name = node.removeprefix("/dev/")
    heard = re.findall(rf"(\w+)\s+\S*/({name}p\d+) ", machine.run("cat", "/run/heard"))
    assert sorted(heard) == sorted(("add", f"{name}p{number}") for number, _, _ in made)
    # The parser says what it has found.
    assert not re.search(rf"\b{name}:", machine.run("dmesg"))


def test_a_rescan_finds_partitions_with_and_without_partscan(
    machine: Emulated, images: Path
) -> None:
    image = machine.image(make_gpt(images / "gpt"))
    for options in ((), ("-P",)):
        node = attach(machine.alice, image, *options)
        number = node.removeprefix("/dev/loop")
        told = machine.alice.python(
            "import asyncio\nfrom loopd.client import Client\n"
            "async def main():\n"
            "    async with await Client.connect() as client:\n"
            f"        device = await client.device_by_node('{node}')\n"
            "        print(len(await device.rescan_partitions()))\n"
            "asyncio.run(main())"
        )
        assert told == "2\n"
        assert [each[0] for each in partitions(machine, node)] == [1, 2]
        # Else they would outlive the device if loopd were killed now.
        assert machine.run("cat", f"/sys/block/loop{number}/loop/partscan") == "1\n"
        machine.alice.run("loopctl", "detach", node)


def test_the_next_image_is_clean_after_a_kill(machine: Emulated, images: Path) -> None:
    first = machine.image(make_gpt(images / "first"))
    second = machine.image(make_plain(images / "second", 4 * MIB))
    node = attach(machine.alice, first, "-P")
    machine.shell("systemctl kill --signal=KILL loopd; systemctl stop loopd || true")
    machine.result("losetup", "--detach", node)
    settled(machine)
    machine.run("losetup", node, second)
    try:
        assert partitions(machine, node) == []
    finally:
        machine.run("losetup", "--detach", node)


# --- nothing of a user's image reaches the system by itself


def members(machine: Emulated) -> dict[str, list[str]]:
    """Commands that make an image what would be assembled, and show whether it was."""
    return {
        "lvm": ["pvcreate -qq {0} && vgcreate -qq testvg {0} && lvcreate -qq -an -l 1 -n v testvg"],
        "md": [
            "mdadm --create /dev/md/test --run --metadata=1.2 --level=1 -n1 --force {0}; mdadm --stop --scan"
        ],
        "btrfs": ["mkfs.btrfs -q -f {0}"],
        "luks": [
            "printf key | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {0} -"
        ],
    }


ASSEMBLED = {
    "lvm": "test -e /dev/testvg/v",
    "md": "grep -q ^md /proc/mdstat",
    "btrfs": "btrfs filesystem show -d | grep -q {0}",
}


@pytest.mark.parametrize("kind", ["lvm", "md", "btrfs", "luks"])
def test_a_users_member_is_left_alone(machine: Emulated, kind: str) -> None:
    image = f"/home/alice/{kind}"
    machine.shell(f"truncate --size=128M {image}; chown alice: {image}")
    node = machine.run("losetup", "--find", "--show", image).strip()
    for command in members(machine)[kind]:
        machine.shell(command.format(node))
    machine.run("losetup", "--detach", node)
    settled(machine)
    node = attach(machine.alice, image)
    found = properties(machine, node)
    assert not [
        key for key in found if key.startswith(("ID_FS_UUID", "ID_FS_LABEL", "ID_PART_ENTRY_"))
    ]
    assert "by-uuid" not in found.get("DEVLINKS", "")
    if kind in ASSEMBLED:
        assert machine.result("sh", "-c", ASSEMBLED[kind].format(node)).returncode != 0
    machine.alice.run("loopctl", "detach", node)
