# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sandbox of the unit: it is in force, and what it leaves open is needed."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.harness import booted
from tests.harness.booted import Machine
from tests.harness.logins import Login
from tests.harness.unit import NAME, Unit
from tests.harness.wire import CallError

PROBE = Path(booted.__file__).with_name("probe_program.py")

# What the child that reads partition tables goes without where it must.
NEEDED = "use landlock"

# What a unit for the probe has of its own.
REPLACED = (
    "Type BusName ExecStart Restart RestartPreventExitStatus RestartSec WatchdogSec "
    "RuntimeDirectory RuntimeDirectoryMode RuntimeDirectoryPreserve FileDescriptorStoreMax"
).split()


def probe(machine: Machine, unit_text: str) -> dict[str, str]:
    """Return what the probe could do in a unit."""
    settings = unit_text.partition("[Service]")[2].splitlines()
    kept = [line for line in settings if line.partition("=")[0] not in REPLACED]
    machine.write("/usr/local/lib/probe.py", PROBE.read_text())
    machine.write("/usr/local/lib/owned", "")
    own = [
        "[Service]",
        "Type=oneshot",
        "ExecStart=/usr/bin/python3 -I /usr/local/lib/probe.py /usr/local/lib/owned",
        "StandardOutput=truncate:/var/lib/probe.out",
        "StandardError=journal",
    ]
    machine.write("/run/systemd/system/probe.service", "\n".join([*own, *kept, ""]))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "probe.service")
    found: dict[str, str] = json.loads(machine.path("/var/lib/probe.out").read_text())
    return found


def test_the_sandbox_is_in_force(machine: Machine) -> None:
    text = machine.run("systemctl", "cat", NAME)
    outside = probe(machine, "")
    inside = probe(machine, text)
    # Without a sandbox everything can be done, or the probe would prove nothing.
    assert {name: result for name, result in outside.items() if result != "done"} == {}
    assert [name for name, result in inside.items() if result == "done"] == [NEEDED]


def test_the_process_has_what_the_unit_says(machine: Machine, unit: Unit, alice: Login) -> None:
    alice.attach(machine.image("disk.img", owner="alice"))
    (pid,) = machine.processes_of(NAME)
    text = Path(f"/proc/{pid}/status").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 21  # CAP_SYS_ADMIN
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    mounts = machine.path(f"/proc/{unit.pid}/mountinfo").read_text()
    assert " /home " in mounts


def test_systemd_finds_little_fault_with_it(machine: Machine) -> None:
    printed = machine.run("systemd-analyze", "security", "--no-pager", NAME)
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", printed)
    assert level
    assert float(level[1]) <= 1.8, printed
    assert machine.run("systemd-analyze", "verify", "--man=no", NAME) == ""


# Without memory

READER = "/usr/lib/loopd/loopd/loop/partition_table_child.py"
# It gives up its rights as ever, and then waits for a lock that it has.
WAITING = """
import runpy, sys, threading
reader = runpy.run_path("{original}")
reader["lock_in"]([int(request) for request in sys.argv[1:]])
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def test_a_table_reader_that_is_killed_for_memory_goes_alone(
    machine: Machine, unit: Unit, alice: Login
) -> None:
    """Killed for memory."""
    attached = alice.attach(machine.image("disk.img", owner="alice"), partition_scan=True)
    assert unit.show("OOMPolicy") == "continue"
    before, pid = machine.processes_of(NAME), unit.pid
    original = machine.path(READER).read_text()
    machine.write("/usr/local/lib/reader.py", original)
    try:
        machine.write(READER, WAITING.format(original="/usr/local/lib/reader.py"))
        image = machine.image("other.img", owner="alice")
        call = alice.attach_begin(image, partition_scan=True)
        unit.wait(lambda: len(machine.processes_of(NAME)) > len(before), "a child of loopd")
        (child,) = {*machine.processes_of(NAME)} - {*before}
        score = Path(f"/proc/{child}/oom_score_adj")
        unit.wait(lambda: score.read_text() == "1000\n", "the child to give itself up")
        os.kill(child, signal.SIGKILL)  # as the kernel does
        with pytest.raises(CallError, match="partition table"):
            call.end()
    finally:
        machine.write(READER, original)
    assert unit.pid == pid
    assert len(alice.get_all(attached.path)["Partitions"]) == 2
    assert alice.detach(attached.path)


# What it leaves open

FAMILIES = "RestrictAddressFamilies=\nRestrictAddressFamilies=AF_UNIX\n"


def without_device(name: str) -> str:
    devices = {"/dev/loop-control", "block-loop", "block-blkext"} - {name}
    return "DeviceAllow=\n" + "".join(f"DeviceAllow={device} rw\n" for device in sorted(devices))


TAKEN_AWAY = {
    "nothing": "",
    "CAP_SYS_ADMIN": "CapabilityBoundingSet=\n",
    "capset": "SystemCallFilter=~capset\n",
    "landlock_restrict_self": "SystemCallFilter=~landlock_restrict_self\n",
    "AF_NETLINK": FAMILIES,
    "loop-control": without_device("/dev/loop-control"),
    "block-loop": without_device("block-loop"),
    "block-blkext": without_device("block-blkext"),
}


def use_all(machine: Machine, alice: Login) -> None:
    """Use whatever loopd has that needs some right; CallError if it does not work."""
    attached = alice.attach(
        machine.image("disk.img", owner="alice"),
        partition_scan=True,
        sector_size=0,
        lock="exclusive",
        lifetime="user",
    )
    path = attached.path
    properties = alice.get_all(path)
    assert len(properties["Partitions"]) == 2
    alice.device(path, "Lock", "sa{sv}", "none", {})
    (hold,) = alice.device(path, "Hold", "a{sv}", {})
    # Not to write: what has been written to, udev has the kernel read again, for which that may not
    # have the parser.
    for partition in ({}, {"partition": 1}):
        alice.open_device(path, "r", **partition).close()
    alice.device(path, "SetDirectIO", "ba{sv}", False, {})
    alice.device(path, "SetReference", "sa{sv}", "name", {})
    alice.device(path, "Sync", "a{sv}", {})
    assert alice.device(path, "RescanPartitions", "a{sv}", {}) == (2,)
    alice.resize(path, size_limit=3 << 20)
    alice.detach(path)
    hold.close()


def complaints(unit: Unit) -> list[str]:
    return unit.log("--priority=warning", "_COMM=loopd")


@pytest.mark.parametrize("what", TAKEN_AWAY)
def test_nothing_more_can_be_taken_away(
    machine: Machine, unit: Unit, alice: Login, what: str
) -> None:
    before = len(complaints(unit))
    unit.change(f"[Service]\nRestart=no\n{TAKEN_AWAY[what]}")
    # Not by a call: dbus-daemon does not hear of a unit that cannot start.
    started = machine.result("systemctl", "start", NAME)
    failure = started.stdout
    if started.returncode == 0:
        try:
            use_all(machine, alice)
        except CallError as exc:
            failure = str(exc)
        else:
            failure = " ".join(complaints(unit)[before:])
    assert bool(failure) == (what != "nothing"), failure
