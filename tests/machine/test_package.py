# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package is installed, upgraded under running devices, removed and purged."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import loops, package
from tests.harness.booted import Machine
from tests.harness.logins import Login, Stranger
from tests.harness.roots import Release
from tests.harness.unit import Unit
from tests.machine.crowd import gather

MANAGER = "org.example.Loop1"
MANAGER_PATH = "/org/example/Loop1"


def traces(machine: Machine) -> set[str]:
    """All of loopd's that is in the machine, and its users."""
    where = "/etc /usr /var/lib /run /lib/systemd".split()
    # What udev has to say of devices comes and goes by itself.
    others = "( -path /run/udev -o -path /var/lib/dpkg ) -prune -o".split()
    found = machine.run("find", *where, "-xdev", *others, "-iname", "*loop*", "-print")
    return {*found.splitlines(), *machine.run("getent", "passwd").splitlines()}


@pytest.fixture(scope="module")
def bare_machine(release: Release, root: Path) -> Iterator[Machine]:
    """A machine without the package."""
    with package.machine_without(release, root) as booted:
        yield booted


@pytest.fixture(scope="module")
def before(bare_machine: Machine) -> set[str]:
    """What there is without the package."""
    return traces(bare_machine)


@pytest.fixture(scope="module")
def machine(bare_machine: Machine, before: set[str], packages: list[Path]) -> Machine:
    """The machine with the package, looked at before that."""
    package.install(bare_machine, packages[0])
    return bare_machine


def test_an_installation_starts_nothing_and_an_upgrade_keeps_all(
    machine: Machine,
    unit: Unit,
    packages: list[Path],
    login: Callable[..., Login],
    stranger: Callable[..., Stranger],
) -> None:
    assert unit.show("ActiveState") == "inactive"
    crowd = gather(machine, unit, login, stranger)
    pid = unit.pid
    version = crowd.root.get(MANAGER_PATH, "Version", interface=MANAGER)
    package.install(machine, packages[1])
    unit.wait_successor(pid)
    assert crowd.root.get(MANAGER_PATH, "Version", interface=MANAGER) == f"{version}+test1"
    crowd.require_unchanged()
    package.install(machine, packages[0])  # back again
    crowd.require_unchanged()
    assert crowd.root.get(MANAGER_PATH, "Version", interface=MANAGER) == version
    crowd.disperse()


def test_a_removal_leaves_what_is_to_stay(
    machine: Machine, unit: Unit, packages: list[Path], stranger: Callable[..., Stranger]
) -> None:
    root = stranger("root")
    attached = root.attach(machine.image("disk.img", owner="root"), lifetime="system")
    before = root.get_all(attached.path)
    machine.run("dpkg", "--purge", "loopd")
    assert loops.loop_is_bound(attached.number, attached.diskseq)
    package.install(machine, packages[0])
    assert root.get_all(attached.path) == before
    assert root.detach(attached.path)


def test_a_configuration_outlives_a_removal_and_a_purge_leaves_nothing(
    machine: Machine, unit: Unit, before: set[str], alice: Login
) -> None:
    unit.configure("idle_timeout = 100\n")
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    machine.run("dpkg", "--remove", "loopd")
    loops.wait_unbound(attached.number, attached.diskseq)
    assert machine.path("/etc/loopd.toml").exists()
    machine.run("dpkg", "--purge", "loopd")
    assert traces(machine) - before == set()
    assert MANAGER not in machine.run("busctl", "list", "--activatable")
