# SPDX-License-Identifier: LGPL-2.1-or-later
"""udisks2 mounts a user's image for its owner: nosuid and nodev, whatever fstab says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.emulated import Emulated, Session
from tests.harness.images import make_ext4
from tests.kernel.steps import attach, settled, smoking, wait_unbound

LABEL, UUID = "backup", "6c8c6c0e-3b0a-4b0e-9d3c-0c6f5c1f7f10"
LINES = {
    "no line": "",
    "its label": f"LABEL={LABEL}",
    "its uuid": f"UUID={UUID}",
    "its link": f"/dev/disk/by-label/{LABEL}",
}


@pytest.fixture
def fstab(machine: Emulated) -> Iterator[str]:
    """The machine's, which is as it was in the end."""
    path = "/etc/fstab"
    before = machine.run("cat", path)
    yield path
    machine.write(path, before.encode())


def write_line(machine: Emulated, fstab: str, source: str) -> None:
    """Have a line in it whose options would give away root."""
    line = f"{source} /mnt/backup ext4 noauto,nofail,suid,dev 0 0\n" if source else ""
    machine.write(fstab, line.encode())


def options(machine: Emulated, node: str) -> set[str]:
    """How a device is mounted; nothing if it is not."""
    done = machine.result("findmnt", "--noheadings", "--output=VFS-OPTIONS", node)
    return set(done.stdout.strip().split(",")) - {""}


def udisksctl(session: Session, verb: str, node: str) -> tuple[int, str]:
    """Do something with a filesystem, once udisks2 has seen it."""
    session.shell(
        f"until udisksctl info -b {node} | grep -q UDisks2.Filesystem:; do sleep 0.3; done"
    )
    done = session.result("udisksctl", verb, "--no-user-interaction", "-b", node)
    return done.returncode, done.stdout


@pytest.mark.parametrize("source", smoking(LINES, "its label"))
def test_the_owner_mounts_without_set_id_programs_and_devices(
    machine: Emulated, images: Path, fstab: str, source: str
) -> None:
    """Lines of fstab."""
    image = machine.image(make_ext4(images / "ext4", label=LABEL, uuid=UUID))
    write_line(machine, fstab, LINES[source])
    node = attach(machine.alice, image)
    settled(machine)
    status, output = udisksctl(machine.alice, "mount", node)
    assert status == 0, output
    assert {"nosuid", "nodev"} <= options(machine, node)
    assert udisksctl(machine.alice, "unmount", node)[0] == 0
    machine.alice.run("loopctl", "detach", node)


def test_the_owner_does_not_mount_what_fstab_names(
    machine: Emulated, images: Path, fstab: str
) -> None:
    """Lines of fstab: of the node itself."""
    image = machine.image(make_ext4(images / "ext4", label=LABEL, uuid=UUID))
    node = attach(machine.alice, image)
    settled(machine)
    write_line(machine, fstab, node)
    status, output = udisksctl(machine.alice, "mount", node)
    assert status != 0
    assert "NotAuthorized" in output
    assert not options(machine, node)
    machine.alice.run("loopctl", "detach", node)


def test_roots_is_mounted_as_fstab_says(machine: Emulated, images: Path, fstab: str) -> None:
    """The control: udisks2 heeds these lines, and such a device is not for a user to mount."""
    image = machine.image(make_ext4(images / "ext4", label=LABEL, uuid=UUID))
    machine.run("mkdir", "--parents", "/mnt/backup")
    write_line(machine, fstab, f"LABEL={LABEL}")
    node = attach(machine, image)
    settled(machine)
    assert "NotAuthorized" in udisksctl(machine.alice, "mount", node)[1]
    status, output = udisksctl(machine, "mount", node)
    assert status == 0, output
    assert not {"nosuid", "nodev"} & options(machine, node)
    machine.run("umount", node)
    machine.run("loopctl", "detach", node)
    wait_unbound(machine, node)
