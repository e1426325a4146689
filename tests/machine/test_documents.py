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
SYSTEM_FILES = ("ini file=", "fstab file=")
FILES = [
    str(block.file)
    for document in BOOTED
    for block in blocks(document)
    if block.info.startswith(SYSTEM_FILES)
]


@pytest.fixture
def system(machine: "booted.Machine", unit: object) -> Iterator["booted.Machine"]:
    """A machine with an image, which afterwards has the files it had before."""
    make_ext4(machine.path(IMAGE))
    fstab = machine.result("cat", "/etc/fstab").stdout
    yield machine
    machine.run("systemctl", "stop", "loop-attach@*.service")
    machine.run("rm", "-rf", IMAGE, *(path for path in FILES if path != "/etc/fstab"))
    machine.write("/etc/fstab", fstab)
    machine.run("systemctl", "daemon-reload")


@pytest.mark.parametrize("document", BOOTED, ids=name)
def test_its_commands_do_what_it_shows(system: "booted.Machine", document: Path) -> None:
    with shell(system.command("bash", "--norc"), cwd="/") as session:
        for block in blocks(document):
            if block.info.startswith(SYSTEM_FILES):
                system.write(block.file, block.text)
            elif block.info == "console booted":
                for command in block.commands():
                    session.run(command)
    assert IMAGE not in {loop.backing_file for loop in loops.bound_loops().values()}
