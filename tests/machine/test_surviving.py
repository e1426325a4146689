# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd is restarted, killed, stopped: what its clients have stays, or goes as promised."""

from collections.abc import Callable

import pytest

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.images import make_ext4
from tests.harness.logins import Login, Stranger
from tests.harness.unit import Unit
from tests.machine.crowd import CROWD_FDS, Crowd, foreign, gather


@pytest.fixture
def crowd(
    machine: Machine,
    unit: Unit,
    login: Callable[..., Login],
    stranger: Callable[..., Stranger],
) -> Crowd:
    """Devices of every kind."""
    return gather(machine, unit, login, stranger)


def restart(unit: Unit) -> None:
    unit.do("restart")


def kill(unit: Unit) -> None:
    unit.kill("KILL")


def hang(unit: Unit) -> None:
    """The watchdog ends what does not say that it is alive."""
    unit.kill("STOP")


@pytest.mark.parametrize("how", [restart, kill, hang])
def test_the_next_loopd_has_what_the_last_one_had(
    machine: Machine, unit: Unit, how: Callable[[Unit], None], request: pytest.FixtureRequest
) -> None:
    if how is hang:
        unit.change("[Service]\nWatchdogSec=2\n")
    crowd: Crowd = request.getfixturevalue("crowd")
    with foreign(machine):
        pid = unit.pid
        how(unit)
        assert unit.wait_successor(pid) != pid
        crowd.require_unchanged()
        assert unit.stored == CROWD_FDS
        crowd.disperse()
        assert unit.stored == 0
    if how is hang:
        assert "watchdog" in machine.run("journalctl", "--unit=loopd.service", "--output=cat")


def test_a_device_can_be_used_while_loopd_is_restarted(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"), partition_scan=True)
    opened = alice.open_device(attached.path, "rw", partition=1)
    pid = unit.pid
    unit.kill("KILL")
    assert opened.write(b"x" * 512) == 512
    opened.evaluate("os.fsync(fd)")
    unit.wait_successor(pid)
    assert opened.read(512) == b"x" * 512
    opened.close()
    assert alice.resize(attached.path) == alice.get(attached.path, "Size")
    assert alice.detach(attached.path)


def test_a_client_that_ends_while_nobody_looks_is_cleaned_up_after(
    machine: Machine, unit: Unit, login: Callable[..., Login]
) -> None:
    first, second = login("alice"), login("alice")
    lost = first.attach(machine.image("lost.img", owner="alice"), partition_scan=True)
    held = first.attach(machine.image("held.img", owner="alice"))
    others = second.attach(machine.image("others.img", owner="alice"))
    (hold,) = second.device(held.path, "Hold", "a{sv}", {})
    pid = unit.pid
    unit.kill("STOP")
    first.kill()
    unit.kill("KILL")
    unit.wait_successor(pid)
    loops.wait_unbound(lost.number, lost.diskseq)
    assert second.get(held.path, "Holds") == 1
    assert second.get(others.path, "Holder") == second.unique_name
    assert loops.loop_is_bound(held.number, held.diskseq)
    hold.close()
    loops.wait_unbound(held.number, held.diskseq)
    assert second.get(others.path, "State") == "attached"


def test_a_hold_that_ends_while_nobody_looks_is_missed_no_more(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    (hold,) = alice.device(attached.path, "Hold", "a{sv}", {})
    pid = unit.pid
    unit.kill("STOP")
    hold.close()
    unit.kill("KILL")
    unit.wait_successor(pid)
    unit.wait(lambda: alice.get(attached.path, "Holds") == 0, "the end of the Hold")
    unit.wait(lambda: unit.stored == 1, "the Hold to leave the store")
    assert alice.get(attached.path, "State") == "attached"


def test_a_user_who_leaves_while_nobody_looks_is_missed(
    machine: Machine, unit: Unit, login: Callable[..., Login]
) -> None:
    alice = login("alice")
    attached = alice.attach(machine.image("disk.img", owner="alice"), lifetime="user")
    pid = unit.pid
    unit.kill("STOP")
    alice.close()
    unit.wait(lambda: "alice" not in machine.run("loginctl", "list-users"), "alice to be gone")
    assert loops.loop_is_bound(attached.number, attached.diskseq)
    unit.kill("KILL")
    unit.wait_successor(pid)
    loops.wait_unbound(attached.number, attached.diskseq)


def test_six_crashes_in_a_row_lose_nothing(unit: Unit, crowd: Crowd) -> None:
    """systemd gives up on a unit after five in ten seconds, and on what it keeps for it."""
    for _ in range(6):
        pid = unit.pid
        unit.kill("KILL")
        unit.wait_successor(pid)
    assert unit.show("NRestarts") == "6"
    crowd.require_unchanged()
    crowd.disperse()


def test_a_stop_ends_all_but_what_is_to_stay(machine: Machine, unit: Unit, crowd: Crowd) -> None:
    with foreign(machine):
        unit.do("stop")
        for attached in crowd.leaving:
            loops.wait_unbound(attached.number, attached.diskseq)
        assert crowd.hold.at_end()
        for attached in crowd.staying:
            assert loops.loop_is_bound(attached.number, attached.diskseq)
        assert unit.pid == 0
        # The call starts it.
        crowd.require_kept(partitions=False)
        assert unit.pid != 0


def test_what_stays_is_taken_back_from_the_records_alone(
    machine: Machine, unit: Unit, stranger: Callable[..., Stranger]
) -> None:
    """After a stop, a kill: nothing of it needs the store."""
    root = stranger("root")
    attached = root.attach(machine.image("disk.img", owner="root"), lifetime="system")
    before = root.get_all(attached.path)
    for verb in ("stop", "start", "restart", "stop"):
        unit.do(verb)
    assert root.get_all(attached.path) == before
    pid = unit.pid
    unit.kill("KILL")
    unit.wait_successor(pid)
    assert root.get_all(attached.path) == before
    assert root.detach(attached.path)


def test_a_mounted_device_outlives_a_stop_and_stays_its_owners(
    machine: Machine, unit: Unit, alice: Login, stranger: Callable[..., Stranger]
) -> None:
    attached = alice.attach(machine.image("disk.img", make_ext4, owner="alice"))
    machine.run("mount", "-o", "ro", attached.node, "/mnt")
    try:
        unit.do("stop")
        assert loops.loop_is_bound(attached.number, attached.diskseq)
        properties = stranger("root").get_all(attached.path)
        assert (properties["Managed"], properties["Owner"]) == (True, 1000)
    finally:
        machine.run("umount", "/mnt")
    loops.wait_unbound(attached.number, attached.diskseq)


def test_systemd_keeps_what_it_has_to_and_nothing_else(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    first = alice.attach(machine.image("first.img", owner="alice"), partition_scan=True)
    assert unit.stored == 1
    second = alice.attach(machine.image("second.img", owner="alice"), lock="shared")
    assert unit.stored == 3
    holds = [alice.device(first.path, "Hold", "a{sv}", {})[0] for _ in range(2)]
    assert unit.stored == 5
    alice.device(first.path, "Lock", "sa{sv}", "exclusive", {})
    assert unit.stored == 6
    alice.device(first.path, "Lock", "sa{sv}", "none", {})
    unit.wait(lambda: unit.stored == 5, "the lock to leave the store")
    holds[0].close()
    unit.wait(lambda: unit.stored == 4, "a Hold to leave the store")
    assert alice.detach(second.path)
    unit.wait(lambda: unit.stored == 2, "a device and its lock to leave the store")
    assert alice.detach(first.path)
    unit.wait(lambda: unit.stored == 0, "a device and its Hold to leave the store")
