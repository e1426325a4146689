# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's file under systemd: a mistake in it takes no device away, and is told."""

from pathlib import Path

from tests.harness import loops, package
from tests.harness.booted import Machine
from tests.harness.caller import Attached, Caller
from tests.harness.logins import Login
from tests.harness.unit import CONFIG, NAME, Unit

WRONG = "[limits]\ndevices_per_usr = 3\nholds_per_user = 7\n"
MISTAKE = f"{CONFIG}: limits: devices_per_usr: there is no such setting"


def configuration_error(caller: Caller) -> str:
    found = caller.get("/org/example/Loop1", "ConfigurationError", "org.example.Loop1")
    assert isinstance(found, str)
    return found


def attach(machine: Machine, caller: Caller) -> Attached:
    return caller.attach(machine.image("disk.img", owner="alice"), partition_scan=True)


def require_kept(caller: Caller, attached: Attached) -> None:
    """The device, its partitions and its object are there."""
    assert loops.loop_is_bound(attached.number, attached.diskseq)
    properties = caller.get_all(attached.path)
    assert (properties["State"], properties["Managed"]) == ("attached", True)
    assert len(properties["Partitions"]) == 2


def test_a_wrong_key_and_a_restart_lose_no_device_and_are_told(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    """Settings that destroy."""
    attached = attach(machine, alice)
    unit.configure(WRONG)
    for do in (lambda: unit.do("restart"), unit.kill):
        pid = unit.pid
        do()
        unit.wait_successor(pid)
        require_kept(alice, attached)
        assert unit.show("StatusText").endswith(MISTAKE)
        assert MISTAKE in machine.run("systemctl", "status", "--no-pager", "--lines=0", NAME)
        assert any(MISTAKE in line for line in unit.log("--priority=err", "--lines=20"))
        assert configuration_error(alice) == MISTAKE
        (line,) = machine.run("loopctl", "list", "--noheadings", "--output=NAME").splitlines()[:1]
        assert MISTAKE in line
        assert MISTAKE not in machine.run("loopctl", "list", user="alice")
    unit.configure("")
    pid = unit.pid
    unit.do("reload")
    unit.wait_successor(pid)
    require_kept(alice, attached)
    assert (unit.show("StatusText"), configuration_error(alice)) == ("", "")


def test_a_reload_takes_right_settings_and_leaves_wrong_ones(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    attached = attach(machine, alice)
    pid = unit.pid
    unit.configure(WRONG)
    assert machine.result("systemctl", "reload", NAME).returncode != 0
    assert unit.pid == pid
    assert any(MISTAKE in line for line in unit.log("--lines=20"))
    unit.configure("[limits]\ndevices = 7\n")
    unit.do("reload")
    unit.wait_successor(pid)
    require_kept(alice, attached)
    assert alice.get("/org/example/Loop1", "MaxDevices", "org.example.Loop1") == 7


def test_an_upgrade_that_does_not_take_the_settings_restarts_nothing(
    machine: Machine, unit: Unit, packages: list[Path], alice: Login
) -> None:
    attached = attach(machine, alice)
    pid = unit.pid
    unit.configure(WRONG)
    package.install(machine, packages[0])
    assert unit.pid == pid
    unit.configure("")
    package.install(machine, packages[0])
    unit.wait_successor(pid)
    require_kept(alice, attached)


def test_with_nothing_to_take_back_a_mistake_stops_the_start(machine: Machine, unit: Unit) -> None:
    unit.configure(WRONG)
    assert machine.result("systemctl", "start", NAME).returncode != 0
    assert (unit.show("ActiveState"), unit.show("ExecMainStatus")) == ("failed", "78")
    assert unit.show("NRestarts") == "0"
