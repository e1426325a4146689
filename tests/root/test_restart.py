# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd is killed, restarted and stopped: what becomes of devices, and what their clients see.

The test is systemd.  Where nothing else is said, a restart is one by SIGKILL.
"""

import fcntl
import json
import os
import pwd
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from loopd.loop import kernel
from loopd.loop.uapi import LO_FLAGS_AUTOCLEAR
from tests.harness import loops
from tests.harness.area import small_tmpfs
from tests.harness.bus import LOOPD
from tests.harness.caller import DEVICE, Attached, Caller
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_ext4, pattern
from tests.harness.polkit import Answer
from tests.harness.service import PREFIX, RECORDS, Service, service
from tests.harness.wire import CallError

UID = pwd.getpwnam("nobody").pw_uid
LOOP_CHANGE_FD = 0x4C06
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
DEVICE_BUSY = "org.example.Loop1.Error.DeviceBusy"


@pytest.fixture
def new_unit() -> Iterator[Callable[..., Service]]:
    """Make a service whose loopd has not been started."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(service(**{"users": (UID,)} | options))


@pytest.fixture
def unit(new_unit: Callable[..., Service]) -> Service:
    made = new_unit()
    made.start()
    return made


def label(attached: Attached) -> str:
    return attached.path.removeprefix(PREFIX)


def seen(unit: Service, user: str | None = "nobody") -> dict[str, dict[str, Any]]:
    """Return what a user sees of all managed devices."""
    with unit.bus.connect(user) as client:
        return unit.devices(client)


def wait_seen(unit: Service, *attached: Attached) -> None:
    """Wait until there are exactly these devices, and nothing of others."""
    deadline = Deadline()
    with unit.bus.connect("nobody") as client:
        while {*unit.devices(client)} != {label(each) for each in attached}:
            assert deadline.remaining, [*unit.devices(client)]
        unit.wait_right(client)


def hold(caller: Caller, attached: Attached) -> int:
    """Return a Hold as an fd of this process."""
    (remote,) = caller.device(attached.path, "Hold", "a{sv}", {})
    fd = int(remote.fetch())
    remote.close()
    return fd


def at_end(fd: int) -> bool:
    """Whether a Hold says that its device is gone."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def wait_end(fd: int) -> None:
    """Wait until it says so, and close it."""
    Deadline().wait_readable([fd], "the end of a Hold")
    assert os.read(fd, 1) == b""
    os.close(fd)


def is_bound(attached: Attached) -> bool:
    return loops.loop_is_bound(attached.number, attached.diskseq)


def wait_nothing_of(attached: Attached) -> None:
    """Wait until it is unbound, without a partition left; another run may have the number then."""
    loops.wait_unbound(attached.number, attached.diskseq)
    strays = loops.partitions(attached.number)
    assert not strays or loops.loop_is_bound(attached.number)


def autoclear(attached: Attached) -> bool:
    return kernel.loop_attribute(attached.number, "loop/autoclear") == b"1"


@contextmanager
def opened(attached: Attached, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(attached.node, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def turn_autoclear_off(fd: int) -> None:
    info = kernel.loop_get_status64(fd)
    info.lo_flags &= ~LO_FLAGS_AUTOCLEAR
    kernel.loop_set_status64(fd, info)


@contextmanager
def foreign(unit: Service) -> Iterator[loops.BoundLoop]:
    """Be somebody else who has a loop device, with autoclear off."""
    path = unit.files.parent / f"{unit.files.name}-foreign"
    path.write_bytes(pattern(0, MIB))
    try:
        node = loops.losetup(path)
        found = loops.look_at(int(node.removeprefix("/dev/loop")))
        assert found
        try:
            yield found
            assert loops.look_at(found.number) == found
        finally:
            loops.detach_leaked(found)
            loops.wait_unbound(found.number, found.diskseq)
    finally:
        path.unlink()


@contextmanager
def closing_fd(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


class Gate:
    """A place in loopd where it waits for the test; a prelude calls `_at_gate()` there."""

    def __init__(self, path: Path) -> None:
        for name in ("here", "on"):
            os.mkfifo(f"{path}.{name}")
        self._here, self._on = (os.open(f"{path}.{name}", os.O_RDWR) for name in ("here", "on"))
        self.prelude = f"""
import os

def _at_gate():
    for name, flags, step in (
        ("here", os.O_WRONLY, lambda fd: os.write(fd, b"x")),
        ("on", os.O_RDONLY, lambda fd: os.read(fd, 1)),
    ):
        fd = os.open("{path}." + name, flags)
        step(fd)
        os.close(fd)
"""

    def wait(self) -> None:
        """Wait until loopd is there."""
        Deadline().wait_readable([self._here], "loopd at the gate")
        os.read(self._here, 1)

    def open(self) -> None:
        """Let it go on."""
        os.write(self._on, b"x")

    def close(self) -> None:
        os.close(self._here)
        os.close(self._on)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    try:
        yield made
    finally:
        made.close()


# A restart of either kind is seen by nobody


IMPATIENT = "from loopd.daemon import lifecycle; lifecycle.STOP_TIMEOUT = 0.5"
"""A stop waits for 5 s otherwise for what is mounted."""


def crash(unit: Service) -> None:
    unit.crash()


def restart(unit: Service) -> None:
    unit.restart()


def crash_in_full(unit: Service) -> None:
    """With an interpreter of its own."""
    unit.crash(forked=False)


@pytest.mark.parametrize("again", [crash, restart, crash_in_full])
def test_a_restart_changes_nothing(unit: Service, again: Callable[[Service], object]) -> None:
    """Killed at any point."""
    caller = unit.caller()
    plain = caller.attach(unit.image(), reference="name")
    locked = caller.attach(unit.gpt(), partition_scan=True, lock="exclusive")
    reading = caller.attach(unit.image(), "r", offset=4096, size_limit=8192, sector_size=4096)
    of_user = caller.attach(unit.image(), lifetime="user")
    of_system = caller.attach(unit.gpt(), lifetime="system", partition_scan=True)
    with opened(plain) as fd:
        tower = caller.attach(fd, offset=4096, lock="shared")
    holding = hold(caller, plain)
    with foreign(unit):
        before = seen(unit)
        assert len(before) == 6
        bound = unit.bound()
        caller.sync_signals()
        caller.signals.clear()
        for _ in range(2):
            again(unit)
            assert seen(unit) == before
            assert unit.bound() == bound
        assert not [it for it in caller.sync_signals() if it.args[0] in before]
        assert not at_end(holding)
        # And all are as good as before.
        assert caller.resize(plain.path, size_limit=8192) == 8192
        assert caller.open_device(reading.path, "r").read(16) == pattern(4096, 16)
        for attached in (tower, plain, locked, of_user, of_system):
            assert caller.detach(attached.path) is True
            assert not is_bound(attached)
        wait_end(holding)
        caller.close()
        wait_seen(unit)


def test_who_watches_hears_nothing_of_a_restart(unit: Service) -> None:
    caller, watcher = unit.caller(), unit.caller("games")
    attached = caller.attach(unit.image())
    watcher.sync_signals()
    watcher.signals.clear()
    unit.crash()
    caller.device(attached.path, "SetReference", "sa{sv}", "name", {})
    heard = [it for it in watcher.sync_signals() if attached.path in (it.path, it.args[0])]
    assert {(it.member, *it.args[1]) for it in heard} == {("PropertiesChanged", "Reference")}
    caller.detach(attached.path)


def test_a_crash_loop_loses_nothing(unit: Service) -> None:
    caller = unit.caller()
    attached = [caller.attach(unit.image(), lock="shared") for _ in range(3)]
    before = seen(unit)
    for _ in range(8):
        unit.kill()
        unit.start(wait_ready=False)  # and dies again, somewhere on its way
    unit.crash()
    assert seen(unit) == before
    for each in attached:
        assert caller.detach(each.path) is True


# A stop


@pytest.mark.parametrize("job", ["stop", None])
def test_a_stop_lets_go_of_all_but_what_is_the_systems(unit: Service, job: str | None) -> None:
    """Without a job it is somebody's `kill`, for whom systemd would start nothing anew."""
    caller = unit.caller()
    passing = [
        caller.attach(unit.gpt(), partition_scan=True, lock="exclusive"),
        caller.attach(unit.image(), lifetime="user"),
    ]
    # One that does not go by itself.
    passing.append(caller.attach(unit.image()))
    with opened(passing[-1], os.O_RDWR) as fd:
        turn_autoclear_off(fd)
    lasting = caller.attach(unit.image(), lifetime="system")
    holding = hold(caller, passing[0])
    with foreign(unit):
        before = seen(unit)[label(lasting)]
        unit.systemd.job = job
        assert unit.daemon.terminate() == 0
        unit.systemd.job = None
        unit.store.drop()
        for attached in passing:
            wait_nothing_of(attached)
        wait_end(holding)
        assert is_bound(lasting)
        assert autoclear(lasting) is False
        unit.start()
        wait_seen(unit, lasting)
        assert seen(unit)[label(lasting)] == before
        assert autoclear(lasting) is False
        # Its owner is who it was.
        other = unit.caller("games")
        assert caller.detach(lasting.path) is True
        assert not is_bound(lasting)
        other.close()


def test_what_is_the_systems_is_its_owners_after_a_stop(unit: Service) -> None:
    caller, other = unit.caller(), unit.caller("games")
    attached = caller.attach(unit.image(), lifetime="system")
    caller.close()
    unit.stop()
    unit.start()
    again = unit.caller()
    unit.polkit.default = Answer.DENY
    with pytest.raises(CallError, match="AccessDenied"):
        other.detach(attached.path)
    assert again.detach(attached.path) is True
    assert not is_bound(attached)


@pytest.mark.parametrize("end", [crash, restart, lambda unit: (unit.stop(), unit.start())])
def test_autoclear_of_what_is_the_systems_stays_as_it_was_set(
    unit: Service, end: Callable[[Service], object]
) -> None:
    caller = unit.caller()
    first, second = (caller.attach(unit.image(), lifetime="system") for _ in range(2))
    caller.device(first.path, "SetAutoclear", "ba{sv}", True, {})
    caller.device(second.path, "SetAutoclear", "ba{sv}", True, {})
    caller.device(second.path, "SetAutoclear", "ba{sv}", False, {})
    keeping = os.open(first.node, os.O_RDONLY | os.O_CLOEXEC)
    end(unit)
    for attached, on in ((first, True), (second, False)):
        assert seen(unit)[label(attached)]["Lifetime"] == "system"
        assert seen(unit)[label(attached)]["Autoclear"] is on
        assert autoclear(attached) is on
    os.close(keeping)
    for attached in (first, second):
        with suppress(CallError):
            caller.detach(attached.path)
        loops.wait_unbound(attached.number, attached.diskseq)


def test_without_a_store_all_but_what_is_the_systems_goes_with_loopd(
    new_unit: Callable[..., Service],
) -> None:
    unit = new_unit(maximum=0)
    unit.start()
    caller = unit.caller()
    passing = [
        caller.attach(unit.gpt(), partition_scan=True, lock="exclusive"),
        caller.attach(unit.image(), lifetime="user"),
    ]
    lasting = caller.attach(unit.image(), lifetime="system", lock="shared")
    before = seen(unit)[label(lasting)]
    assert unit.store.complaints == []
    unit.kill()
    for attached in passing:
        wait_nothing_of(attached)
    unit.start()
    wait_seen(unit, lasting)
    # The lock has gone with the fd.
    assert seen(unit)[label(lasting)] == before | {"Locked": "none"}
    with opened(lasting) as fd:
        wait_unlocked(fd)
    assert caller.detach(lasting.path) is True


# Who has gone meanwhile


def test_what_a_client_had_that_died_meanwhile_goes(unit: Service) -> None:
    caller, other = unit.caller(), unit.caller("games")
    lost = caller.attach(unit.gpt(), partition_scan=True, lock="exclusive")
    held, dropped = caller.attach(unit.image()), caller.attach(unit.image())
    others = other.attach(unit.image(owner="games"))
    holding, dropping = hold(caller, held), hold(caller, dropped)
    unit.kill()
    caller.kill()
    os.close(dropping)
    unit.start()
    wait_seen(unit, held, others)
    assert not is_bound(lost)
    assert not is_bound(dropped)
    assert seen(unit)[label(held)] | {"Holder": "", "Holds": 1} == seen(unit)[label(held)]
    unit.crash()
    assert seen(unit)[label(held)]["Holds"] == 1
    os.close(holding)
    wait_seen(unit, others)
    assert other.detach(others.path) is True


SLOW = """
import threading
from loopd.loop import change as loopops; from loopd.daemon.actions import guard as manager

_left = threading.Event()

def _take_back(*args, _is=loopops.take_back, **named):
    _at_gate()
    assert _left.wait(20)
    return _is(*args, **named)

def _client_left(self, client, _is=manager.Manager.client_left):
    _is(self, client)
    _left.set()

loopops.take_back, manager.Manager.client_left = _take_back, _client_left
"""
"""A device is not taken back before a client has left."""


def test_what_a_client_had_that_dies_while_it_is_taken_back_goes(unit: Service, gate: Gate) -> None:
    caller = unit.caller()
    lost = caller.attach(unit.image())
    unit.kill()
    unit.start(prelude=gate.prelude + SLOW, wait_ready=False)
    gate.wait()
    caller.kill()
    gate.open()
    unit.bus.wait_owned(LOOPD)
    wait_seen(unit)
    assert not is_bound(lost)


def test_the_lock_of_a_client_that_dies_while_it_is_taken_back_goes(
    unit: Service, gate: Gate
) -> None:
    caller = unit.caller()
    kept = caller.attach(unit.image(), lifetime="user", lock="shared")
    unit.kill()
    unit.start(prelude=gate.prelude + SLOW, wait_ready=False)
    gate.wait()
    caller.kill()
    gate.open()
    unit.bus.wait_owned(LOOPD)
    deadline = Deadline()
    while seen(unit)[label(kept)]["Locked"] != "none":
        assert deadline.remaining
    assert unit.caller().detach(kept.path) is True


LATE = """
from loopd.loop import change as loopops; from loopd.daemon.actions import restore as restoring

restoring._TIMEOUT = 0.1

def _take_back(*args, _is=loopops.take_back, **named):
    found = _is(*args, **named)
    _at_gate()
    return found

loopops.take_back = _take_back
"""
"""A device does not answer in time."""


def test_the_number_of_a_device_that_answered_too_late_is_free_again(
    unit: Service, gate: Gate
) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.image())
    unit.kill()
    unit.start(prelude=gate.prelude + LATE)
    assert f"unprivileged/loop{attached.number}" in unit.marks()
    gate.open()
    loops.wait_unbound(attached.number, attached.diskseq)
    deadline = Deadline()
    while f"unprivileged/loop{attached.number}" in unit.marks():
        assert deadline.remaining
        seen(unit)
    unit.crash()


SLOW_KERNEL = """
import time
from loopd.loop import change as loopops; from loopd.daemon.actions import restore as restoring

restoring._TIMEOUT = 0.1

def _take_back(*args, _is=loopops.take_back, **named):
    time.sleep(0.05)
    return _is(*args, **named)

loopops.take_back = _take_back
"""
"""All devices of a user take longer than one of them may."""


def test_a_user_with_many_devices_keeps_them(unit: Service) -> None:
    caller = unit.caller()
    attached = [caller.attach(unit.image()) for _ in range(20)]
    before = seen(unit)
    unit.crash(prelude=SLOW_KERNEL)
    assert seen(unit) == before
    for each in attached:
        assert caller.detach(each.path) is True


def test_a_hold_that_ended_meanwhile_ends_nothing_else(unit: Service) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.image())
    first, second = hold(caller, attached), hold(caller, attached)
    unit.kill()
    os.close(first)
    unit.start()
    deadline = Deadline()
    while seen(unit)[label(attached)]["Holds"] != 1:
        assert deadline.remaining
    assert not at_end(second)
    assert caller.detach(attached.path) is True
    wait_end(second)


def test_a_hold_of_an_older_loopd_is_still_one(unit: Service) -> None:
    """It was the write end of a pipe."""
    caller = unit.caller()
    attached = caller.attach(unit.image())
    reading, writing = os.pipe()
    os.close(hold(caller, attached))
    holding = hold(caller, attached)
    unit.kill()
    (name,) = [it for it in unit.store.names() if ".hold" in it]
    unit.store.lose(name)
    unit.store.put(name, writing)
    os.close(writing)
    os.close(holding)
    unit.start()
    caller.close()
    assert seen(unit)[label(attached)]["Holds"] == 1
    assert not at_end(reading)
    os.close(reading)
    wait_seen(unit)


# A runtime directory that is full


@pytest.fixture
def full_unit(new_unit: Callable[..., Service], tmp_path: Path) -> Iterator[Service]:
    """One whose runtime directory can be filled, by `fill_disk`."""
    unit = new_unit()
    with small_tmpfs(tmp_path / "run", MIB) as unit.runtime_directory:
        unit.start()
        try:
            yield unit
        finally:
            unit.daemon.kill()


def fill_disk(unit: Service) -> None:
    """Take all the room that there is."""
    with open(unit.runtime_directory / "filling", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def make_room(unit: Service) -> None:
    (unit.runtime_directory / "filling").unlink()


@pytest.mark.parametrize("lifetime", ["connection", "system"])
def test_a_detach_that_began_on_a_full_disk_ends_after_a_crash(
    full_unit: Service, lifetime: str
) -> None:
    """Killed at any point: a Detach is written down, whatever room there is for it."""
    caller = full_unit.caller()
    attached = caller.attach(full_unit.image(), lifetime=lifetime)
    stays = caller.attach(full_unit.image())
    with opened(attached):
        fill_disk(full_unit)
        assert caller.detach(attached.path, lazy=True) is False
        full_unit.crash()
        assert seen(full_unit)[label(attached)]["State"] == "detaching"
    loops.wait_unbound(attached.number, attached.diskseq)
    assert seen(full_unit)[label(stays)]["State"] == "attached"
    make_room(full_unit)
    assert caller.detach(stays.path) is True
    wait_seen(full_unit)


def test_what_the_next_loopd_would_not_know_of_is_refused_on_a_full_disk(
    full_unit: Service,
) -> None:
    caller = full_unit.caller()
    attached = caller.attach(full_unit.image())
    fill_disk(full_unit)
    before = seen(full_unit), full_unit.store.names(), full_unit.records()
    for method, arguments in (
        ("Hold", ("a{sv}", {})),
        ("Lock", ("sa{sv}", "exclusive", {})),
        ("SetLifetime", ("sa{sv}", "user", {})),
        ("SetLifetime", ("sa{sv}", "system", {})),
    ):
        with pytest.raises(CallError) as caught:
            caller.device(attached.path, method, *arguments)
        assert caught.value.name == "System.Error.ENOSPC"
    for options in ({}, {"lock": "shared"}):
        with pytest.raises(CallError):
            caller.attach(full_unit.image(), **options)
    with full_unit.bus.connect() as client:
        full_unit.wait_right(client)
    deadline = Deadline()
    while before != (seen(full_unit), full_unit.store.names(), full_unit.records()):
        assert deadline.remaining
    make_room(full_unit)
    caller.device(attached.path, "Lock", "sa{sv}", "exclusive", {})
    with closing_fd(hold(caller, attached)):
        full_unit.crash()
        told = seen(full_unit)[label(attached)]
    assert (told["Holds"], told["Locked"]) == (1, "exclusive")
    assert caller.detach(attached.path) is True


def test_a_users_device_goes_when_logind_has_forgotten_it_meanwhile(unit: Service) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.image(), lifetime="user")
    caller.close()
    unit.crash()
    wait_seen(unit, attached)
    unit.kill()
    unit.logind.users.clear()
    unit.start()
    wait_seen(unit)
    assert not is_bound(attached)


def test_on_another_bus_nobody_is_who_had_the_name(unit: Service) -> None:
    """The names of connections begin anew there."""
    caller = unit.caller()
    lost = caller.attach(unit.image(), lock="exclusive")
    held = caller.attach(unit.image(), lock="exclusive")
    of_user = caller.attach(unit.image(), lifetime="user")
    of_system = caller.attach(unit.image(), lifetime="system")
    holding = hold(caller, held)
    name = caller.unique_name
    unit.kill()
    unit.new_bus()
    clients = [unit.bus.connect()]
    while clients[-1].unique_name != name:
        assert len(clients) < 100
        clients.append(unit.bus.connect())
    unit.start()
    wait_seen(unit, held, of_user, of_system)
    assert not is_bound(lost)
    it = seen(unit)[label(held)]
    assert (it["Holder"], it["Locked"], it["Holds"]) == ("", "none", 1)
    with opened(held) as fd:
        wait_unlocked(fd)
    os.close(holding)
    wait_seen(unit, of_user, of_system)
    again = unit.caller()
    for attached in (of_user, of_system):
        assert again.detach(attached.path) is True
    for client in clients:
        client.close()


# What was going


def test_what_somebody_has_open_is_still_going_after_a_restart(unit: Service) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.image())
    holding = hold(caller, attached)
    with opened(attached, os.O_RDWR) as fd:
        assert caller.detach(attached.path) is False
        for end in (crash, restart):
            end(unit)
            it = seen(unit)[label(attached)]
            assert (it["State"], it["Owner"]) == ("detaching", UID)
            turn_autoclear_off(fd)
        unit.kill()
    unit.start()
    wait_seen(unit)
    assert not is_bound(attached)
    wait_end(holding)


def test_what_is_mounted_is_still_going_after_a_restart(
    new_unit: Callable[..., Service],
) -> None:
    unit = new_unit()
    unit.prelude = IMPATIENT
    unit.start()
    caller = unit.caller()
    image = make_ext4(unit.new_path(), owner="nobody")
    attached = caller.attach(image)
    directory = unit.files / "mounted"
    directory.mkdir()
    subprocess.run(["mount", attached.node, directory], check=True)
    try:
        assert caller.detach(attached.path, lazy=True) is False
        for end in (crash, restart, lambda unit: (unit.stop(), unit.start())):
            end(unit)
            assert seen(unit)[label(attached)]["State"] == "detaching"
    finally:
        subprocess.run(["umount", directory], check=True)
    wait_seen(unit)
    assert not is_bound(attached)


def test_what_was_mounted_when_loopd_was_stopped_is_still_counted(
    new_unit: Callable[..., Service],
) -> None:
    config = "[limits]\ndevices_per_user = 1\n"
    unit = new_unit()
    unit.prelude = IMPATIENT
    unit.start(config=config)
    caller = unit.caller()
    attached = caller.attach(make_ext4(unit.new_path(), owner="nobody"))
    directory = unit.files / "mounted"
    directory.mkdir()
    subprocess.run(["mount", attached.node, directory], check=True)
    try:
        unit.stop()
        assert is_bound(attached)
        unit.start(config=config)
        it = seen(unit)[label(attached)]
        assert (it["State"], it["Owner"]) == ("detaching", UID)
        with pytest.raises(CallError) as failure:
            caller.attach(unit.image())
        assert failure.value.name == LIMITS_EXCEEDED
    finally:
        subprocess.run(["umount", directory], check=True)
    wait_seen(unit)
    assert caller.detach(caller.attach(unit.image()).path) is True


# What a client has done to its device by an fd of its own


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_turns_autoclear_off_leaks_nothing(
    unit: Service, store: bool, leaves: bool
) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.gpt(), partition_scan=True)
    device = caller.open_device(attached.path, "rw")
    fd = device.fetch()
    turn_autoclear_off(fd)
    os.close(fd)
    device.close()
    unit.kill()
    if not store:
        unit.store.settle()
        unit.store.drop()
    if leaves:
        caller.kill()
    unit.start()
    if not leaves:
        wait_seen(unit, *([attached] if is_bound(attached) else []))
        caller.close()
    loops.wait_unbound(attached.number, attached.diskseq)
    wait_seen(unit)


def test_a_client_that_swaps_the_file_keeps_its_device(unit: Service) -> None:
    """LOOP_CHANGE_FD: the diskseq is another one, and the object the same."""
    caller = unit.caller()
    attached = caller.attach(unit.image(), "r")
    device = caller.open_device(attached.path, "r")
    other = unit.image()
    with opened(attached) as fd, open(other, "rb") as file:
        fcntl.ioctl(fd, LOOP_CHANGE_FD, file.fileno())
    device.close()
    changed = loops.look_at(attached.number)
    assert changed
    assert changed.diskseq > attached.diskseq
    for end in (crash, restart):
        end(unit)
        it = seen(unit)[label(attached)]
        assert it["Owner"] == UID
        assert it["Holder"] == caller.unique_name
    assert caller.detach(attached.path) is True
    assert not loops.loop_is_bound(changed.number, changed.diskseq)


# Limits


def test_what_was_attached_and_held_before_is_counted(new_unit: Callable[..., Service]) -> None:
    config = "[limits]\ndevices_per_user = 2\nholds_per_user = 1\n"
    unit = new_unit()
    unit.start(config=config)
    caller = unit.caller()
    first, second = caller.attach(unit.image()), caller.attach(unit.image())
    holding = hold(caller, first)
    for end in (unit.crash, unit.restart):
        end(config=config)
        with pytest.raises(CallError) as failure:
            caller.attach(unit.image())
        assert failure.value.name == LIMITS_EXCEEDED
        with pytest.raises(CallError) as failure:
            hold(caller, second)
        assert failure.value.name == LIMITS_EXCEEDED
    os.close(holding)
    deadline = Deadline()
    while seen(unit)[label(first)]["Holds"]:
        assert deadline.remaining
    os.close(hold_at_last(caller, second))
    assert caller.detach(first.path) is True
    third = caller.attach(unit.image())
    for attached in (second, third):
        assert caller.detach(attached.path) is True


def test_a_store_is_never_asked_for_more_than_it_takes(
    new_unit: Callable[..., Service],
) -> None:
    config = "[limits]\nholds = 2\n"
    unit = new_unit(maximum=6)
    unit.start(config=config)
    caller = unit.caller()
    devices = [caller.attach(unit.image(), lock="exclusive") for _ in range(2)]
    holds = [hold(caller, each) for each in devices]
    assert len(unit.store.names()) == 6
    for end in (None, unit.crash):
        if end:
            end(config=config)
        with pytest.raises(CallError) as failure:
            caller.attach(unit.image())
        assert failure.value.name == LIMITS_EXCEEDED
        with pytest.raises(CallError) as failure:
            hold(caller, devices[0])
        assert failure.value.name == LIMITS_EXCEEDED
        # What goes has to be out of it before what comes is put in.
        for kind in ("none", "exclusive") * 3:
            lock(caller, devices[0], kind)
        with unit.store.paused():
            os.close(holds.pop())
            deadline = Deadline()
            while caller.get(devices[1].path, "Holds"):
                assert deadline.remaining
            with pytest.raises(CallError) as failure:
                hold(caller, devices[1])
            assert failure.value.name == LIMITS_EXCEEDED
        holds.append(hold_at_last(caller, devices[1]))
        assert caller.detach(devices[0].path) is True
        wait_end(holds.pop(0))
        devices = [caller.attach(unit.image(), lock="shared"), devices[1]]
        holds.insert(0, hold_at_last(caller, devices[0]))
        before = seen(unit)
        assert unit.store.complaints == []
        assert len(unit.store.names()) == 6
        unit.crash(config=config)
        assert seen(unit) == before
    for each in devices:
        assert caller.detach(each.path) is True
    for fd in holds:
        wait_end(fd)


def wait_unlocked(fd: int) -> None:
    """Wait until nobody, be it udev for a look, has a lock on a device."""
    deadline = Deadline()
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not deadline.remaining:
                raise
        else:
            return


def lock(caller: Caller, attached: Attached, kind: str) -> None:
    """Lock a device once udev does not look at it: nothing waits for a lock."""
    deadline = Deadline()
    while True:
        try:
            caller.device(attached.path, "Lock", "sa{sv}", kind, {})
        except CallError as exc:
            if exc.name != DEVICE_BUSY or not deadline.remaining:
                raise
        else:
            return


def fill(unit: Service) -> None:
    """Send systemd, which does not read, what goes in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(BlockingIOError):
        sender.setblocking(False)
        while True:
            sender.sendto(b"X_FILL=1", unit.environment["NOTIFY_SOCKET"])


def test_a_systemd_that_does_not_read_stops_nobodys_calls(unit: Service) -> None:
    unit.stop()
    unit.environment["WATCHDOG_USEC"] = "2000"
    unit.start()
    caller = unit.caller()
    with unit.store.paused():
        fill(unit)
        for _ in range(50):
            caller.managed_objects()


def test_holds_that_systemd_does_not_read_of_are_in_nobodys_way(unit: Service) -> None:
    callers, other = [unit.caller() for _ in range(4)], unit.caller("games")
    attached, others = callers[0].attach(unit.image()), other.attach(unit.image(owner="games"))
    with unit.store.paused():
        fill(unit)
        calls = [
            caller.call_begin(attached.path, DEVICE, "Hold", "a{sv}", {})
            for caller in callers
            for _ in range(16)
        ]
        for _ in range(100):  # until all of them wait
            other.device(others.path, "Sync", "a{sv}", {})
    for call in calls:
        call.end()[0].close()
    assert other.detach(others.path) is True
    assert callers[0].detach(attached.path) is True


HOLDS_SLOWLY = """
import threading
from loopd.daemon.host import fd_store as fdstore; from loopd.daemon.actions import guard as manager

_left = threading.Event()

def _keep(self, name, fd, _is=fdstore.FdStore.keep):
    if name.endswith(".hold1"):
        _at_gate()
        assert _left.wait(20)
    return _is(self, name, fd)

def _take_out(self, name, _is=fdstore.FdStore._take_out):
    if name.endswith(".hold1"):
        _at_gate()
    _is(self, name)

def _client_left(self, client, _is=manager.Manager.client_left):
    _is(self, client)
    _left.set()

fdstore.FdStore.keep, fdstore.FdStore._take_out = _keep, _take_out
manager.Manager.client_left = _client_left
"""
"""The first Hold is kept when a client has left; there are gates before that and at its end."""


def test_a_hold_of_nobody_is_counted_until_it_is_out_of_the_store(
    new_unit: Callable[..., Service], gate: Gate
) -> None:
    unit = new_unit()
    unit.prelude = gate.prelude + HOLDS_SLOWLY
    unit.start(config="[limits]\nholds_per_user = 1\n")
    caller, leaving = unit.caller(), unit.caller()
    attached = caller.attach(unit.image())
    leaving.call_begin(attached.path, DEVICE, "Hold", "a{sv}", {})
    gate.wait()
    gate.open()
    leaving.kill()
    gate.wait()
    try:
        with pytest.raises(CallError) as failure:
            hold(caller, attached)
    finally:
        gate.open()
    assert failure.value.name == LIMITS_EXCEEDED
    os.close(hold_at_last(caller, attached))
    assert caller.detach(attached.path) is True


TAKES_OUT_SLOWLY = """
import threading
from loopd.daemon.host import fd_store as fdstore

_kept = threading.Event()

def _keep(self, name, fd, _is=fdstore.FdStore.keep):
    found = _is(self, name, fd)
    if name.endswith(".lock2"):
        _kept.set()
    return found

def _take_out(self, name, _is=fdstore.FdStore._take_out):
    if name.endswith(".lock1"):
        _kept.wait(0.1)
    _is(self, name)

fdstore.FdStore.keep, fdstore.FdStore._take_out = _keep, _take_out
"""
"""The first lock is taken out after the second one was put in, if that is not waited for."""


def test_a_lock_is_out_of_the_store_before_the_next_one_is_in(
    new_unit: Callable[..., Service],
) -> None:
    unit = new_unit(maximum=2)
    unit.prelude = TAKES_OUT_SLOWLY
    unit.start()
    caller = unit.caller()
    attached = caller.attach(unit.image(), lock="exclusive")
    for kind in ("none", "exclusive"):
        caller.device(attached.path, "Lock", "sa{sv}", kind, {})
    assert len(unit.store.names()) == 2
    assert unit.store.complaints == []
    assert caller.detach(attached.path) is True


def hold_at_last(caller: Caller, attached: Attached) -> int:
    """Hold a device once there is room, which loopd has to notice first."""
    deadline = Deadline()
    while True:
        try:
            return hold(caller, attached)
        except CallError as exc:
            if exc.name != LIMITS_EXCEEDED or not deadline.remaining:
                raise


# Locks


def test_a_lock_lasts_while_loopd_is_away(unit: Service) -> None:
    caller, other = unit.caller(), unit.caller()
    attached = caller.attach(unit.image(), lock="exclusive")
    shared = caller.attach(unit.image())
    lock(caller, shared, "shared")

    def is_free(device: Attached, operation: int = fcntl.LOCK_EX) -> bool:
        with opened(device) as fd:
            try:
                fcntl.flock(fd, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    unit.kill()
    assert not is_free(attached)
    assert not is_free(shared)
    unit.start()
    assert not is_free(attached)
    assert is_free(shared, fcntl.LOCK_SH)
    assert seen(unit)[label(attached)]["Locked"] == "exclusive"
    with pytest.raises(CallError) as failure:
        other.device(attached.path, "Lock", "sa{sv}", "shared", {})
    assert failure.value.name == DEVICE_BUSY
    # It is the caller's to change.
    caller.device(attached.path, "Lock", "sa{sv}", "none", {})
    deadline = Deadline()
    while not is_free(attached):
        assert deadline.remaining
    assert seen(unit)[label(attached)]["Locked"] == "none"
    unit.crash()
    while not is_free(attached):  # udev may look at it
        assert deadline.remaining
    # And ends with the connection.
    lock(other, attached, "exclusive")
    unit.kill()
    other.kill()
    unit.start()
    while not is_free(attached):
        assert deadline.remaining
    assert caller.detach(attached.path) is True
    assert caller.detach(shared.path) is True


LATER = """
import time
for _name, _unit in (("time", 1), ("monotonic", 1), ("time_ns", 10**9), ("monotonic_ns", 10**9)):
    setattr(time, _name, lambda _is=getattr(time, _name), _by=300 * _unit: _is() + _by)
for _name, _unit in (("clock_gettime", 1), ("clock_gettime_ns", 10**9)):
    setattr(time, _name, lambda clock, _is=getattr(time, _name), _by=300 * _unit: _is(clock) + _by)
"""
"""Five minutes have gone by."""


def test_the_time_of_an_exclusive_lock_does_not_begin_anew(unit: Service) -> None:
    caller, root = unit.caller(), unit.caller(None)
    attached, other = caller.attach(unit.image(), lock="exclusive"), root.attach(unit.image())
    lock(root, other, "exclusive")
    unit.crash()
    assert seen(unit)[label(attached)]["Locked"] == "exclusive"
    unit.crash(prelude=LATER)
    deadline = Deadline()
    while seen(unit)[label(attached)]["Locked"] != "none":
        assert deadline.remaining
    assert seen(unit)[label(other)]["Locked"] == "exclusive"
    assert caller.detach(attached.path) is True
    assert root.detach(other.path) is True


# Block devices that need no loop device


def test_a_block_device_that_needs_no_loop_device_is_still_its_owners(unit: Service) -> None:
    caller, other = unit.caller(), unit.caller("games")
    with foreign(unit) as disk:
        os.chown(disk.node, UID, -1)
        try:
            first, second = caller.attach(disk.node), caller.attach(disk.node)
            assert first.path.count("_") == 2
            before = seen(unit)
            assert {*before} == {label(first), label(second)}
            for end in (crash, restart):
                end(unit)
                assert seen(unit) == before
                assert seen(unit, "games") == {}
            third = caller.attach(disk.node)
            assert third.path not in (first.path, second.path)
            assert caller.detach(first.path) is True
            unit.kill()
            caller.kill()
            unit.start()
            wait_seen(unit)
        finally:
            os.chown(disk.node, 0, -1)
    other.close()


def test_a_medium_that_is_changed_meanwhile_is_nobodys(unit: Service) -> None:
    caller = unit.caller()
    with foreign(unit) as disk:
        os.chown(disk.node, UID, -1)
        try:
            attached = caller.attach(disk.node)
        finally:
            os.chown(disk.node, 0, -1)
        unit.kill()
        for name in unit.store.names():
            unit.store.lose(name)
    # Bound anew, very likely with the same number.
    with foreign(unit) as disk:
        unit.start()
        wait_seen(unit)
        with pytest.raises(CallError):
            caller.detach(attached.path)


UNREADABLE = """
from loopd.loop import backing_file as backing

def _block(major, minor):
    raise OSError(19, "the disk is just being removed")

backing.block = _block
"""


def test_a_block_device_that_cannot_be_looked_at_is_let_go(unit: Service) -> None:
    caller = unit.caller()
    with foreign(unit) as disk:
        os.chown(disk.node, UID, -1)
        try:
            first, second = caller.attach(disk.node), caller.attach(disk.node, offset=4096)
        finally:
            os.chown(disk.node, 0, -1)
        unit.crash(prelude=UNREADABLE)
        wait_seen(unit)
        assert not is_bound(second)
        with pytest.raises(CallError):
            caller.detach(first.path)


def test_somebody_elses_over_a_disk_that_cannot_be_looked_at_harms_nobody(unit: Service) -> None:
    caller = unit.caller(None)
    unit.stop()
    with foreign(unit) as disk:
        node = loops.losetup(disk.node, "--offset", "4096")
        try:
            unit.start(prelude=UNREADABLE)
            assert caller.manager("GetDeviceByNode", "s", node)
        finally:
            subprocess.run(["losetup", "--detach", node], check=True)


# Garbage


def test_garbage_in_the_store_is_taken_out_and_harms_nobody(unit: Service) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.image(), lock="shared")
    holding = hold(caller, attached)
    before, names = seen(unit), unit.store.names()
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with foreign(unit) as disk, ours, theirs:
        unit.kill()
        for number, fd in enumerate((theirs.fileno(), reading, writing)):
            unit.store.put(f"{label(attached)}.hold{number + 8}", fd)
        for index, name in enumerate(
            (
                f"loop{disk.number}_{disk.diskseq}",
                f"loop{disk.number}_{disk.diskseq}.lock",
                f"{label(attached)}.hold7",
                f"{label(attached)}.hold",
                f"{label(attached)}.",
                f"{label(attached)}.lock.lock",
                "stored",
                "",
                ".",
                "../../etc/passwd",
                "loop0",
                "loop99999999999999999999_1",
                "a b",
            )
        ):
            with ExitStack() as files:
                # Each a file of its own, for of copies a store keeps one.
                for node in (disk.node, os.devnull, attached.node)[index % 3 :]:
                    file = files.enter_context(open(node, "rb"))
                    unit.store.put(name, file.fileno())
        unit.start()
        after = seen(unit)
        assert {*after} == {*before}
        assert after[label(attached)]["Locked"] == "shared"
        deadline = Deadline()
        while unit.store.names() != names:
            assert deadline.remaining, unit.store.names()
            seen(unit)
    assert caller.detach(attached.path) is True
    assert not is_bound(attached)
    for fd in (reading, writing, holding):
        os.close(fd)


@pytest.mark.parametrize("wrong", ["disk", "null"])
@pytest.mark.parametrize("what", ["", "lock", "hold"])
def test_an_fd_in_the_store_that_is_something_else_is_not_taken_for_ours(
    unit: Service, what: str, wrong: str
) -> None:
    caller = unit.caller()
    attached = caller.attach(unit.image(), lock="exclusive")
    holding = hold(caller, attached)
    with foreign(unit) as disk:
        unit.kill()
        (name,) = [
            it for it in unit.store.names() if it.partition(".")[2].rstrip("0123456789") == what
        ]
        unit.store.lose(name)
        with open(disk.node if wrong == "disk" else os.devnull, "rb") as file:
            unit.store.put(name, file.fileno())
        unit.start()
        devices = seen(unit)
        assert {*devices} <= {label(attached)}
        for it in devices.values():
            assert it["Holds"] == (0 if what == "hold" else 1)
            assert it["Locked"] == ("none" if what == "lock" else "exclusive")
        with suppress(CallError):
            caller.detach(attached.path)
        wait_seen(unit)
    wait_end(holding)


GARBAGE = {
    "empty": b"",
    "truncated": None,
    "binary": bytes(range(256)),
    "another type": b"[]",
    "null": b"null",
    "a number": b"17",
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "of the future": {"format": 99},
    "with wrong values": {"number": "seven", "binding": [], "owner": None},
    "with huge values": {"number": 1 << 80, "binding": -1, "owner": 1 << 70},
    "with a number that is none": {"file_block": -1},
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_record_that_is_garbage_harms_nobody(unit: Service, kind: str) -> None:
    caller = unit.caller()
    broken, kept = caller.attach(unit.image()), caller.attach(unit.image())
    unit.kill()
    (path,) = (unit.runtime_directory / RECORDS).glob(f"{label(broken)}*")
    text = path.read_bytes()
    match GARBAGE[kind]:
        case None:
            path.write_bytes(text[: len(text) // 2])
        case bytes(data):
            path.write_bytes(data)
        case dict(fields):
            path.write_text(json.dumps(json.loads(text) | fields))
    with foreign(unit):
        unit.start()
        wait_seen(unit, kept)
        assert not is_bound(broken)
        assert caller.detach(kept.path) is True


def test_what_else_lies_among_the_records_harms_nobody(unit: Service) -> None:
    caller = unit.caller()
    kept = caller.attach(unit.image(), lifetime="system")
    directory = unit.runtime_directory / RECORDS
    unit.kill()
    (path,) = directory.glob(f"{label(kept)}*")
    record = json.loads(path.read_text())
    with foreign(unit) as disk:
        binding = kernel.loop_binding(disk.number)
        # Of a number that is bound to something else, and of one that is not there.
        for number, bound in ((disk.number, 1), (1 << 19, binding)):
            other = path.with_name(path.name.replace(f"loop{kept.number}_", f"loop{number}_"))
            other.write_text(
                json.dumps(record | {"name": f"loop{number}", "number": number, "binding": bound})
            )
        (directory / "a-directory").mkdir()
        (directory / f"{path.name}.tmp").write_bytes(path.read_bytes()[:20])
        (directory / f".{path.name}.abc").write_bytes(b"")
        Path(os.fsdecode(os.fsencode(directory) + b"/\xff")).write_bytes(b"")
        (directory / "link").symlink_to("/etc/passwd")
        unit.start()
        assert {*seen(unit)} == {label(kept)}
        (directory / "a-directory").rmdir()
        wait_seen(unit, kept)
        assert unit.records() == [path.name]
        assert Path("/etc/passwd").exists()
        assert caller.detach(kept.path) is True


# What is not kept


def test_a_file_that_may_hang_is_not_kept(unit: Service) -> None:
    caller = unit.caller()
    with Fuse() as fuse:
        fd = fuse.open()
        attached = caller.attach(fd)
        os.close(fd)
        holding = hold(caller, attached)
        assert [name for name in unit.store.names() if ".hold" not in name] == []
        unit.kill()
        loops.wait_unbound(attached.number, attached.diskseq)
        unit.start()
        wait_end(holding)
        wait_seen(unit)


def test_an_attach_that_was_under_way_is_nobodys(unit: Service) -> None:
    caller = unit.caller()
    unit.polkit.default = Answer.HANG
    call = caller.attach_begin(unit.image())
    unit.polkit.wait_question()
    unit.crash()
    with pytest.raises(CallError, match="NoReply"):
        call.end()
    wait_seen(unit)


def test_what_stays_is_with_systemd_again_after_a_stop(unit: Service) -> None:
    caller = unit.caller()
    kept = caller.attach(unit.image(), lifetime="system")
    unit.stop()
    assert unit.store.fds() == []
    unit.start()
    lock(caller, kept, "exclusive")
    unit.crash()
    assert caller.get(kept.path, "Locked") == "exclusive"
    caller.detach(kept.path)


def test_partitions_that_went_while_nobody_had_the_device_open_are_there_again(
    unit: Service,
) -> None:
    """udev has the kernel read the table then, and not every kernel can."""
    caller = unit.caller()
    kept = caller.attach(unit.gpt(), lifetime="system", partition_scan=True)
    before = caller.get(kept.path, "Partitions")
    unit.stop()
    with opened(kept) as fd:
        for number, *_ in before:
            with suppress(OSError):  # udev was faster
                kernel.blkpg_del_partition(fd, number)
    assert loops.partitions(kept.number) == ()
    unit.start()
    wait_seen(unit, kept)
    assert caller.get(kept.path, "Partitions") == before != []
    caller.detach(kept.path)
