# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd on Debian's kernels: its devices from the first call to the last, and the loop module.

Each case asks for what is, after everything has come to rest; none asks how long it took.
"""

from pathlib import Path

import pytest

from tests.harness.emulated import Emulated
from tests.harness.images import MIB, make_ext4, make_gpt, make_plain
from tests.kernel.steps import (
    attach,
    opened,
    partitions,
    settled,
    show,
    unbound,
    wait_unbound,
)

_PAIRS = """
import asyncio
from loopd.client import Client

async def attach_and_detach():
    async with await Client.connect() as client:
        for _ in range({pairs}):
            device = await client.attach({image!r}, read_only=True)
            await device.detach()

async def main():
    await asyncio.gather(*(attach_and_detach() for _ in range({clients})))

asyncio.run(main())
"""


@pytest.mark.smoke
def test_the_first_call_starts_loopd(machine: Emulated) -> None:
    told = machine.run(
        *("busctl", "get-property", "org.example.Loop1", "/org/example/Loop1"),
        *("org.example.Loop1", "MaxDevices"),
    )
    assert told == "u 1024\n"
    assert machine.run("systemctl", "is-active", "loopd") == "active\n"
    assert machine.run("uname", "-r").strip() == machine.kernel
    # Each of the two D-Bus daemons is on one of the machines.
    unit = machine.run("systemctl", "show", "--property=Id", "--value", "dbus.service").strip()
    bus = {"dbus.service": "dbus-daemon", "dbus-broker.service": "dbus-broker"}[unit]
    assert bus == machine.release.bus


def test_a_user_attaches_grows_and_detaches(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain", MIB))
    node = attach(machine.alice, image)
    assert machine.run("blockdev", "--getsize64", node) == f"{MIB}\n"
    assert machine.run("cmp", image, node) == ""
    machine.run("truncate", "--size=2M", image)
    machine.alice.run("loopctl", "resize", node)
    assert machine.run("blockdev", "--getsize64", node) == f"{2 * MIB}\n"
    machine.alice.run("loopctl", "detach", node)
    assert node not in machine.run("losetup", "--list")


def test_a_killed_client_leaves_nothing(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    node = machine.alice.shell(
        f"loopctl hold {image} >/tmp/node & holder=$!\n"
        "until [ -s /tmp/node ]; do sleep 0.1; done; cat /tmp/node; kill -9 $holder"
    ).split()[0]
    wait_unbound(machine, node)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("kill --signal=KILL", marks=pytest.mark.smoke, id="killed"),
        pytest.param("restart", id="restarted"),
    ],
)
def test_another_loopd_has_the_same_devices(machine: Emulated, images: Path, how: str) -> None:
    image = machine.image(make_gpt(images / "gpt"))
    node = attach(machine.alice, image, "-P")
    before = show(machine.alice, node)
    pid = machine.run("systemctl", "show", "--value", "--property=MainPID", "loopd")
    machine.shell(f"systemctl {how} loopd")
    after = show(machine.alice, node)
    assert after["diskseq"] == before["diskseq"]
    assert after["partitions"] == before["partitions"]
    assert machine.run("systemctl", "show", "--value", "--property=MainPID", "loopd") != pid
    machine.alice.run("loopctl", "detach", node)
    wait_unbound(machine, node)


def test_a_hold_keeps_the_device(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    told = machine.alice.python(f"""
import asyncio
from loopd.client import Client

async def main():
    async with await Client.connect() as client:
        device = await client.attach({image!r})
        hold = await device.hold()
        node = device.node
    async with await Client.connect() as client:
        print(len([device for device, _ in await client.devices() if device.node == node]))
        hold.close()

asyncio.run(main())
""")
    assert told == "1\n"
    machine.shell(f"while losetup --list --noheadings | grep {image}; do sleep 0.1; done")


@pytest.mark.smoke
def test_open_is_for_root_alone_before_6_11(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    node = attach(machine.alice, image)
    command = ["loopctl", "open", node, "--", "sh", "-c", "head -c 512 <&$LOOPFD | wc -c"]
    done = machine.alice.result(*command)
    if machine.version < (6, 11):
        assert done.returncode != 0
        assert "6.11" in done.stdout
    else:
        assert (done.returncode, done.stdout) == (0, "512\n")
    assert machine.run(*command) == "512\n"
    machine.alice.run("loopctl", "detach", node)
    wait_unbound(machine, node)


def test_a_mounted_device_goes_lazily(machine: Emulated, images: Path) -> None:
    image = machine.image(make_ext4(images / "ext4"), owner="root")
    node = attach(machine, image)
    machine.shell(f"mkdir -p /mnt/test && mount -o nosuid,nodev {node} /mnt/test")
    assert machine.result("loopctl", "detach", node).returncode != 0
    machine.run("loopctl", "detach", "--lazy", node)
    machine.run("test", "-e", "/mnt/test/lost+found")
    machine.run("umount", "/mnt/test")
    wait_unbound(machine, node)


def test_a_number_that_somebody_has_open_is_not_used(machine: Emulated, images: Path) -> None:
    """Stale device fd: not for as long as an fd could reach the next image."""
    image = machine.image(make_plain(images / "plain"))
    other = machine.image(make_plain(images / "other"))
    node = attach(machine.alice, image)
    with opened(machine, node):
        machine.alice.run("loopctl", "detach", "--lazy", node)
        second = attach(machine.alice, other)
        assert second != node
        assert machine.run("cmp", other, second) == ""
    wait_unbound(machine, node)
    machine.alice.run("loopctl", "detach", second)


@pytest.mark.parametrize("pairs", [pytest.param(80, marks=pytest.mark.smoke), 500])
def test_pairs_leave_no_devices(machine: Emulated, images: Path, pairs: int) -> None:
    """Devices made in vain: they stay few, though udevd looks at every device meanwhile."""
    image = machine.image(make_plain(images / "plain"))
    before = unbound(machine)
    machine.alice.python(_PAIRS.format(image=image, pairs=pairs, clients=1), timeout=1800)
    assert len(unbound(machine) - before) <= 20  # those that are kept, and wait to be removed
    assert before <= unbound(machine)
    # In the end none of them is there.
    made = " ".join(sorted(unbound(machine) - before))
    machine.shell(f"for d in {made}; do while [ -e /sys/block/$d ]; do sleep 0.2; done; done")


def test_nothing_is_taken_for_lost_while_devices_come_and_go(
    machine: Emulated, images: Path
) -> None:
    """systemd keeps an fd for each device; loopd asks it for their number every half second.

    Twenty at a time are too many for a user, whom polkit is asked about.
    """
    machine.write(
        "/run/systemd/system/loopd.service.d/often.conf",
        b"[Service]\nWatchdogSec=0\nEnvironment=WATCHDOG_USEC=1000000\n",
    )
    try:
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "loopd")
        image = machine.image(make_plain(images / "plain"))
        machine.python(_PAIRS.format(image=image, pairs=5, clients=20))
        said = machine.run("journalctl", "--boot", "--unit=loopd", "--output=cat")
        assert "has lost" not in said
    finally:
        machine.run("systemctl", "stop", "loopd")
        machine.run("rm", "-r", "/run/systemd/system/loopd.service.d")
        machine.run("systemctl", "daemon-reload")


@pytest.mark.smoke
def test_what_the_module_made_stays(machine: Emulated, images: Path) -> None:
    """Devices of the module: loop0 to loop7 are there from the start, and others name them."""
    made = {f"loop{number}" for number in range(8)}
    assert made <= unbound(machine)
    image = machine.image(make_plain(images / "plain"))
    nodes = [attach(machine.alice, image, "-r") for _ in range(10)]
    machine.alice.run("loopctl", "detach", *nodes)
    machine.run("systemctl", "stop", "loopd")
    settled(machine)
    assert made <= unbound(machine)


# --- the module, which need not be there


def test_the_module_may_be_missing_and_come_late(machine: Emulated, images: Path) -> None:
    image = machine.image(make_plain(images / "plain"))
    forbid = "/etc/modprobe.d/no-loop.conf"
    machine.write(forbid, b"install loop /bin/false\n")
    try:
        machine.run("rmmod", "loop")
        done = machine.alice.result("loopctl", "attach", image)
        assert done.returncode != 0
        assert "modprobe loop" in done.stdout
        machine.run("rm", forbid)
        machine.run("modprobe", "loop")
        node = attach(machine.alice, image)
    finally:
        machine.run("rm", "--force", forbid)
        machine.run("modprobe", "loop")
    machine.alice.run("loopctl", "detach", node)


def test_the_module_may_go_while_loopd_runs(machine: Emulated, images: Path) -> None:
    """Without a device nothing of loopd's keeps it, and the next call loads it again."""
    image = machine.image(make_gpt(images / "gpt"))
    node = attach(machine.alice, image, "-P")
    machine.alice.run("loopctl", "detach", node)
    wait_unbound(machine, node)
    settled(machine)
    machine.shell("until rmmod loop; do sleep 0.2; done")
    node = attach(machine.alice, image, "-P")
    assert [number for number, _, _ in partitions(machine, node)] == [1, 2]
    machine.alice.run("loopctl", "detach", node)
    machine.run("test", "-e", "/sys/block/loop0")
