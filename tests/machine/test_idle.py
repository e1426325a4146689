# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd leaves when there is nothing to do, and systemd thinks nothing of it."""

from tests.harness.booted import Machine
from tests.harness.logins import Login
from tests.harness.unit import CONFIG, Unit


def test_it_leaves_by_itself_and_comes_back_when_called(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    unit.configure("idle_timeout = 1\n")
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    first = unit.pid
    assert alice.detach(attached.path)
    unit.wait_end()
    assert (unit.show("ActiveState"), unit.show("Result")) == ("inactive", "success")
    assert unit.show("NRestarts") == "0"
    alice.attach(machine.image("disk.img", owner="alice"))
    assert unit.pid not in (0, first)


def test_a_mistake_in_the_settings_is_said_and_not_tried_again(
    machine: Machine, unit: Unit
) -> None:
    unit.configure("idle_timeuot = 1\n")
    assert machine.result("systemctl", "start", "loopd.service").returncode != 0
    assert (unit.show("ActiveState"), unit.show("NRestarts")) == ("failed", "0")
    said = [line for line in unit.log() if CONFIG in line and "idle_timeuot" in line]
    assert said
