# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users log in and out: what becomes of their devices, with a real logind."""

import os
from collections.abc import Callable

import pytest

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.logins import Login, Stranger
from tests.harness.unit import Unit
from tests.harness.wire import CallError


def is_known(machine: Machine, user: str) -> bool:
    return machine.result("loginctl", "show-user", user).returncode == 0


def test_a_users_device_goes_with_the_last_session(
    machine: Machine, unit: Unit, login: Callable[..., Login]
) -> None:
    first, last = login("alice"), login("alice", seat=False)
    attached = first.attach(machine.image("disk.img", owner="alice"), lifetime="user")
    first.close()
    assert last.get_all(attached.path)["Lifetime"] == "user"
    assert loops.loop_is_bound(attached.number, attached.diskseq)
    last.close()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_hold_keeps_a_device_beyond_that(machine: Machine, unit: Unit, alice: Login) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"), lifetime="user")
    (remote,) = alice.device(attached.path, "Hold", "a{sv}", {})
    # A program of alice's would keep her logged in.
    hold = remote.fetch()
    try:
        alice.close()
        kept = f"the user 1000 has left: {attached.node} is kept by 1 Holds"
        unit.wait(lambda: kept in unit.log(), "the end of the lease")
        assert not is_known(machine, "alice")
        assert loops.loop_is_bound(attached.number, attached.diskseq)
    finally:
        os.close(hold)
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_user_who_lingers_has_not_left(
    machine: Machine, unit: Unit, alice: Login, stranger: Callable[..., Stranger]
) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"), lifetime="user")
    machine.run("loginctl", "enable-linger", "alice")
    try:
        session = alice.session
        alice.close()
        unit.wait(
            lambda: machine.result("loginctl", "show-session", session).returncode != 0,
            "the end of the session",
        )
        assert stranger("root").get(attached.path, "Lifetime") == "user"
        assert loops.loop_is_bound(attached.number, attached.diskseq)
    finally:
        machine.run("loginctl", "disable-linger", "alice")
    loops.wait_unbound(attached.number, attached.diskseq)


def test_whom_logind_does_not_know_cannot_have_one(
    machine: Machine, stranger: Callable[..., Stranger]
) -> None:
    with pytest.raises(CallError) as caught:
        stranger("root").attach(machine.image("disk.img", owner="root"), lifetime="user")
    assert caught.value.name == "org.example.Loop1.Error.NotSupported"


def test_a_connections_device_does_not_wait_for_the_session(
    machine: Machine, alice: Login, login: Callable[..., Login]
) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    alice.disconnect()
    loops.wait_unbound(attached.number, attached.diskseq)
    assert is_known(machine, "alice")
