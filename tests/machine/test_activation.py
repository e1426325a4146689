# SPDX-License-Identifier: LGPL-2.1-or-later
"""The installed package on a system that runs: the bus starts loopd, polkit's defaults decide."""

from collections.abc import Callable

import pytest

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.caller import Caller
from tests.harness.images import MIB, pattern
from tests.harness.logins import Login, Stranger
from tests.harness.unit import Unit
from tests.harness.wire import CallError

MANAGER = ["org.example.Loop1", "/org/example/Loop1", "org.example.Loop1"]
REFUSED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


def test_a_user_at_the_machine_gets_a_device_from_the_first_call_on(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    assert unit.pid == 0
    disk = machine.image("disk.img", owner="alice")
    attached = alice.attach(disk, partition_scan=True)
    assert unit.pid != 0
    nodes = machine.run("sh", "-c", f"ls {attached.node} {attached.node}p*").split()
    assert nodes == [attached.node, f"{attached.node}p1", f"{attached.node}p2"]
    # The node is root's and the disk group's; the owner asks for an fd.
    with pytest.raises(PermissionError):
        alice.open(attached.node)
    opened = alice.open_device(attached.path, "r", partition=2)
    assert opened.read(4096) == pattern(2 * MIB, 4096)
    opened.close()
    assert alice.detach(attached.path)
    assert not loops.loop_is_bound(attached.number, attached.diskseq)


@pytest.mark.parametrize("first_call", ["Version", "Attach"])
def test_the_end_of_its_program_ends_a_device(
    machine: Machine, alice: Login, first_call: str
) -> None:
    if first_call == "Version":
        alice.get("/org/example/Loop1", "Version", interface="org.example.Loop1")
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    alice.kill()
    loops.wait_unbound(attached.number, attached.diskseq)


def refuses(caller: Caller, machine: Machine, owner: str) -> None:
    disk = machine.image(f"{owner}.img", owner=owner)
    with pytest.raises(CallError) as caught:
        caller.attach(disk)
    assert caught.value.name == REFUSED


def test_who_is_not_at_the_machine_needs_an_administrator(
    machine: Machine, login: Callable[..., Login], stranger: Callable[..., Stranger]
) -> None:
    refuses(stranger("alice"), machine, "alice")
    refuses(login("alice", seat=False), machine, "alice")


def test_who_is_at_the_machine_changes(machine: Machine, login: Callable[..., Login]) -> None:
    """Two sessions on one seat, as when users are switched."""
    alice, bob = login("alice"), login("bob")
    for active, other, name in ((bob, alice, "alice"), (alice, bob, "bob")):
        machine.run("loginctl", "activate", active.session)
        refuses(other, machine, name)
        active.attach(machine.image(f"{active.session}.img", owner="root"), mode="r")


def test_root_needs_nobody(machine: Machine, stranger: Callable[..., Stranger]) -> None:
    stranger("root").attach(machine.image("disk.img", owner="root"), partition_scan=True)


# What the README shows


def test_busctl_without_fds(machine: Machine, alice: Login) -> None:
    attached = alice.attach(machine.image("disk.img", owner="alice"))
    devices = machine.run("busctl", "call", *MANAGER, "ListDevices", user="bob")
    assert attached.path in devices
    found = machine.run("busctl", "call", *MANAGER, "GetDeviceByNode", "s", attached.node)
    assert found.split() == ["o", f'"{attached.path}"']


def test_busctl_passes_fds(machine: Machine, unit: Unit, alice: Login) -> None:
    disk = machine.image("disk.img", owner="alice")
    call = " ".join(["busctl", "call", *MANAGER])
    attach = f"{call} Attach 'ha{{sv}}' 5 1 lifetime s user 5<>{disk}"
    if machine.release.systemd < 257:
        assert "UNIX file descriptor not supported" in machine.result("sh", "-c", attach).stdout
        return
    # Its connection ends with it, and alice's session does not.
    kind, path, _, _ = alice.run("sh", "-c", attach).split()
    assert kind == "ost"
    found = machine.run("sh", "-c", f"{call} GetDevice h 5 5<{disk}", user="alice")
    assert found.split() == ["o", path]
    assert alice.get(path.strip('"'), "Lifetime") == "user"
    assert alice.run("sh", "-c", f"{call} Detach 'ha{{sv}}' 5 0 5<{disk}").split() == ["b", "true"]


@pytest.mark.usefixtures("unit")
def test_loopctl(machine: Machine) -> None:
    disk = machine.image("disk.img", owner="root")
    printed = machine.run("loopctl", "run", "-P", disk, "--", "sh", "-c", "echo {}; ls {}p*")
    node, *partitions = printed.split()
    assert partitions == [f"{node}p1", f"{node}p2"]
    loops.wait_unbound(int(node.removeprefix("/dev/loop")))
