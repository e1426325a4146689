# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lock and the option lock: what flock(2) says to others, whose a lock is, and when it ends."""

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness import loops, udev
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached, Caller, Variant
from tests.harness.deadline import Deadline
from tests.harness.polkit import rules_allowing
from tests.harness.raw import BUS
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World, make_world

ERROR = f"{MANAGER}.Error."
INVALID_ARGS = f"{BUS}.Error.InvalidArgs"
KINDS = ("shared", "exclusive")
REFUSED = {"shared": {"exclusive"}, "exclusive": {"shared", "exclusive"}}
"""What nobody else gets while a device is locked."""
OPERATIONS = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX}


def rules() -> str:
    return rules_allowing(
        "org.example.loop1.attach", "org.example.loop1.open-device"
    ) + rules_allowing("org.example.loop1.manage-others", users=(OTHER,))


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with make_world(authority=rules()) as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


@pytest.fixture(scope="module")
def shared_hasty() -> Iterator[World]:
    with make_world(authority=rules(), config="[deadlines]\nexclusive_lock = 1\n") as made:
        yield made


@pytest.fixture
def hasty(shared_hasty: World) -> Iterator[World]:
    """A world where an exclusive lock ends after a second."""
    with shared_hasty.test() as testing:
        yield testing


@pytest.fixture
def owner(world: World) -> Caller:
    return world.caller(USER)


def attach(world: World, caller: Caller, *, user: str | None = USER, **options: Any) -> Attached:
    return caller.attach(world.image(owner=user), **options)


def try_lock(caller: Caller, attached: Attached, kind: str) -> None:
    assert caller.device(attached.path, "Lock", "sa{sv}", kind, {}) == ()


def lock(caller: Caller, attached: Attached, kind: str) -> None:
    """Lock a device; a udevd that probes it just now is waited for, which loopd does not do."""
    deadline = Deadline()
    while True:
        try:
            return try_lock(caller, attached, kind)
        except CallError as exc:
            if "by someone else" not in exc.message or not udev.is_running():
                raise
            if not deadline.remaining:
                raise


@contextmanager
def opened(node: str) -> Iterator[int]:
    """Open a device as root."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked(node: str, kind: str) -> Iterator[None]:
    """Lock a device as anybody may who can open it."""
    with opened(node) as fd:
        subprocess.run(
            ["flock", f"--{kind}", "--timeout", "20", str(fd)], check=True, pass_fds=[fd]
        )
        yield


def refused(attached: Attached) -> set[str]:
    """Return the locks that nobody else gets."""
    found = set()
    for kind, operation in OPERATIONS.items():
        with opened(attached.node) as fd:
            try:
                fcntl.flock(fd, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                found.add(kind)
    return found


def wait_unlocked(attached: Attached) -> None:
    """Wait until somebody else could lock it exclusively."""
    with locked(attached.node, "exclusive"):
        pass


def check(caller: Caller, attached: Attached, kind: str) -> None:
    """Check that a device is locked so, and told to be."""
    assert caller.get(attached.path, "Locked") == kind
    if kind == "none":
        wait_unlocked(attached)
    else:
        assert refused(attached) == REFUSED[kind]


def told(caller: Caller, attached: Attached) -> list[Any]:
    """Return the changes of the lock that a caller has heard of since the last time."""
    found = [it for it in caller.sync_signals() if it.path == attached.path]
    for signal in found:
        caller.signals.remove(signal)
    return [signal.args[1]["Locked"] for signal in found if "Locked" in signal.args[1]]


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> CallError:
    """Return the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value


# What others get


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_is_seen_by_whoever_opens_the_device(world: World, owner: Caller, kind: str) -> None:
    attached = attach(world, owner)
    check(owner, attached, "none")
    lock(owner, attached, kind)
    check(owner, attached, kind)
    # Also by an fd that was there before, and by the owner's own.
    fd = owner.open_device(attached.path, "rw")
    with pytest.raises(BlockingIOError):
        fd.evaluate("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)")
    fd.close()
    lock(owner, attached, "none")
    check(owner, attached, "none")
    assert told(owner, attached) == [kind, "none"]


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_attach_keeps_the_lock_that_it_was_asked_for(
    world: World, owner: Caller, kind: str
) -> None:
    """Proves A10 by the bus: the lock of the attach is kept, downgraded or dropped as asked."""
    attached = attach(world, owner, lock=kind)
    added = owner.wait_signal("InterfacesAdded", lambda it: it.args[0] == attached.path)
    assert added.args[1][DEVICE]["Locked"] == kind
    check(owner, attached, kind)
    assert told(owner, attached) == []


def test_a_locked_device_is_detached_as_any_other(world: World, owner: Caller) -> None:
    for kind in KINDS:
        for options in ({"lock": kind}, {}):
            attached = attach(world, owner, **options)
            if not options:
                lock(owner, attached, kind)
            assert owner.detach(attached.path) is True
            assert not loops.loop_is_bound(attached.number, attached.diskseq)


def test_who_holds_a_lock_is_in_nobodys_way(world: World, owner: Caller) -> None:
    other = world.caller(OTHER)
    for _ in range(3):
        attach(world, owner, lock="exclusive")
    for _ in range(5):
        attached = attach(world, other, user=OTHER)
        assert other.detach(attached.path) is True


# Never waiting


@pytest.mark.parametrize(
    ("theirs", "wanted"),
    [("exclusive", "shared"), ("exclusive", "exclusive"), ("shared", "exclusive")],
)
def test_a_lock_that_others_hold_is_busy_at_once(
    world: World, owner: Caller, theirs: str, wanted: str
) -> None:
    attached = attach(world, owner)
    with locked(attached.node, theirs):
        error = error_of(try_lock, owner, attached, wanted)
        assert error.name == f"{ERROR}DeviceBusy"
        assert attached.node in error.message
        assert owner.get(attached.path, "Locked") == "none"
        assert told(owner, attached) == []
    lock(owner, attached, wanted)
    check(owner, attached, wanted)


def test_the_owners_own_fd_is_in_its_way_too(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    fd = owner.open_device(attached.path, "r")
    fd.evaluate("fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)")
    assert error_of(try_lock, owner, attached, "shared").name == f"{ERROR}DeviceBusy"
    fd.close()
    lock(owner, attached, "shared")


def test_a_former_lock_is_kept_when_the_new_one_cannot_be_had(world: World, owner: Caller) -> None:
    attached = attach(world, owner, lock="shared")
    with locked(attached.node, "shared"):
        for _ in range(3):
            assert error_of(try_lock, owner, attached, "exclusive").name == f"{ERROR}DeviceBusy"
        assert owner.get(attached.path, "Locked") == "shared"
    check(owner, attached, "shared")
    assert told(owner, attached) == []
    lock(owner, attached, "exclusive")
    check(owner, attached, "exclusive")


# Whose it is


def test_a_lock_ends_with_the_device(world: World, owner: Caller) -> None:
    attached = attach(world, owner, lock="exclusive")
    fd = owner.open_device(attached.path, "r")
    assert owner.detach(attached.path) is False
    assert owner.get(attached.path, "Locked") == "none"
    wait_unlocked(attached)
    for kind in KINDS:
        assert error_of(try_lock, owner, attached, kind).name == f"{ERROR}NoSuchDevice"
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_dead_clients_lock_goes_with_its_device(world: World, owner: Caller) -> None:
    for kind in KINDS:
        dying = world.caller(USER)
        attached = attach(world, dying, lock=kind)
        dying.kill()
        loops.wait_unbound(attached.number, attached.diskseq)


def test_nobody_else_locks_it(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    for stranger in (world.caller("mail"), world.caller(OTHER), world.caller(None)):
        for kind in ("none", *KINDS):
            assert error_of(try_lock, stranger, attached, kind).name == f"{BUS}.Error.AccessDenied"
    check(owner, attached, "none")


def test_nobody_locks_what_is_somebody_elses(world: World) -> None:
    done = subprocess.run(
        ["losetup", "--find", "--show", world.image()], check=True, capture_output=True, text=True
    )
    foreign = loops.look_at(int(done.stdout.strip().removeprefix("/dev/loop")))
    assert foreign
    path = f"{MANAGER_PATH}/device/loop{foreign.number}_{foreign.diskseq}"
    try:
        for caller in (world.caller(USER), world.caller(OTHER), world.caller(None)):
            if path not in caller.managed_objects():
                caller.wait_signal("InterfacesAdded", lambda it: it.args[0] == path)
            for kind in ("none", *KINDS):
                error = error_of(caller.device, path, "Lock", "sa{sv}", kind, {})
                assert error.name == f"{ERROR}NotSupported"
    finally:
        loops.detach_leaked(foreign)


# Wrong arguments


@pytest.mark.parametrize("kind", ["", "Shared", "exclusive ", "SHARED", "lock", "un", "shared\n"])
def test_another_word_is_refused(world: World, owner: Caller, kind: str) -> None:
    attached = attach(world, owner)
    for call in (
        lambda: try_lock(owner, attached, kind),
        lambda: owner.attach(world.image(), lock=kind),
    ):
        error = error_of(call)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "lock")
    assert owner.get(attached.path, "Locked") == "none"
    assert world.device_count() == 1


def test_there_are_no_options_yet(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    wrong = {"wait": Variant("b", True)}
    error = error_of(owner.device, attached.path, "Lock", "sa{sv}", "shared", wrong)
    assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "'wait'")
    check(owner, attached, "none")


# The deadline


def test_roots_lock_and_a_shared_one_outlast_an_exclusive_one(hasty: World) -> None:
    root, owner = hasty.caller(None), hasty.caller(USER)
    roots = attach(hasty, root, lock="exclusive")
    sharing = attach(hasty, owner, lock="shared")
    downgraded = attach(hasty, owner, lock="exclusive")
    lock(owner, downgraded, "shared")
    # All of them are older than this one.
    last = attach(hasty, owner, lock="exclusive")
    owner.wait_signal(
        "PropertiesChanged", lambda it: it.path == last.path and it.args[1] == {"Locked": "none"}
    )
    check(root, roots, "exclusive")
    check(owner, sharing, "shared")
    check(owner, downgraded, "shared")
