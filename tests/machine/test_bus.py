# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus is restarted under everybody's feet."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import loops, package
from tests.harness.booted import Machine
from tests.harness.logins import Login, Stranger
from tests.harness.roots import Release
from tests.harness.unit import Unit
from tests.machine.crowd import gather


@pytest.fixture(scope="module")
def machine(release: Release, root: Path, packages: list[Path]) -> Iterator[Machine]:
    """One of its own: who else was on the bus may not have come back."""
    with package.machine_with(release, root, packages[0]) as booted:
        yield booted


def test_with_the_bus_go_the_leases_of_its_connections(
    machine: Machine,
    unit: Unit,
    login: Callable[..., Login],
    stranger: Callable[..., Stranger],
) -> None:
    crowd = gather(machine, unit, login, stranger)
    pid = unit.pid
    machine.run("systemctl", "restart", "dbus.service")
    # Which does not always come back to the bus by itself.
    machine.run("systemctl", "restart", "systemd-logind.service")
    unit.wait_successor(pid)
    for attached in (crowd.bare, crowd.carols):
        loops.wait_unbound(attached.number, attached.diskseq)
    # The Hold keeps it, and ends with the program that has it.
    assert loops.loop_is_bound(crowd.connection.number, crowd.connection.diskseq)
    crowd.alice.close()
    loops.wait_unbound(crowd.connection.number, crowd.connection.diskseq)
    # Her last session has ended, too.
    loops.wait_unbound(crowd.user.number, crowd.user.diskseq)
    crowd.root = stranger("root")
    crowd.require_kept()
