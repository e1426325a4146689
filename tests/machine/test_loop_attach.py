# SPDX-License-Identifier: LGPL-2.1-or-later
"""loop-attach@.service: a unit for a device, and units that want it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.caller import Caller
from tests.harness.images import make_ext4
from tests.harness.unit import Unit

CONSUMER = """
[Unit]
Requires={unit}
After={unit}
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mkdir -p /run/consumer
ExecStart=mount /dev/disk/by-loop-ref/image /run/consumer
ExecStop=umount /run/consumer
"""


@pytest.fixture
def attaching(machine: Machine, unit: Unit) -> Iterator[tuple[str, Path]]:
    """The unit for an image with a file system, and the image."""
    image = machine.image("my disk.img", make_ext4, owner="root")
    name = machine.run("systemd-escape", "--path", "--template=loop-attach@.service", image).strip()
    drop_in = '[Service]\nEnvironment="LOOPCTL_OPTIONS=--loop-ref=image"\n'
    machine.write("/run/systemd/system/loop-attach@.service.d/options.conf", drop_in)
    machine.write("/run/systemd/system/consumer.service", CONSUMER.format(unit=name))
    machine.run("systemctl", "daemon-reload")
    yield name, image
    machine.result("systemctl", "stop", "consumer.service", name)
    machine.result("systemctl", "reset-failed", "consumer.service", name)


def bound_to(image: Path) -> loops.BoundLoop | None:
    found = [each for each in loops.bound_loops().values() if each.backing_file == str(image)]
    return found[0] if found else None


def test_a_device_is_there_for_as_long_as_the_unit(
    machine: Machine, attaching: tuple[str, Path]
) -> None:
    name, image = attaching
    machine.run("systemctl", "start", "consumer.service")
    loop = bound_to(image)
    assert loop
    source = machine.run("findmnt", "--noheadings", "--output=SOURCE", "/run/consumer").strip()
    assert source == loop.node
    # Who wants the device is stopped first, and the device is gone when systemctl says so.
    machine.run("systemctl", "stop", name)
    assert machine.result("systemctl", "is-active", "consumer.service").stdout == "inactive\n"
    assert machine.result("findmnt", "/run/consumer").returncode != 0
    assert bound_to(image) is None


def test_a_user_who_may_read_the_image_does_not_stop_it(
    machine: Machine, attaching: tuple[str, Path], alice: Caller
) -> None:
    """Blocking an image's owner: the unit would not have been started again."""
    name, image = attaching
    machine.run("chmod", "0644", image)
    theirs = alice.attach(image, "r")
    machine.run("systemctl", "start", "consumer.service")
    source = machine.run("findmnt", "--noheadings", "--output=SOURCE", "/run/consumer").strip()
    assert source != theirs.node
    machine.run("systemctl", "stop", name)
    assert alice.get(theirs.path, "State") == "attached"


@pytest.mark.parametrize("verb", ["restart", "kill"])
def test_a_new_loopd_is_none_of_its_business(
    machine: Machine, unit: Unit, attaching: tuple[str, Path], verb: str
) -> None:
    name, image = attaching
    machine.run("systemctl", "start", "consumer.service")
    loop, pid = bound_to(image), unit.pid
    since = machine.run("systemctl", "show", "--property=ActiveEnterTimestampMonotonic", name)
    if verb == "restart":
        unit.do("restart")
    else:
        unit.kill("KILL")
    unit.wait_successor(pid)
    assert bound_to(image) == loop
    assert machine.run("findmnt", "/run/consumer")
    assert since == machine.run(
        "systemctl", "show", "--property=ActiveEnterTimestampMonotonic", name
    )
    machine.run("systemctl", "stop", "consumer.service", name)
    assert bound_to(image) is None


def test_a_file_that_is_not_there_is_said(machine: Machine, unit: Unit) -> None:
    name = "loop-attach@nothing-here.service"
    assert machine.result("systemctl", "start", name).returncode != 0
    machine.run("journalctl", "--sync")
    log = machine.run("journalctl", f"--unit={name}", "--output=cat")
    assert "/nothing/here" in log
    machine.run("systemctl", "stop", name)
    machine.result("systemctl", "reset-failed", name)


@pytest.mark.parametrize(
    "file",
    [
        "${HOME} and $HOME.img",
        "a \"b\" 'c' %h \\n;.img",
        "long-" * 20 + ".img",
        "new\nline \x1b[31m.img",
        "-r $$ %% {} *.img",
    ],
)
def test_the_file_is_that_of_the_instance_whatever_its_name(machine: Machine, file: str) -> None:
    image = machine.image(file, make_ext4, owner="root")
    name = machine.run("systemd-escape", "--path", "--template=loop-attach@.service", image).strip()
    machine.run("systemctl", "start", "--", name)
    try:
        assert bound_to(image)
    finally:
        machine.run("systemctl", "stop", "--", name)
