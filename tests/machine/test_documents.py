# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documents show of a booted system: its units and its fstab, and what they do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import loops
from tests.harness.documents import DOCUMENTS, blocks, name, shell
from tests.harness.images import make_ext4

booted = pytest.importorskip("tests.harness.booted")

BOOTED = [
    each for each in DOCUMENTS if any(block.info == "console booted" for block in blocks(each))
]
IMAGE = "/srv/disk.img"


@pytest.fixture
def system(machine: "booted.Machine", unit: object) -> Iterator["booted.Machine"]:
    """A machine with an image, which afterwards has the files it had before."""
    make_ext4(machine.path(IMAGE))
    fstab = machine.result("cat", "/etc/fstab").stdout
    yield machine
    machine.run("systemctl", "stop", "loop-attach@*.service")
    machine.write("/etc/fstab", fstab)
    machine.run("rm", "-f", IMAGE)


@pytest.mark.parametrize("document", BOOTED, ids=name)
def test_its_commands_do_what_it_shows(system: "booted.Machine", document: Path) -> None:
    written = []
    with shell(system.command("bash", "--norc"), cwd="/") as session:
        for block in blocks(document):
            if block.info.startswith(("ini file=", "fstab file=")):
                system.write(block.file, block.text)
                written.append(block.file)
            elif block.info == "console booted":
                for command in block.commands():
                    session.run(command)
    system.run("rm", "-f", *written)
    system.run("systemctl", "daemon-reload")
    assert written
    assert IMAGE not in {loop.backing_file for loop in loops.bound_loops().values()}
