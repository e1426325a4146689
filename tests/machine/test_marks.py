# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user's mark outlives its device where no loopd is left to remove it, and stays without effect.

The next device of that number is root's, and udev treats it as such.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.caller import Attached, Caller
from tests.harness.images import make_ext4
from tests.harness.unit import Unit

MARKS = "/run/loopd/unprivileged"

Use = Callable[[Machine, Caller, Attached], AbstractContextManager[None]]


@contextmanager
def mounted(machine: Machine, _: Caller, attached: Attached) -> Iterator[None]:
    machine.run("mount", "-o", "ro", attached.node, "/mnt")
    try:
        yield
    finally:
        machine.run("umount", "/mnt")


@contextmanager
def opened(_: Machine, caller: Caller, attached: Attached) -> Iterator[None]:
    fd = caller.open_device(attached.path, "r")
    try:
        yield
    finally:
        fd.close()


@pytest.fixture
def _can_trigger(machine: Machine) -> Iterator[None]:
    """Have udevadm write to the machine's /sys, which nspawn lets nobody do there."""
    machine.run("mount", "-o", "remount,rw", "/sys/devices")
    yield
    machine.run("mount", "-o", "remount,bind,ro", "/sys/devices")


def stop(unit: Unit) -> None:
    unit.do("stop")


def kill(unit: Unit) -> None:
    unit.kill("KILL")
    unit.wait(lambda: unit.pid == 0, "the end of loopd")


def marks(machine: Machine) -> set[str]:
    return {path.name for path in machine.path(MARKS).iterdir()}


def require_roots(machine: Machine, node: str, label: str) -> None:
    """Have udev look at it; fail unless it gets its link by label, and is hidden from nobody."""
    # It does not wait for events of other devices, of which there may be ever more.
    machine.run("udevadm", "trigger", "--settle", "--action=change", node)
    told = machine.run("udevadm", "info", "--query=property", node)
    assert "UDISKS_IGNORE" not in told
    assert "LOOPD_UNPRIVILEGED" not in told
    assert machine.run("readlink", "-f", f"/dev/disk/by-label/{label}") == f"{node}\n"


@pytest.mark.usefixtures("_can_trigger")
@pytest.mark.parametrize("use", [mounted, opened])
@pytest.mark.parametrize("end", [stop, kill])
def test_a_mark_that_outlived_its_device_is_not_of_roots_next_one(
    machine: Machine, unit: Unit, alice: Caller, end: Callable[[Unit], None], use: Use
) -> None:
    """Stale marks."""
    if end is kill:
        unit.change("[Service]\nRestart=no\n")
    label = f"{end.__name__}-{use.__name__}"
    made = machine.image("next.img", partial(make_ext4, label=label), owner="root")
    attached = alice.attach(machine.image("disk.img", make_ext4, owner="alice"))
    mark = f"loop{attached.number}"
    with use(machine, alice, attached):
        end(unit)
        assert loops.loop_is_bound(attached.number, attached.diskseq)
    loops.wait_unbound(attached.number, attached.diskseq)
    # Or the test would show nothing.
    assert mark in marks(machine)
    assert unit.pid == 0
    machine.run("losetup", attached.node, made)
    try:
        require_roots(machine, attached.node, label)
        unit.do("start")
        assert marks(machine) == set()
        require_roots(machine, attached.node, label)
    finally:
        machine.run("losetup", "--detach", attached.node)
