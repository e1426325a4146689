# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a device is kept: by its client, by its user's being there, and by Holds beside them."""

import errno
import fcntl
import os
import pwd
import select
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from loopd.loop import kernel
from tests.harness import loops
from tests.harness.caller import DEVICE, MANAGER, Attached, Caller
from tests.harness.deadline import Deadline
from tests.harness.logind import LogindDouble, send_user_removed
from tests.harness.polkit import Answer
from tests.harness.raw import BUS
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER, World

# Lifetimes are above the reading and writing of messages.
pytestmark = pytest.mark.one_library

LOOP1 = f"{MANAGER}.Error"
MANAGE_OTHERS = "org.example.loop1.manage-others"
KEEP = "org.example.loop1.keep"
SIZE = 4096
UID, OTHER_UID = (pwd.getpwnam(name).pw_uid for name in (USER, OTHER))


def attach(world: World, caller: Caller, **options: Any) -> Attached:
    return caller.attach(world.image(SIZE, mode=0o666), **options)


def error_of(call: Callable[..., Any], *args: Any, **named: Any) -> str:
    with pytest.raises(CallError) as caught:
        call(*args, **named)
    return caught.value.name


@contextmanager
def held(caller: Caller, attached: Attached) -> Iterator[int]:
    """A Hold of the device, as an fd of this process; closed at the end unless it was before."""
    (remote,) = caller.device(attached.path, "Hold", "a{sv}", {})
    fd = remote.fetch()
    remote.close()
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def at_end(fd: int) -> bool:
    """Whether the Hold says that its device is gone."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def wait_end(fd: int) -> None:
    """Wait until it says so."""
    Deadline().wait_readable([fd], "the end of the device")
    assert os.read(fd, 1) == b""


def wait_removed(witness: Caller, attached: Attached) -> None:
    witness.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)


def wait_changed(witness: Caller, attached: Attached, name: str, value: object) -> None:
    """Wait for a change of a property."""
    witness.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1].get(name) == value,
    )


@pytest.fixture
def logind(world: World) -> Iterator[LogindDouble]:
    """One that knows both users."""
    with LogindDouble(world.bus, UID, OTHER_UID) as double:
        yield double


# Holds


def test_a_held_device_outlives_its_client_until_the_last_copy_is_closed(world: World) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    with held(client, attached) as fd:
        assert witness.get(attached.path, "Holds") == 1
        copy = os.dup(fd)
        client.kill()
        wait_changed(witness, attached, "Holder", "")
        told = witness.get_all(attached.path)
        assert (told["State"], told["Lifetime"], told["Holds"]) == ("attached", "connection", 1)
        os.close(fd)
        # Whatever the close could cause would have come before this answer.
        assert witness.get(attached.path, "Holds") == 1
        assert loops.loop_is_bound(attached.number)
        os.close(copy)
        wait_removed(witness, attached)


def test_a_hold_that_ends_before_its_client_ends_nothing(world: World) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    with held(client, attached):
        assert client.get(attached.path, "Holds") == 1
    wait_changed(witness, attached, "Holds", 0)
    assert client.get(attached.path, "State") == "attached"
    client.kill()
    wait_removed(witness, attached)


def test_several_holds_keep_a_device_together(world: World) -> None:
    client, again, witness = world.caller(), world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    with held(client, attached) as first:
        client.kill()
        wait_changed(witness, attached, "Holder", "")
        # Any process of the owner's may take one, also when nothing else keeps the device.
        with held(again, attached) as second:
            assert witness.get(attached.path, "Holds") == 2
            os.close(first)
            wait_changed(witness, attached, "Holds", 1)
            assert not at_end(second)
        wait_removed(witness, attached)


def test_the_end_of_the_file_tells_of_the_end_of_the_device(world: World) -> None:
    client = world.caller()
    attached = attach(world, client)
    with held(client, attached) as first, held(client, attached) as second:
        opened = client.open_device(attached.path, "r")
        assert client.detach(attached.path) is False
        # It is detaching, and not gone.
        assert client.get(attached.path, "State") == "detaching"
        assert not at_end(first)
        assert error_of(client.device, attached.path, "Hold", "a{sv}", {}) == (
            f"{LOOP1}.NoSuchDevice"
        )
        opened.close()
        wait_end(first)
        wait_end(second)


def test_only_the_owner_may_hold_a_device(world: World) -> None:
    client, other, root = world.caller(), world.caller(OTHER), world.caller(None)
    attached = attach(world, client)
    for caller in (other, root):
        assert error_of(caller.device, attached.path, "Hold", "a{sv}", {}) == (
            f"{BUS}.Error.AccessDenied"
        )
    assert world.polkit.questions == world.polkit.questions[:1]
    option = {"x": Variant("b", True)}
    assert error_of(client.device, attached.path, "Hold", "a{sv}", option) == (
        f"{BUS}.Error.InvalidArgs"
    )


def test_holds_have_a_limit_for_each_user_and_in_all(new_world: Callable[..., World]) -> None:
    """Quota dodges."""
    world = new_world(config="[limits]\nholds_per_user = 3\nholds = 5\n")
    client, other, root = world.caller(), world.caller(OTHER), world.caller(None)
    again = world.caller()
    of = {caller: attach(world, caller) for caller in (client, other, root)}
    with held(client, of[client]) as first, held(again, of[client]), held(client, of[client]):
        for caller in (client, again):
            with pytest.raises(CallError, match="3 Holds already") as caught:
                caller.device(of[client].path, "Hold", "a{sv}", {})
            assert caught.value.name == f"{BUS}.Error.LimitsExceeded"
        with held(other, of[other]), held(other, of[other]):
            for caller in (other, root):
                with pytest.raises(CallError, match="5 Holds in use"):
                    caller.device(of[caller].path, "Hold", "a{sv}", {})
            os.close(first)
            wait_changed(other, of[client], "Holds", 2)
            with held(root, of[root]):
                pass


def test_a_hold_taken_by_a_client_that_dies_with_it_keeps_nothing(world: World) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    call = client.call_begin(attached.path, DEVICE, "Hold", "a{sv}", {})
    del call
    client.kill()
    wait_removed(witness, attached)


def refused(call: Callable[[], object]) -> int:
    """The errno with which something fails; 0 if it does not."""
    try:
        call()
    except OSError as exc:
        return exc.errno or 0
    return 0


def test_a_hold_takes_nothing_of_roots_memory_for_pipes(world: World) -> None:
    """Root's share of pipes: a Hold is none that its user could make larger."""
    client = world.caller()
    with held(client, attach(world, client)) as fd:
        assert refused(lambda: fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)) == errno.EBADF


def test_nothing_can_be_sent_to_loopd_through_a_hold(world: World) -> None:
    """Root's share of pipes: a Hold is a socket instead, whose other end is loopd's."""
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    before = world.daemon.fd_count()
    with held(client, attached) as fd, socket.socket(fileno=os.dup(fd)) as theirs:
        hidden = socket.socketpair()
        with hidden[0], hidden[1] as inside, tempfile.TemporaryFile() as file:
            file.write(b"x")
            file.flush()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", inside.fileno()))]
            for send in (
                lambda: theirs.send(b"x", socket.MSG_NOSIGNAL),
                lambda: theirs.send(b"x", socket.MSG_OOB | socket.MSG_NOSIGNAL),
                lambda: theirs.sendmsg([b"x"], rights, socket.MSG_NOSIGNAL),
                lambda: os.write(fd, b"x"),
                lambda: os.sendfile(fd, file.fileno(), 0, 1),
            ):
                assert refused(send) == errno.EPIPE
        name = f"\0loopd-test-{os.getpid()}"
        assert refused(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR)) == errno.ENXIO
        assert refused(lambda: theirs.connect(name)) in (errno.EISCONN, errno.ECONNREFUSED)
        assert refused(theirs.accept) == errno.EINVAL
        assert refused(theirs.listen) == errno.EINVAL
        theirs.bind(name)
        assert refused(theirs.listen) == errno.EINVAL
        assert refused(lambda: theirs.connect(name)) in (errno.EISCONN, errno.ECONNREFUSED)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            theirs.setsockopt(socket.SOL_SOCKET, option, 1 << 30)
        theirs.shutdown(socket.SHUT_WR)
        assert witness.get(attached.path, "Holds") == 1
        assert not at_end(fd)
        assert world.daemon.fd_count() == before + 1
    wait_changed(witness, attached, "Holds", 0)


def test_a_hold_that_is_shut_down_is_over(world: World) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    with held(client, attached) as fd:
        client.kill()
        wait_changed(witness, attached, "Holder", "")
        with socket.socket(fileno=os.dup(fd)) as theirs:
            theirs.shutdown(socket.SHUT_RD)
        wait_removed(witness, attached)


def test_holds_keep_loopd_asleep(world: World) -> None:
    """A socket whose other end cannot send can be read at any time, as it is at its end."""
    client = world.caller()
    with held(client, attach(world, client)):
        deadline = Deadline()
        # A loopd that is told of it over and over never sleeps there.
        while not sleeps(world.daemon.pid):
            assert deadline.remaining
            os.sched_yield()


def sleeps(pid: int) -> bool:
    """Whether a process's first thread waits for events."""
    task = Path(f"/proc/{pid}/task/{pid}")
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    return state == "S" and (task / "wchan").read_text() in {"ep_poll", "do_epoll_wait"}


# The user's being there


def test_a_device_of_a_user_stays_until_logind_forgets_the_user(
    world: World, logind: LogindDouble
) -> None:
    client, other, witness = world.caller(), world.caller(OTHER), world.caller(None)
    attached = attach(world, client, lifetime="user")
    of_other = attach(world, other, lifetime="user")
    details = [question.details["lifetime"] for question in world.polkit.questions]
    assert details == ["user", "user"]
    for caller in (client, other):
        caller.kill()
        world.bus.wait_released(caller.unique_name)
    told = witness.get_all(attached.path)
    assert (told["State"], told["Lifetime"], told["Holder"]) == ("attached", "user", "")
    logind.remove(UID)
    wait_removed(witness, attached)
    assert witness.get(of_other.path, "State") == "attached"
    logind.remove(OTHER_UID)
    wait_removed(witness, of_other)


def test_a_user_without_a_session_gets_no_such_device(world: World, logind: LogindDouble) -> None:
    logind.users.discard(UID)
    client = world.caller()
    assert error_of(attach, world, client, lifetime="user") == f"{LOOP1}.NotSupported"
    attached = attach(world, client)
    arguments = (attached.path, "SetLifetime", "sa{sv}", "user", {})
    assert error_of(client.device, *arguments) == f"{LOOP1}.NotSupported"


def test_without_logind_there_is_no_such_lifetime(world: World) -> None:
    with pytest.raises(CallError, match="no logind") as caught:
        attach(world, world.caller(), lifetime="user")
    assert caught.value.name == f"{LOOP1}.NotSupported"


def test_a_user_who_left_while_it_was_attached_has_no_device(
    world: World, logind: LogindDouble
) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    world.polkit.reset(Answer.HANG)
    call = client.attach_begin(world.image(SIZE), lifetime="user")
    world.polkit.wait_question()
    logind.remove(UID)
    world.polkit.release(Answer.ALLOW)
    attached = Attached(*call.end())
    loops.used_numbers.add(attached.number)
    wait_removed(witness, attached)


def test_nobody_but_logind_says_that_a_user_has_left(world: World, logind: LogindDouble) -> None:
    client, liar = world.caller(), world.raw(OTHER)
    attached = attach(world, client, lifetime="user")
    asker, asked = world.polkit.questions[0].asker, len(logind.asked)
    for _ in range(20):
        send_user_removed(liar, UID, asker)
        send_user_removed(liar, UID)
    liar.call_bus("GetId")
    # What logind says next comes after that, and loopd asks.
    logind.remove(OTHER_UID)
    deadline = Deadline()
    while len(logind.asked) == asked:
        assert deadline.remaining
        client.get(attached.path, "State")
    # Of what the liar sent it took no notice, or it would have asked once more.
    assert len(logind.asked) == asked + 1
    assert client.get(attached.path, "State") == "attached"
    client.detach(attached.path)


def test_a_logind_that_starts_again_is_asked_anew(world: World) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    with LogindDouble(world.bus, UID):
        attached = attach(world, client, lifetime="user")
    client.kill()
    assert witness.get(attached.path, "State") == "attached"
    with LogindDouble(world.bus):
        wait_removed(witness, attached)


@pytest.mark.parametrize("error", [f"{BUS}.Error.Failed", f"{BUS}.Error.NoReply", "org.example.No"])
def test_a_logind_that_errs_says_of_nobody_that_they_have_left(
    world: World, logind: LogindDouble, error: str
) -> None:
    client = world.caller()
    attached = attach(world, client, lifetime="user")
    logind.error = error
    # It asks once at a time: what came of the first answer is done when it asks again.
    for _ in range(2):
        asked = len(logind.asked)
        logind.remove(OTHER_UID)
        deadline = Deadline()
        while len(logind.asked) == asked:
            assert deadline.remaining
            client.get(attached.path, "State")
    assert client.get(attached.path, "State") == "attached"
    assert client.get(attached.path, "Lifetime") == "user"
    client.detach(attached.path)


def test_a_hold_keeps_the_device_of_a_user_who_left(world: World, logind: LogindDouble) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client, lifetime="user")
    with held(client, attached) as fd:
        logind.remove(UID)
        send_user_removed(world.raw(None), UID)
        while not any("is kept by 1 Holds" in line for line in world.daemon.log.splitlines()):
            witness.get(attached.path, "State")
        assert witness.get(attached.path, "State") == "attached"
        os.close(fd)
        wait_removed(witness, attached)


# SetLifetime


def set_lifetime(caller: Caller, attached: Attached, lifetime: str) -> None:
    caller.device(attached.path, "SetLifetime", "sa{sv}", lifetime, {})


def test_a_lifetime_can_be_changed_and_bound_to_another_connection(
    world: World, logind: LogindDouble
) -> None:
    client, again, witness = world.caller(), world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    set_lifetime(client, attached, "user")
    told = witness.get_all(attached.path)
    assert (told["Lifetime"], told["Holder"]) == ("user", "")
    client.kill()
    world.bus.wait_released(client.unique_name)
    set_lifetime(again, attached, "connection")
    told = witness.get_all(attached.path)
    assert (told["Lifetime"], told["Holder"]) == ("connection", again.unique_name)
    logind.remove(UID)
    assert witness.get(attached.path, "State") == "attached"
    again.kill()
    wait_removed(witness, attached)


def test_a_device_that_only_holds_keep_can_be_bound_again(world: World) -> None:
    client, again, witness = world.caller(), world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    with held(client, attached):
        client.kill()
        wait_changed(witness, attached, "Holder", "")
        set_lifetime(again, attached, "connection")
    wait_changed(witness, attached, "Holds", 0)
    assert witness.get(attached.path, "State") == "attached"
    again.kill()
    wait_removed(witness, attached)


def test_who_may_change_the_lifetime_of_another_users_device(
    world: World, logind: LogindDouble
) -> None:
    client, other = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    denied = f"{BUS}.Error.AccessDenied"
    assert error_of(set_lifetime, other, attached, "connection") == denied
    world.polkit.on(MANAGE_OTHERS, Answer.DENY)
    assert error_of(set_lifetime, other, attached, "user") == denied
    world.polkit.on(MANAGE_OTHERS, Answer.ALLOW)
    set_lifetime(other, attached, "user")
    told = client.get_all(attached.path)
    assert (told["Lifetime"], told["Owner"]) == ("user", UID)
    logind.remove(UID)
    wait_removed(other, attached)


@pytest.mark.parametrize(
    ("lifetime", "error"),
    [
        ("", f"{BUS}.Error.InvalidArgs"),
        ("for ever", f"{BUS}.Error.InvalidArgs"),
    ],
)
def test_other_lifetimes_are_refused(world: World, lifetime: str, error: str) -> None:
    client = world.caller()
    attached = attach(world, client)
    assert error_of(set_lifetime, client, attached, lifetime) == error
    assert client.get(attached.path, "Lifetime") == "connection"


# Lifetime system


def autoclear(attached: Attached) -> bool:
    """Whether the kernel would detach a device at its last close."""
    return kernel.loop_attribute(attached.number, "loop/autoclear") == b"1"


def test_a_system_device_stays_until_its_owner_detaches_it(world: World) -> None:
    client, again = world.caller(), world.caller()
    attached = attach(world, client, lifetime="system")
    assert [question.action for question in world.polkit.questions] == [KEEP]
    assert world.polkit.questions[0].details["lifetime"] == "system"
    told = again.get_all(attached.path)
    assert (told["Lifetime"], told["Holder"], told["Owner"]) == ("system", "", UID)
    assert not told["Autoclear"]
    assert not autoclear(attached)
    client.kill()
    world.bus.wait_released(client.unique_name)
    assert again.get(attached.path, "State") == "attached"
    assert again.detach(attached.path) is True


def test_nobody_keeps_a_device_whom_polkit_does_not_let(world: World) -> None:
    client = world.caller()
    denied = f"{BUS}.Error.AccessDenied"
    attached = attach(world, client)
    world.polkit.on(KEEP, Answer.DENY)
    assert error_of(attach, world, client, lifetime="system") == denied
    assert error_of(set_lifetime, client, attached, "system") == denied
    assert client.get(attached.path, "Lifetime") == "connection"
    assert autoclear(attached)


def test_a_client_that_dies_while_it_is_asked_keeps_nothing(world: World) -> None:
    client, witness = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    world.polkit.reset(Answer.HANG)
    client.call_begin(attached.path, DEVICE, "SetLifetime", "sa{sv}", "system", {})
    world.polkit.wait_question()
    client.kill()
    world.polkit.release(Answer.ALLOW)
    wait_removed(witness, attached)


def test_a_device_becomes_one_of_the_systems_and_an_ordinary_one_again(
    world: World, logind: LogindDouble
) -> None:
    client, again, witness = world.caller(), world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    set_lifetime(client, attached, "system")
    assert not autoclear(attached)
    client.kill()
    world.bus.wait_released(client.unique_name)
    set_lifetime(again, attached, "system")
    assert not autoclear(attached)
    set_lifetime(again, attached, "user")
    assert autoclear(attached)
    set_lifetime(again, attached, "system")
    set_lifetime(again, attached, "connection")
    assert autoclear(attached)
    again.kill()
    wait_removed(witness, attached)


def test_a_system_devices_autoclear_is_its_owners(world: World) -> None:
    client, other = world.caller(), world.caller(OTHER)
    attached = attach(world, client, lifetime="system")
    world.polkit.reset(Answer.ALLOW)
    for enable in (True, False, False):
        client.device(attached.path, "SetAutoclear", "ba{sv}", enable, {})
        assert autoclear(attached) is enable
        assert client.get(attached.path, "Autoclear") is enable
        # What changes something else leaves it as it is.
        client.device(attached.path, "SetReference", "sa{sv}", f"now {enable}", {})
        assert autoclear(attached) is enable
    assert {question.action for question in world.polkit.questions} == {KEEP}
    world.polkit.on(MANAGE_OTHERS, Answer.DENY)
    denied = f"{BUS}.Error.AccessDenied"
    assert error_of(other.device, attached.path, "SetAutoclear", "ba{sv}", True, {}) == denied
    client.detach(attached.path)


def test_who_manages_the_devices_of_others_may_keep_them(world: World) -> None:
    client, other = world.caller(), world.caller(OTHER)
    attached = attach(world, client)
    world.polkit.reset(Answer.ALLOW)
    set_lifetime(other, attached, "system")
    assert {question.action for question in world.polkit.questions} == {MANAGE_OTHERS}
    told = client.get_all(attached.path)
    assert (told["Lifetime"], told["Owner"]) == ("system", UID)
    client.detach(attached.path)
