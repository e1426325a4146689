# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the real journal has of loopd: who did what to which device, with what result."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.area import area
from tests.harness.bus import PrivateBus
from tests.harness.caller import Caller
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.images import make_plain
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.process import Process
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER

JOURNALD = "/lib/systemd/systemd-journald"
# A journal of our own, where the machine may have none, or has one that is not ours to write to.
START = f"""
mount -t tmpfs none /run/systemd
mount -t tmpfs none /run/log
exec {JOURNALD}
"""
SIZE = 4096
REFUSED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


class Journal:
    """A journald that nobody outside of a mount namespace sees."""

    def __init__(self, process: Process) -> None:
        self.within = ("nsenter", f"--target={process.pid}", "--mount", "--")
        """The command that runs another one where its socket is."""

    def entries(self, **fields: str) -> list[dict[str, str]]:
        """Return what it has of loopd with these fields, oldest first."""
        subprocess.run([*self.within, "journalctl", "--sync"], check=True)
        matches = [f"{name}={value}" for name, value in fields.items()]
        shown = subprocess.run(
            [
                *self.within,
                *("journalctl", "--directory=/run/log/journal", "--output=json", "--quiet"),
                *("SYSLOG_IDENTIFIER=loopd", *matches),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        return [json.loads(line) for line in shown.stdout.splitlines()]


@pytest.fixture
def journal() -> Iterator[Journal]:
    with (
        area("journal") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
    ):
        ready.bind(str(directory / "notify"))
        command = ["unshare", "--mount", "--propagation=private", "--", "sh", "-euc", START]
        environment = {"NOTIFY_SOCKET": str(directory / "notify")}
        with Process(command, name="journald", environment=environment) as process:
            Deadline().wait_readable([ready.fileno(), process.pidfd], "journald to be ready")
            assert b"READY=1" in ready.recv(4096)
            yield Journal(process)


@pytest.fixture
def world(journal: Journal) -> Iterator[tuple[PrivateBus, Path]]:
    """A loopd whose standard error systemd has connected to the journal, as far as it knows."""
    with area("files") as files, PrivateBus() as bus:
        rules = rules_allowing("org.example.loop1.attach", users=(USER,))
        says_so = 'export JOURNAL_STREAM="$(stat -Lc %d:%i /proc/self/fd/2)"; exec "$@"'
        within = (*journal.within, "sh", "-euc", says_so, "sh")
        with RealPolkit(bus, rules), Daemon(bus, within=within) as daemon:
            yield bus, files
            assert daemon.log == ""


def attach(caller: Caller, files: Path, name: str, owner: str) -> Any:
    return caller.attach(make_plain(files / name, SIZE, owner=owner))


def test_who_did_what_to_which_device_and_how_it_ended(
    journal: Journal, world: tuple[PrivateBus, Path]
) -> None:
    bus, files = world
    with Caller(bus, USER) as user, Caller(bus, OTHER) as other:
        attached = attach(user, files, "image", USER)
        with pytest.raises(CallError):
            attach(other, files, "image2", OTHER)
        with pytest.raises(CallError):
            other.detach(attached.path)
        user.detach(attached.path)
        uids = {
            each: str(os.stat(files / name).st_uid)
            for each, name in ((USER, "image"), (OTHER, "image2"))
        }
        device = {"DEVICE": attached.node, "DISKSEQ": str(attached.diskseq)}
        wanted = [
            {"ACTION": "Attach", "UID": uids[USER], "RESULT": "done", **device},
            {"ACTION": "Attach", "UID": uids[OTHER], "RESULT": REFUSED},
            {"ACTION": "Detach", "UID": uids[OTHER], "RESULT": REFUSED, **device},
            {"ACTION": "Detach", "UID": uids[USER], "RESULT": "done", **device},
        ]
        senders = {uids[USER]: user.unique_name, uids[OTHER]: other.unique_name}
    entries = [each for each in journal.entries() if "RESULT" in each]
    names = ("ACTION", "UID", "RESULT", "DEVICE", "DISKSEQ")
    assert [{k: each[k] for k in names if k in each} for each in entries] == wanted
    assert [each["SENDER"] for each in entries] == [senders[each["UID"]] for each in wanted]
    assert {each["PRIORITY"] for each in entries} == {"6"}


def test_the_end_of_a_client_and_of_its_device_are_told(
    journal: Journal, world: tuple[PrivateBus, Path]
) -> None:
    bus, files = world
    with Caller(bus, USER) as user, bus.connect() as witness:
        attached = attach(user, files, "image", USER)
        witness.add_match("type='signal',member='InterfacesRemoved'")
        user.kill()
        witness.receive_where(lambda it: it.member == "InterfacesRemoved", "the device's end")
    entries = journal.entries(DISKSEQ=str(attached.diskseq))
    messages = [each["MESSAGE"] for each in entries]
    assert any("has left" in each for each in messages)
    assert any("is gone" in each for each in messages)
    assert {each["DEVICE"] for each in entries} == {attached.node}


def test_a_client_cannot_write_lines_of_its_own_nor_fill_the_journal(
    journal: Journal, world: tuple[PrivateBus, Path]
) -> None:
    """Forged log lines."""
    bus, files = world
    with Caller(bus, USER) as user, Caller(bus, None) as root:
        image = make_plain(files / "image", SIZE, owner=USER)
        for number in range(300):
            with pytest.raises(CallError):
                user.attach(image, mapping={f"x{number}\nforged\x1b[2J": Variant("b", True)})
        attach(root, files, "other", USER)
    entries = journal.entries(ACTION="Attach")
    of_root = [each for each in entries if each["UID"] == "0"]
    assert len(of_root) == 1
    assert 10 < len(entries) < 100
    # journalctl gives what is no text as a list of numbers.
    assert all(isinstance(each["MESSAGE"], str) for each in entries)
    assert not any("\n" in each["MESSAGE"] or "\x1b" in each["MESSAGE"] for each in entries)
