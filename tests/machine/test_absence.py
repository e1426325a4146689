# SPDX-License-Identifier: LGPL-2.1-or-later
"""A loopd that cannot start: loopctl says why, as any user, long before the bus gives up."""

from collections.abc import Iterator

import pytest

from tests.harness.booted import Machine
from tests.harness.loopctl import one_sentence
from tests.harness.unit import CONFIG, NAME, Unit

UNAVAILABLE = 3
# The bus gives up after 25 s, and a machine of tests is slow at times.
ENOUGH = "15"


@pytest.fixture
def broken(machine: Machine, unit: Unit) -> Iterator[Unit]:
    """The unit, to be broken; calls that the bus still keeps for it are served in the end."""
    yield unit
    machine.run("systemctl", "unmask", "--runtime", NAME)
    unit.reset()
    unit.do("start")
    machine.run("loopctl", "list", user="bob")


def said(machine: Machine) -> str:
    """What loopctl says of it to an ordinary user."""
    done = machine.result("timeout", ENOUGH, "loopctl", "list", user="bob")
    assert done.returncode == UNAVAILABLE, done.stdout
    assert one_sentence(done.stdout)
    assert "installed" not in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[limits]\ndevices_per_usr = 3\n", "limits: devices_per_usr: there is no such setting"),
        ("limits = [\n", "Invalid value (at end of document)"),
    ],
    ids=["key", "syntax"],
)
def test_mistakes_in_the_settings_are_told(
    machine: Machine, broken: Unit, settings: str, words: str
) -> None:
    broken.configure(settings)
    assert f"loopd cannot start: {CONFIG}: {words}" in said(machine)
    # Whoever comes next is not even a reason for the bus to ask for another start.
    assert words in said(machine)


def test_a_loopd_that_fails_at_each_start_is_told(machine: Machine, broken: Unit) -> None:
    broken.change("[Service]\nTemporaryFileSystem=/usr/lib/python3/dist-packages\n")
    text = said(machine)
    assert "fails when it starts" in text
    assert "'journalctl -u loopd'" in text
    assert any("ModuleNotFoundError" in line for line in broken.log())


def test_a_unit_that_systemd_has_given_up_is_told(machine: Machine, broken: Unit) -> None:
    broken.change("[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=1\n")
    broken.configure("limits = [\n")
    assert machine.result("systemctl", "start", NAME).returncode != 0
    assert "Invalid value (at end of document)" in said(machine)
    assert any("repeated too quickly" in line for line in broken.log("--lines=20"))


def test_a_unit_that_is_masked_is_told(machine: Machine, broken: Unit) -> None:
    machine.run("systemctl", "mask", "--runtime", NAME)
    assert "'systemctl unmask loopd'" in said(machine)


def test_a_unit_whose_conditions_are_not_met_is_told(machine: Machine, broken: Unit) -> None:
    broken.change("[Unit]\nConditionPathExists=/nothing/here\n")
    assert "'systemctl status loopd'" in said(machine)
