# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing of a user's image reaches the system by itself, where all is there that would take it."""

from pathlib import Path

import pytest

from tests.harness.emulated import Emulated
from tests.harness.images import MIB, make_ext4, make_gpt
from tests.kernel.steps import at_rest, attach, properties, settled, smoking, wait_unbound

MEMBERS = {
    # While udev waits: else it has the volume activated.
    "lvm": "udevadm control --stop-exec-queue\n"
    "pvcreate -qq {0}; vgcreate -qq testvg {0}; lvcreate -qq -an -Zn -l 1 -n v testvg",
    "md": "mdadm --create /dev/md/test --run --metadata=1.2 --level=1 -n1 --force {0}\n"
    "udevadm settle --timeout=250; mdadm --stop /dev/md/test",
    # Two, because the kernel need not take note of one that is alone.
    "btrfs": "mkfs.btrfs -q -f {0} {1}; btrfs device scan --forget",
    "luks": "printf key | cryptsetup luksFormat -q --pbkdf pbkdf2 "
    "--pbkdf-force-iterations 1000 {0} -",
}
"""What makes a device one that the system would assemble, and leaves it not assembled."""
ASSEMBLED = {
    "lvm": "test -e /dev/testvg/v",
    "md": "grep -q ^md /proc/mdstat",
    # It fails for a device that the kernel has not taken note of.
    "btrfs": "btrfs device scan --forget {0}",
}
DISSOLVE = {"lvm": "vgchange -qq -an testvg", "md": "mdadm --stop --scan", "btrfs": "true"}
WORDS = ("ID_FS_UUID", "ID_FS_LABEL", "ID_PART_ENTRY_UUID", "ID_PART_ENTRY_NAME", "ID_PART_TABLE_U")
"""The keys that an image words, or how they begin."""


def make_member(machine: Emulated, kind: str) -> str:
    """Make an image that is one; return its path."""
    images = [f"/home/alice/{kind}", f"/home/alice/{kind}2"]
    nodes = []
    for image in images:
        machine.shell(f"rm -f {image}; truncate --size=128M {image}; chown alice: {image}")
        nodes.append(machine.run("losetup", "--find", "--show", image).strip())
    script = f"{MEMBERS[kind]}\nlosetup --detach {{0}} {{1}}\nudevadm control --start-exec-queue"
    machine.shell(script.format(*nodes))
    at_rest(machine)
    return images[0]


@pytest.mark.parametrize("kind", smoking(MEMBERS, "lvm", "md"))
def test_a_users_member_is_left_alone(machine: Emulated, kind: str) -> None:
    node = attach(machine.alice, make_member(machine, kind))
    at_rest(machine)
    found = properties(machine, node)
    assert not [key for key in found if key.startswith(WORDS)]
    assert found["LOOPD_UNPRIVILEGED"]
    assert "by-uuid" not in found.get("DEVLINKS", "")
    if kind in ASSEMBLED:
        assert machine.result("sh", "-c", ASSEMBLED[kind].format(node)).returncode != 0
    machine.alice.run("loopctl", "detach", node)


@pytest.mark.parametrize("kind", MEMBERS)
def test_roots_member_is_assembled(machine: Emulated, kind: str) -> None:
    """The control: this machine would have assembled the user's."""
    node = attach(machine, make_member(machine, kind))
    at_rest(machine)
    assert [key for key in properties(machine, node) if key.startswith(WORDS)]
    if kind in ASSEMBLED:
        machine.shell(f"until {ASSEMBLED[kind].format(node)}; do sleep 0.2; done")
        machine.shell(DISSOLVE[kind])
    machine.run("loopctl", "detach", node)
    wait_unbound(machine, node)


@pytest.mark.smoke
def test_udev_keeps_no_word_of_a_users_image(machine: Emulated, images: Path) -> None:
    """Words of an image: of the disk, and of a partition with a filesystem."""
    disk = make_gpt(images / "disk", [(2048, 8192)], 8 * MIB)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(images / "ext4", label="theirs").read_bytes())
    image = machine.image(disk)
    node = attach(machine.alice, image, "-P")
    settled(machine)
    for each in (node, f"{node}p1"):
        found = properties(machine, each)
        assert not [key for key in found if key.startswith(WORDS)]
        assert found["LOOPD_UNPRIVILEGED"]
    machine.alice.run("loopctl", "detach", node)
    wait_unbound(machine, node)
    # Of root's it does.
    node = attach(machine, image, "-P", "-r")
    settled(machine)
    assert properties(machine, f"{node}p1")["ID_FS_LABEL"] == "theirs"
    machine.run("loopctl", "detach", node)
