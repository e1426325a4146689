# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lock and the option lock: what flock(2) says to others, whose a lock is, and when it ends."""

import fcntl
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness import loops, udev
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached, Call, Caller, Variant
from tests.harness.deadline import Deadline
from tests.harness.images import MIB
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
def world_options() -> dict[str, Any]:
    return {"authority": rules()}


@pytest.fixture(scope="module")
def shared_hasty() -> Iterator[World]:
    with make_world(authority=rules(), config="[deadlines]\nexclusive_lock = 1\n") as made:
        yield made


@pytest.fixture
def hasty(shared_hasty: World) -> Iterator[World]:
    """A world where an exclusive lock ends after a second."""
    with shared_hasty.test() as testing:
        yield testing


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


def ended(call: Call) -> str:
    """Wait for a call; return the name of its error, empty if it has none."""
    try:
        call.end()
    except CallError as exc:
        return exc.name
    return ""


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


def test_a_lock_is_changed_in_every_way(world: World, owner: Caller) -> None:
    """Proves A25."""
    attached = attach(world, owner, lock="exclusive")
    ways = ["shared", "none", "exclusive", "none", "shared", "exclusive", "exclusive", "shared"]
    for kind in ways:
        lock(owner, attached, kind)
        check(owner, attached, kind)
    lock(owner, attached, "none")
    lock(owner, attached, "none")
    changes = [kind for kind, last in zip(ways, ["exclusive", *ways], strict=False) if kind != last]
    assert told(owner, attached) == [*changes, "none"]


def test_the_device_works_as_before_while_it_is_locked_and_after(
    world: World, owner: Caller
) -> None:
    attached = attach(world, owner)
    for kind in ("exclusive", "shared", "none", "exclusive", "none"):
        lock(owner, attached, kind)
        assert owner.resize(attached.path, size_limit=8192) == 8192
        assert owner.resize(attached.path, size_limit=0) == MIB
        assert owner.device(attached.path, "SetReference", "sa{sv}", kind, {}) == ()
        assert owner.device(attached.path, "SetSectorSize", "ua{sv}", 4096, {}) == ()
        assert owner.device(attached.path, "SetSectorSize", "ua{sv}", 512, {}) == ()
        assert owner.device(attached.path, "RescanPartitions", "a{sv}", {}) == (0,)
        assert owner.device(attached.path, "Sync", "a{sv}", {}) == ()
        owner.open_device(attached.path, "rw").close()
        assert owner.get(attached.path, "Locked") == kind
    assert owner.detach(attached.path) is True


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
    fd.evaluate("fcntl.flock(fd, fcntl.LOCK_EX)")  # after udev, which may probe it
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


@pytest.mark.parametrize("kind", KINDS)
def test_another_connection_of_the_owner_has_to_wait_for_its_end(
    world: World, owner: Caller, kind: str
) -> None:
    attached = attach(world, owner)
    first, second = world.caller(USER), world.caller(USER)
    lock(first, attached, kind)
    for caller in (second, owner):
        for wanted in ("shared", "exclusive", "none"):
            assert error_of(try_lock, caller, attached, wanted).name == f"{ERROR}DeviceBusy"
    check(owner, attached, kind)
    lock(first, attached, "none")
    lock(second, attached, kind)
    check(owner, attached, kind)
    assert error_of(try_lock, first, attached, "none").name == f"{ERROR}DeviceBusy"


def test_a_lock_of_the_attach_is_of_the_connection_that_attached(
    world: World, owner: Caller
) -> None:
    attached = attach(world, owner, lock="shared")
    second = world.caller(USER)
    for kind in ("none", "shared"):
        assert error_of(try_lock, second, attached, kind).name == f"{ERROR}DeviceBusy"
    lock(owner, attached, "none")
    lock(second, attached, "shared")


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_ends_with_its_connection(world: World, owner: Caller, kind: str) -> None:
    attached = attach(world, owner)
    holder = world.caller(USER)
    lock(holder, attached, kind)
    check(owner, attached, kind)
    holder.kill()
    owner.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1] == {"Locked": "none"},
    )
    check(owner, attached, "none")
    assert loops.loop_is_bound(attached.number, attached.diskseq)
    lock(owner, attached, kind)
    check(owner, attached, kind)


def test_a_lock_of_one_connection_outlives_nothing_of_anothers(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    holder, third = world.caller(USER), world.caller(USER)
    lock(third, attached, "exclusive")
    lock(third, attached, "none")
    lock(holder, attached, "shared")
    third.kill()
    # Its end has been heard of when a later call of another connection is answered.
    world.wait_devices(1)
    check(owner, attached, "shared")


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
    node = loops.losetup(world.image())
    foreign = loops.look_at(int(node.removeprefix("/dev/loop")))
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


def test_another_word_is_refused(world: World, owner: Caller) -> None:
    attached, image = attach(world, owner), world.image()
    for kind in ("", "Shared", "exclusive ", "SHARED", "lock", "un", "shared\n"):
        for error in (
            error_of(try_lock, owner, attached, kind),
            error_of(owner.attach, image, lock=kind),
        ):
            assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "lock"), kind
    assert owner.get(attached.path, "Locked") == "none"
    assert world.device_count() == 1


def test_there_are_no_options_yet(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    wrong = {"wait": Variant("b", True)}
    error = error_of(owner.device, attached.path, "Lock", "sa{sv}", "shared", wrong)
    assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "'wait'")
    check(owner, attached, "none")


# At once


def test_of_two_connections_that_lock_at_once_one_gets_it(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    callers = [world.caller(USER), world.caller(USER)]
    for _ in range(15):
        calls = [
            caller.call_begin(attached.path, DEVICE, "Lock", "sa{sv}", "exclusive", {})
            for caller in callers
        ]
        winners = []
        for caller, call in zip(callers, calls, strict=True):
            if ended(call) == "":
                winners.append(caller)
        assert len(winners) == 1 or udev.is_running()
        if not winners:
            continue
        check(owner, attached, "exclusive")
        lock(winners[0], attached, "none")
        wait_unlocked(attached)


def test_locks_taken_and_dropped_at_once_leave_what_is_told(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    for turn in range(10):
        kinds = ["shared", "none", "exclusive", "shared", "none", "exclusive"][turn % 3 :]
        calls = [
            owner.call_begin(attached.path, DEVICE, "Lock", "sa{sv}", kind, {}) for kind in kinds
        ]
        # One may have been dropped while another was changed.
        assert {ended(call) for call in calls} <= {"", f"{ERROR}DeviceBusy"}
        check(owner, attached, owner.get(attached.path, "Locked"))
        lock(owner, attached, "none")
        wait_unlocked(attached)


def test_a_client_that_leaves_while_it_locks_holds_nothing(world: World, owner: Caller) -> None:
    attached = attach(world, owner)
    for _ in range(10):
        leaving = world.caller(USER)
        leaving.call_begin(attached.path, DEVICE, "Lock", "sa{sv}", "exclusive", {})
        leaving.kill()
        wait_unlocked(attached)
    lock(owner, attached, "exclusive")
    check(owner, attached, "exclusive")


# The deadline


@pytest.mark.parametrize("how", ["attach", "lock"])
def test_an_exclusive_lock_of_an_ordinary_user_ends(hasty: World, how: str) -> None:
    owner = hasty.caller(USER)
    if how == "attach":
        attached = attach(hasty, owner, lock="exclusive")
    else:
        attached = attach(hasty, owner)
        lock(owner, attached, "exclusive")
    owner.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1] == {"Locked": "none"},
    )
    check(owner, attached, "none")
    # udev has its look, and then it can be had again, by any connection of the user's.
    second = hasty.caller(USER)
    deadline = Deadline()
    refusals = 0
    for caller in itertools.cycle((owner, second)):
        try:
            lock(caller, attached, "exclusive")
            break
        except CallError as exc:
            if exc.name != f"{ERROR}DeviceBusy" or not deadline.remaining:
                raise
            refusals += re.search(r"try again in [123] s$", exc.message) is not None
    assert refusals >= 2
    assert owner.get(attached.path, "State") == "attached"


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


def test_a_lock_that_was_taken_anew_ends_too(hasty: World) -> None:
    owner = hasty.caller(USER)
    attached = attach(hasty, owner, lock="exclusive")
    lock(owner, attached, "none")
    lock(owner, attached, "exclusive")
    assert told(owner, attached) == ["none", "exclusive"]
    owner.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1] == {"Locked": "none"},
    )


# What is not as it should be


def test_a_lock_that_was_given_up_is_gone_when_that_is_answered(
    world: World, owner: Caller
) -> None:
    attached = attach(world, owner)
    second = world.caller(USER)
    fd = owner.open_device(attached.path, "r")
    for _ in range(30):
        lock(owner, attached, "exclusive")
        lock(owner, attached, "none")
        # As mkfs or udev would ask.
        assert refused(attached) == set() or udev.is_running()
        try_lock(second, attached, "exclusive")
        try_lock(second, attached, "none")
    fd.close()


def test_an_exclusive_lock_is_not_held_for_longer_by_asking_again(hasty: World) -> None:
    owner = hasty.caller(USER)
    first = attach(hasty, owner, lock="exclusive")
    second = attach(hasty, owner, lock="exclusive")
    while owner.get(second.path, "Locked") == "exclusive":
        # At its end it may be busy with that.
        ended(owner.call_begin(first.path, DEVICE, "Lock", "sa{sv}", "exclusive", {}))
    # It is the older one, so it has ended meanwhile, although it was asked for until now.
    assert "none" in told(owner, first)


def test_udev_looks_at_a_device_before_it_is_locked_again(hasty: World) -> None:
    """Locked again and again: udev tries each 0.2 s, and a user who asks all the time is faster."""
    with udev.Udev() as running:
        owner = hasty.caller(USER)
        attached = attach(hasty, owner, lock="exclusive")
        link = f"/dev/disk/by-diskseq/{attached.diskseq}"
        assert link not in running.links(attached.node)
        owner.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == attached.path and it.args[1] == {"Locked": "none"},
        )
        deadline = Deadline()
        while ended(owner.call_begin(attached.path, DEVICE, "Lock", "sa{sv}", "exclusive", {})):
            assert deadline.remaining
        assert link in running.links(attached.node)


def test_a_former_lock_that_is_lost_to_somebody_else_is_told_to_be(
    world: World, owner: Caller
) -> None:
    for _ in range(20):
        attached = attach(world, owner, lock="shared")
        with opened(attached.node) as third:
            fcntl.flock(third, fcntl.LOCK_SH)
            call = owner.call_begin(attached.path, DEVICE, "Lock", "sa{sv}", "exclusive", {})
            deadline = Deadline(0.2)
            while deadline.remaining:
                try:
                    # While ours is tried for, nobody holds the former one.
                    fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    try:
                        fcntl.flock(third, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        break
            ended(call)
        check(owner, attached, owner.get(attached.path, "Locked"))
        assert owner.detach(attached.path) is True
