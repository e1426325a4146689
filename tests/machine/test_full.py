# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd's runtime directory is full, and loopd is killed: what was said before then holds."""

from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.logins import Login
from tests.harness.unit import Unit
from tests.harness.wire import CallError

RUNTIME = "/run/loopd"
FILLING = f"{RUNTIME}/filling"


@pytest.fixture
def small(machine: Machine, unit: Unit) -> Iterator[None]:
    """Have a small file system there, before loopd is started and until it is stopped."""
    machine.run("mkdir", "-p", RUNTIME)
    machine.run("mount", "-t", "tmpfs", "-o", "size=1m,mode=0711", "tmpfs", RUNTIME)
    yield
    unit.reset()
    # Lazily, since udev's rules look in there.
    machine.run("umount", "--lazy", RUNTIME)


def fill(machine: Machine) -> None:
    """Take all the room that there is."""
    with machine.path(FILLING).open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def crash(unit: Unit) -> None:
    pid = unit.pid
    unit.kill("KILL")
    unit.wait_successor(pid)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lifetime", ["connection", "user"])
def test_a_detach_that_could_not_be_written_down_ends(
    machine: Machine, unit: Unit, alice: Login, lifetime: str
) -> None:
    """Killed at any point: a Detach is recorded without any room."""
    attached = alice.attach(machine.image("disk.img", owner="alice"), lifetime=lifetime)
    stays = alice.attach(machine.image("stays.img", owner="alice"), lifetime=lifetime)
    opened = alice.open_device(attached.path, "r")
    fill(machine)
    assert alice.detach(attached.path, lazy=True) is False
    crash(unit)
    assert alice.get(attached.path, "State") == "detaching"
    assert alice.get(stays.path, "State") == "attached"
    opened.close()
    loops.wait_unbound(attached.number, attached.diskseq)
    machine.run("rm", FILLING)
    assert alice.detach(stays.path) is True


@pytest.mark.usefixtures("small")
def test_what_the_next_loopd_would_not_know_of_is_refused(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    stored = unit.stored
    fill(machine)
    for method, arguments in (("Hold", ("a{sv}", {})), ("Lock", ("sa{sv}", "exclusive", {}))):
        with pytest.raises(CallError, match="No space left on device") as caught:
            alice.device(attached.path, method, *arguments)
        assert caught.value.name == "System.Error.ENOSPC"
    unit.wait(lambda: unit.stored == stored, "what was refused to leave the store")
    crash(unit)
    told = alice.get_all(attached.path)
    assert (told["Holds"], told["Locked"], told["State"]) == (0, "none", "attached")
    machine.run("rm", FILLING)
    alice.device(attached.path, "Lock", "sa{sv}", "exclusive", {})
    (hold,) = alice.device(attached.path, "Hold", "a{sv}", {})
    crash(unit)
    told = alice.get_all(attached.path)
    assert (told["Holds"], told["Locked"]) == (1, "exclusive")
    hold.close()
    assert alice.detach(attached.path) is True
