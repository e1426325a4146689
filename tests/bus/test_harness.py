# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus, the callers, the double of polkit and the daemon's frame, with a stand-in for loopd."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness import area, leaks, wire
from tests.harness.bus import LOOPD, POLKIT, PrivateBus
from tests.harness.caller import DEVICE, Attached, Caller, CallerDiedError, RemoteFd
from tests.harness.daemon import Daemon
from tests.harness.polkit import Answer, PolkitDouble
from tests.harness.process import Process
from tests.harness.raw import BUS, DisconnectedError, RawClient
from tests.harness.wire import CallError, Message, Variant

DEVICE_PATH = "/org/example/Loop1/device/loop3_41"
ATTACH = "org.example.loop1.attach"


@pytest.fixture
def service(bus: PrivateBus) -> Iterator[RawClient]:
    """Owns loopd's name, and does what the test makes it do."""
    with bus.connect() as client:
        client.call_bus("RequestName", "su", [LOOPD, 0])
        yield client


def receive(service: RawClient, member: str) -> Message:
    """Return the next call of a member."""
    return service.receive_where(lambda message: message.member == member, member)


def answer(service: RawClient, call: Message, signature: str = "", *args: Any, **how: Any) -> None:
    """Answer a call."""
    how = {"type": wire.METHOD_RETURN, "flags": wire.NO_REPLY_EXPECTED} | how
    service.send(
        *(None, None, None, signature, args),
        destination=call.sender,
        reply_serial=call.serial,
        **how,
    )


def close(message: Message) -> None:
    """Close the fds of a message."""
    for fd in message.fds:
        os.close(fd)
    message.fds.clear()


# The bus


def test_every_uid_reaches_the_bus_and_is_known_there(bus: PrivateBus) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be someone else")
    with bus.connect("nobody") as nobody, bus.connect() as root:
        (uid,) = root.call_bus("GetConnectionUnixUser", "s", [nobody.unique_name])
        (credentials,) = root.call_bus("GetConnectionCredentials", "s", [nobody.unique_name])
    assert uid == 65534
    assert wire.plain(credentials)["UnixGroupIDs"] == [65534]


def test_an_ordinary_user_can_own_nothing(bus: PrivateBus) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be someone else")
    with bus.connect("nobody") as nobody:
        for name in (LOOPD, POLKIT, "org.example.Other"):
            with pytest.raises(CallError, match="AccessDenied"):
                nobody.call_bus("RequestName", "su", [name, 0])


def test_the_start_of_a_program_that_fails_is_not_waited_for(bus: PrivateBus) -> None:
    with Process(["sh", "-c", "echo no luck; exit 7"], name="failing") as process:
        with pytest.raises(RuntimeError, match=r"ended \(7\)(.|\n)*no luck"):
            bus.wait_owned(LOOPD, process=process)


def test_a_bus_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"did not start(.|\n)*max_nonsense"):
        PrivateBus(limits={"max_nonsense": 1}).__enter__()


def test_the_end_of_the_bus_disconnects_its_clients() -> None:
    with PrivateBus() as bus, bus.connect() as client:
        bus.kill()
        client.wait_disconnected()
    assert not bus.socket_path.exists()


def test_a_service_directory_is_used_for_activation(area: Path) -> None:
    (area / "x.service").write_text(
        f"[D-BUS Service]\nName={LOOPD}\nExec=/bin/sh -c 'touch {area}/started; exit 1'\nUser=root"
    )
    with PrivateBus(servicedirs=[area]) as bus, bus.connect() as client:
        with pytest.raises(CallError, match=r"ChildExited|Spawn"):
            client.call_bus("StartServiceByName", "su", [LOOPD, 0])
    assert (area / "started").exists()


# What of a forgery passes dbus-daemon; said in the docstring of tests.harness.raw


@pytest.mark.parametrize("index", [0, 1, 2**31, 2**32 - 1])
def test_any_fd_index_passes_the_bus(service: RawClient, bus: PrivateBus, index: int) -> None:
    with bus.connect() as client:
        client.send("/a", LOOPD, "Attach", "ha{sv}", [index, {}])
        call = receive(service, "Attach")
    assert call.body == (index, {})
    assert call.fds == []


def test_fewer_fds_than_the_header_says_disconnect(service: RawClient, bus: PrivateBus) -> None:
    with bus.connect() as client:
        client.send("/a", LOOPD, "Attach", "ha{sv}", [0, {}], unix_fds=1)
        client.wait_disconnected()


def test_more_fds_than_the_header_says_go_to_the_next_message(
    service: RawClient, bus: PrivateBus
) -> None:
    with bus.connect() as client, open("/dev/null") as null:
        client.send("/a", LOOPD, "Attach", "ha{sv}", [0, {}], fds=[null.fileno()], unix_fds=0)
        client.send("/b", LOOPD, "Attach", "ha{sv}", [0, {}], unix_fds=1)
        first, second = receive(service, "Attach"), receive(service, "Attach")
        assert (first.path, first.fds) == ("/a", [])
        assert (second.path, len(second.fds)) == ("/b", 1)
        close(second)


def test_too_many_fds_disconnect(service: RawClient, bus: PrivateBus) -> None:
    with bus.connect() as client, open("/dev/null") as null, suppress(DisconnectedError):
        client.send("/a", LOOPD, "Attach", "ha{sv}", [0, {}], fds=[null.fileno()] * 17)
        client.wait_disconnected()


# Callers


def test_a_call_carries_options_flags_and_a_file_of_the_caller(
    service: RawClient, caller: Caller, area: Path
) -> None:
    file = area / "file"
    file.write_bytes(b"0123456789")
    call = caller.attach_begin(file, "r", offset=512, read_only=True, interactive=True)
    message = receive(service, "Attach")
    assert message.flags == wire.ALLOW_INTERACTIVE_AUTHORIZATION
    assert message.sender == caller.unique_name
    assert message.body == (0, {"offset": Variant("t", 512), "read-only": Variant("b", True)})
    assert [os.readlink(f"/proc/self/fd/{fd}") for fd in message.fds] == [str(file)]
    close(message)
    answer(service, message, "ost", DEVICE_PATH, "/dev/loop3", 41)
    assert Attached(*call.end()) == (DEVICE_PATH, "/dev/loop3", 41)


def test_a_caller_opens_files_under_its_own_rights(caller: Caller, area: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be someone else")
    (area / "secret").touch(mode=0o600)
    with pytest.raises(PermissionError):
        caller.attach(area / "secret", "r")
    with pytest.raises(PermissionError):
        caller.open(area / "secret")
    assert caller.evaluate("os.getresuid() + os.getresgid()") == [65534] * 6
    assert caller.evaluate("os.getgroups()") == []


def test_an_fd_of_the_test_is_passed_on(service: RawClient, caller: Caller, area: Path) -> None:
    with (area / "secret").open("w+b") as file:
        call = caller.attach_begin(file.fileno())
        message = receive(service, "Attach")
        assert [os.fstat(fd).st_ino for fd in message.fds] == [os.fstat(file.fileno()).st_ino]
        close(message)
        answer(service, message, "ost", DEVICE_PATH, "/dev/loop3", 41)
        call.end()
        assert caller.adopt(file.fileno()).stat().st_ino == os.fstat(file.fileno()).st_ino


def test_fds_in_replies_stay_with_the_caller(
    service: RawClient, caller: Caller, area: Path
) -> None:
    file = area / "file"
    file.write_bytes(b"0123456789")
    call = caller.call_begin(DEVICE_PATH, DEVICE, "Open", "sa{sv}", "r", {})
    message = receive(service, "Open")
    with file.open("rb") as opened:
        answer(service, message, "h", 0, fds=[opened.fileno()])
    (fd,) = call.end()
    assert isinstance(fd, RemoteFd)
    assert fd.read(4, 3) == b"3456"
    assert fd.stat().st_size == 10
    assert fd.flags() & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(OSError, match="Bad file descriptor"):
        fd.write(b"x")
    copy = fd.fetch()
    try:
        assert os.read(copy, 3) == b"012"
    finally:
        os.close(copy)
    fd.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        fd.stat()


def test_the_end_of_a_pipe_is_seen(caller: Caller) -> None:
    read_end, write_end = os.pipe()
    end = caller.adopt(read_end)
    os.close(read_end)
    with pytest.raises(TimeoutError):
        end.at_end(timeout=0)
    os.close(write_end)
    assert end.at_end()


def test_values_keep_their_types_in_a_reply(service: RawClient, caller: Caller) -> None:
    values: tuple[Any, ...] = (
        {"a": Variant("ay", b"x\0"), "b": Variant("a(us)", [(1, "p")])},
        {3: True},
        [],
    )
    call = caller.call_begin("/", None, "Anything", "a{sv}a{ub}as", *values)
    message = receive(service, "Anything")
    assert message.interface is None
    assert message.body == values
    answer(service, message, "a{sv}a{ub}as", *values)
    reply = call.reply()
    assert (reply.signature, reply.body) == ("a{sv}a{ub}as", values)


def test_an_error_is_raised_with_its_name_and_text(service: RawClient, caller: Caller) -> None:
    call = caller.call_begin("/", LOOPD, "Version")
    answer(
        service,
        receive(service, "Version"),
        *("s", "it is so"),
        type=wire.ERROR,
        error_name=f"{LOOPD}.Error.Failed",
    )
    with pytest.raises(CallError) as caught:
        call.end()
    assert (caught.value.name, caught.value.message) == (f"{LOOPD}.Error.Failed", "it is so")


def test_a_call_that_wants_no_reply_says_so(service: RawClient, caller: Caller) -> None:
    caller.call_begin("/", LOOPD, "Version", no_reply=True)
    assert receive(service, "Version").flags == wire.NO_REPLY_EXPECTED


def test_a_caller_can_be_killed_in_the_midst_of_a_call(
    service: RawClient, bus: PrivateBus, caller: Caller
) -> None:
    call = caller.call_begin("/", LOOPD, "Version")
    receive(service, "Version")
    caller.kill()
    bus.wait_released(caller.unique_name)
    with pytest.raises(CallerDiedError, match="-9"):
        call.end()


def test_a_caller_can_leave_the_bus_and_keep_its_fds(bus: PrivateBus, caller: Caller) -> None:
    null = caller.open("/dev/null", os.O_RDONLY)
    caller.disconnect()
    bus.wait_released(caller.unique_name)
    assert stat.S_ISCHR(null.stat().st_mode)


def test_signals_are_kept_in_their_order_and_taken_one_by_one(
    service: RawClient, caller: Caller
) -> None:
    for number in range(3):
        args = ("/a", f"{LOOPD}.X", "Changed", "u", [number])
        service.send(*args, destination=None, type=wire.SIGNAL)
    one = caller.wait_signal("Changed", lambda signal: signal.args == (1,))
    assert (one.sender, one.path, one.interface) == (service.unique_name, "/a", f"{LOOPD}.X")
    assert [signal.args for signal in caller.sync_signals()] == [(0,), (2,)]
    with pytest.raises(TimeoutError, match="signal Removed"):
        caller.wait_signal("Removed", timeout=0)


# The double of polkit


def ask(client: RawClient, cancellation_id: str = "", flags: int = 0) -> int:
    """Ask the double whether the client itself may attach."""
    return client.send(
        "/org/freedesktop/PolicyKit1/Authority",
        f"{POLKIT}.Authority",
        "CheckAuthorization",
        "(sa{sv})sa{ss}us",
        [
            ("system-bus-name", {"name": Variant("s", client.unique_name)}),
            ATTACH,
            {"size": "512"},
            flags,
            cancellation_id,
        ],
        destination=POLKIT,
    )


@pytest.mark.parametrize(
    ("programmed", "wanted"),
    [
        (Answer.ALLOW, (True, False, {})),
        (Answer.DENY, (False, False, {})),
        (Answer.CHALLENGE, (False, True, {})),
    ],
)
def test_the_double_answers_as_programmed(
    bus: PrivateBus, polkit: PolkitDouble, programmed: Answer, wanted: tuple[Any, ...]
) -> None:
    polkit.on(ATTACH, programmed)
    with bus.connect() as client:
        assert client.reply(ask(client, flags=1)).body == (wanted,)
        (question,) = polkit.questions
        assert question.bus_name == client.unique_name == question.asker
    assert (question.action, question.details) == (ATTACH, {"size": "512"})
    assert question.subject_kind == "system-bus-name"
    assert question.interactive


def test_the_double_fails_or_dies_and_comes_back(bus: PrivateBus, polkit: PolkitDouble) -> None:
    with bus.connect() as client:
        polkit.on(ATTACH, Answer.ERROR)
        assert client.reply(ask(client)).error_name == f"{POLKIT}.Error.Failed"
        polkit.on(ATTACH, Answer.DIE)
        assert client.reply(ask(client)).error_name == f"{BUS}.Error.NoReply"
        assert client.owner_of(POLKIT) is None
        polkit.start()
        polkit.on(ATTACH, Answer.ALLOW)
        assert client.reply(ask(client)).body[0][0]


def test_the_double_hangs_until_released_or_cancelled(
    bus: PrivateBus, polkit: PolkitDouble
) -> None:
    polkit.on(ATTACH, Answer.HANG)
    with bus.connect() as client:
        first, second = ask(client, "one"), ask(client, "two")
        question = polkit.wait_question(ATTACH, count=2)
        assert [each.cancellation_id for each in polkit.open_questions()] == ["one", "two"]
        polkit.release(Answer.DENY, question)
        assert client.reply(second).body == ((False, False, {}),)
        client.call(
            "/org/freedesktop/PolicyKit1/Authority",
            f"{POLKIT}.Authority",
            *("CancelCheckAuthorization", "s", ["one"]),
            destination=POLKIT,
        )
        polkit.wait_cancelled(polkit.questions[0])
        assert client.reply(first).error_name == f"{POLKIT}.Error.Cancelled"


def test_waiting_for_a_question_has_an_end(polkit: PolkitDouble) -> None:
    with pytest.raises(TimeoutError):
        polkit.wait_question(timeout=0)


# The daemon's frame

STAND_IN = f"""
import os
from tests.harness.raw import RawClient
client = RawClient(os.environ["DBUS_SYSTEM_BUS_ADDRESS"])
client.call_bus("RequestName", "su", ["{LOOPD}", 0])
held = []
while True:
    call = client.receive(3600)
    member = call.member
    if member == "Hold":
        held.append(os.open("/dev/null", os.O_RDONLY))
    elif member == "Complain":
        print("Traceback (most recent call last)", flush=True)
    elif member == "Leave":
        os._exit(5)
    if call.type == 1:
        client.send(None, None, None, destination=call.sender, reply_serial=call.serial, type=2)
"""


def tell(bus: PrivateBus, member: str) -> None:
    """Call the stand-in."""
    with bus.connect() as client:
        client.call("/", LOOPD, member)


def test_a_daemon_is_watched_from_outside(bus: PrivateBus) -> None:
    with Daemon(bus, prelude=STAND_IN) as daemon:
        assert daemon.fds()[0] == "/dev/null"
        assert daemon.fd_count() == len(daemon.fds())
        assert daemon.threads() == 1
        assert daemon.children() == []
        assert daemon.rss() > 1 << 20
        with pytest.raises(TimeoutError), daemon.same_fds(timeout=0):
            tell(bus, "Hold")
        with daemon.same_fds():
            tell(bus, "Nothing")
        assert daemon.terminate() == -15


def test_a_daemon_that_cannot_start_says_why(bus: PrivateBus) -> None:
    with pytest.raises(RuntimeError, match=r"ended \(1\)(.|\n)*no kernel"):
        Daemon(bus, prelude="raise SystemExit('no kernel')").__enter__()


def test_a_daemon_that_leaves_fails_the_test_unless_expected(bus: PrivateBus) -> None:
    with Daemon(bus, prelude=STAND_IN) as daemon:
        with pytest.raises(CallError, match="NoReply"):
            tell(bus, "Leave")
        assert daemon.wait() == 5
    leaving = Daemon(bus, prelude=STAND_IN)
    leaving.__enter__()
    with pytest.raises(CallError, match="NoReply"):
        tell(bus, "Leave")
    leaving.process.wait()
    with pytest.raises(AssertionError, match=r"on its own \(5\)"):
        leaving.__exit__(None, None, None)


def test_a_traceback_of_the_daemon_fails_the_test_unless_expected(bus: PrivateBus) -> None:
    with pytest.raises(AssertionError, match="complained"):
        with Daemon(bus, prelude=STAND_IN):
            tell(bus, "Complain")
    with Daemon(bus, prelude=STAND_IN, complaints=True):
        tell(bus, "Complain")


def test_loopd_can_import_only_the_library_it_is_left(
    make_daemon: Callable[..., Daemon], library: str
) -> None:
    (other,) = {"dbus_next", "dbus_fast"} - {library}
    tried = f"import {library}\ntry:\n    import {other}\nexcept ImportError:\n    print('gone')"
    daemon = make_daemon(prelude=tried + STAND_IN)
    assert "gone" in daemon.log


# The watch for leaks


def test_what_a_test_leaves_behind_is_found_and_taken_away() -> None:
    before = leaks.Snapshot.take()
    fd = os.open("/dev/null", os.O_RDONLY)
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
    free = threading.Event()
    thread = threading.Thread(target=free.wait, name="forgotten")
    thread.start()
    found = before.leaks(grace=0)
    free.set()
    thread.join()
    os.close(fd)
    assert found == [f"process {pid} (sleep 1000)", "thread forgotten", f"fd {fd} on /dev/null"]
    assert before.leaks(grace=0) == []


def test_the_orphans_of_a_killed_child_are_waited_for() -> None:
    before = leaks.Snapshot.take()
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as told:
        script = "sleep 1000 & echo $! >&0; wait"
        with Process(["sh", "-c", script], name="parent", stdin=write_end) as parent:
            os.close(write_end)
            orphan = int(told.readline())
            parent.kill()
    os.kill(orphan, 15)
    assert before.leaks() == []
    assert not os.path.exists(f"/proc/{orphan}")


def test_an_area_is_open_to_all_and_goes_with_all_it_holds() -> None:
    with area.area("x") as path:
        assert path.stat().st_mode & 0o777 == 0o755
        (path / "a").mkdir()
        (path / "a" / "b").touch()
    assert not path.exists()
