# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tools that know loop devices, on loopd's: they work as on any, and loopd follows what they do.

For losetup's own devices see test_foreign, for what losetup does to loopd's as well.
"""

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness import loops
from tests.harness.images import MIB, make_ext4, make_gpt
from tests.harness.udev import Udev
from tests.harness.world import USER, World


@pytest.fixture(scope="module")
def udev() -> Iterator[Udev]:
    with Udev() as running:
        yield running


def run(*command: str) -> str:
    """Run a tool that must succeed, as root; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_losetup_shows_what_was_asked_for(world: World) -> None:
    image = world.image(4 * MIB)
    options = {"offset": MIB, "size_limit": 2 * MIB, "sector_size": 4096}
    attached = world.caller().attach(image, "r", direct_io=False, partition_scan=True, **options)
    columns = "NAME,SIZELIMIT,OFFSET,AUTOCLEAR,PARTSCAN,RO,BACK-INO,BACK-FILE,DIO,LOG-SEC"
    (found,) = json.loads(run("losetup", "-J", "-O", columns, attached.node))["loopdevices"]
    assert found == {
        "name": attached.node,
        "sizelimit": 2 * MIB,
        "offset": MIB,
        # Whatever becomes of loopd, it leaves nothing behind.
        "autoclear": True,
        "partscan": True,
        "ro": True,
        "back-ino": image.stat().st_ino,
        "back-file": str(image),
        "dio": False,
        "log-sec": 4096,
    }
    assert run("losetup", "-j", str(image)).startswith(f"{attached.node}: ")


def test_partx_makes_and_removes_partitions_which_loopd_follows(world: World, udev: Udev) -> None:
    caller = world.caller()
    attached = caller.attach(make_gpt(world.new_path(), owner=USER), partition_scan=True)
    both = caller.get(attached.path, "Partitions")
    assert len(both) == 2
    for option, expected in (("-u", both), ("-d", []), ("-a", both)):
        # partx does not wait for one whom udev looks at.
        udev.settle()
        run("partx", option, attached.node)
        # udev, whom each of these wakes, may make them anew meanwhile.
        while caller.get(attached.path, "Partitions") != expected:
            caller.wait_signal("PropertiesChanged", lambda it: it.path == attached.path)
    udev.settle()
    assert caller.detach(attached.path)
    assert loops.strays(attached.number) == ()


def test_systemd_dissect_reads_a_device_with_partitions(world: World, udev: Udev) -> None:
    image = make_gpt(world.new_path(), ((2048, 2048),), owner=USER)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(world.new_path(), MIB).read_bytes())
    attached = world.caller().attach(image, partition_scan=True)
    udev.settle()
    lines = [line.split() for line in run("systemd-dissect", attached.node).splitlines()]
    (words,) = [each for each in lines if f"{attached.node}p1" in each]
    assert {"root", "ext4"} <= set(words)
    assert loops.partitions(attached.number) == (f"loop{attached.number}p1",)
