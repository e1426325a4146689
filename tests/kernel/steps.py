# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done and looked at in an emulated machine, one step each.

What is waited for there comes without anybody's help; the end of the wait is the command's.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness.emulated import Emulated, Session

NODE = re.compile(r"/dev/loop\d+")


def smoking(names: Iterable[str], *chosen: str) -> list[Any]:
    """Parameters, of which those that are chosen are run in CI."""
    return [pytest.param(name, marks=[pytest.mark.smoke] * (name in chosen)) for name in names]


def attach(session: Session, image: str, *options: str) -> str:
    """Attach an image; return the device's node."""
    node = session.run("loopctl", "attach", *options, image).split()[0]
    assert NODE.fullmatch(node)
    return node


def name_of(node: str) -> str:
    """The kernel's name of a device."""
    return node.removeprefix("/dev/")


def show(session: Session, node: str) -> dict[str, Any]:
    """What loopctl tells of a device."""
    told: dict[str, Any] = json.loads(session.run("loopctl", "show", "--json", node))
    return told


def settled(machine: Emulated) -> None:
    """Wait until udev has dealt with all that the kernel has told it."""
    machine.run("udevadm", "settle", "--timeout=250")


def at_rest(machine: Emulated) -> None:
    """Wait for udev, and for what its rules have systemd do."""
    settled(machine)
    machine.shell(
        "while systemctl list-jobs --no-legend | grep -q . || "
        "systemctl --quiet is-active 'lvm-activate-*' 'mdadm*'; do sleep 0.2; done"
    )


def wait_unbound(machine: Emulated, node: str) -> None:
    """Wait until the kernel has let go of what was attached."""
    machine.shell(f"while [ -e /sys/block/{name_of(node)}/loop ]; do sleep 0.1; done")


def unbound(machine: Emulated) -> set[str]:
    """Devices that are there for nothing."""
    script = "for d in /sys/block/loop*; do [ -e $d/loop ] || echo ${d##*/}; done"
    return set(machine.shell(script).split())


def partitions(machine: Emulated, node: str) -> list[tuple[int, int, int]]:
    """Number, first sector and count of sectors of the partitions that the kernel has."""
    name = name_of(node)
    script = f"for p in /sys/block/{name}/{name}p*; do [ -e $p ] || continue; "
    script += "echo $(cat $p/partition $p/start $p/size); done"
    rows = [line.split() for line in machine.shell(script).splitlines()]
    return sorted((int(number), int(start), int(size)) for number, start, size in rows)


def properties(machine: Emulated, node: str) -> dict[str, str]:
    """What udev's database has of a device."""
    told = machine.run("udevadm", "info", "--query=property", node)
    return dict(line.split("=", 1) for line in told.splitlines())


@contextmanager
def opened(machine: Emulated, node: str) -> Iterator[None]:
    """Have a program of root's that has a device open for reading."""
    machine.shell(
        "rm -f /run/opened\n"
        "systemd-run --quiet --unit=opener "
        f"sh -c 'exec <{node}; >/run/opened; exec sleep infinity'\n"
        "until [ -e /run/opened ]; do sleep 0.1; done"
    )
    try:
        yield
    finally:
        machine.run("systemctl", "stop", "opener")
