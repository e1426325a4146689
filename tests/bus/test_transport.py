# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules that our end of the bus goes by, each broken by some library as shipped.

docs/known-cases.md lists them all, and the tests of those that have them elsewhere.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops, wire
from tests.harness.broker import PrivateBroker
from tests.harness.bus import LOOPD, POLKIT, QUESTIONS, PrivateBus
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached, Caller
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.fake_bus import FakeBus
from tests.harness.images import MIB, memfd
from tests.harness.polkit import Answer, PolkitDouble
from tests.harness.raw import BUS, BUS_PATH, RawClient
from tests.harness.stall import stopped, wait_for_want_of_room
from tests.harness.wire import Variant
from tests.harness.world import OTHER, USER, World

pytestmark = pytest.mark.both_buses

ATTACH = "org.example.loop1.attach"
INTROSPECTABLE = f"{BUS}.Introspectable"
PEER = f"{BUS}.Peer"
LIMITS = f"{BUS}.Error.LimitsExceeded"
NO_REPLY = f"{BUS}.Error.NoReply"
NO_SUCH_DEVICE = f"{LOOPD}.Error.NoSuchDevice"

ROOMY = """
[limits]
calls_per_connection = 1000
calls_per_user = 1000
calls = 1000
"""


def attach(client: RawClient, fd: int) -> Attached:
    body = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd]).body
    attached = Attached(*body)
    loops.used_numbers.add(attached.number)
    return attached


def still_serves(world: World) -> None:
    """See that loopd is there, and takes calls with fds and without."""
    with world.bus.connect(OTHER) as client, memfd() as fd:
        serial = client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd])
        assert client.reply(serial, 5).error_name == NO_SUCH_DEVICE
        client.call(MANAGER_PATH, MANAGER, "ListDevices", timeout=5)
    assert world.daemon.process.status is None


def wait_passed_on(world: World, *senders: RawClient) -> None:
    """Return when the bus has passed on what was sent, by the senders and by doubles.

    dbus-daemon does so in the order in which it came. dbus-broker serves the connections in turn,
    each in its own order, so that several rounds come by all of them.
    """
    with world.bus.connect() as bystander:
        for client in (*senders, *[bystander] * 10):
            client.call_bus("GetId")


@contextmanager
def queued(world: World, *senders: RawClient) -> Iterator[None]:
    """What is sent in the block reaches loopd at once, while the bus reads nothing of loopd's.

    Afterwards loopd has filled its socket, and the bus goes on.
    """
    with ExitStack() as deaf:
        with stopped(world.daemon.pid):
            yield
            wait_passed_on(world, *senders)
            deaf.enter_context(stopped(world.bus.pid))
        wait_for_want_of_room(world.daemon.pid)


# --- 1: the writer -------------------------------------------------------------------------------


def test_200_answers_that_nobody_reads_cost_nobody_the_bus(new_world: Callable[..., World]) -> None:
    """Transport rule 1 (writer): a full socket keeps what is left, and is no lost one."""
    world = new_world(config=ROOMY)
    clients = [world.raw(user) for user in (USER, OTHER, None, "mail") for _ in range(4)]
    for client in clients:
        client.call(MANAGER_PATH, PEER, "Ping")  # loopd knows who it is
    with queued(world, *clients):
        serials = [
            [client.send(MANAGER_PATH, INTROSPECTABLE, "Introspect") for _ in range(13)]
            for client in clients
        ]
    answers = []
    for client, calls in zip(clients, serials, strict=True):
        for serial in calls:
            reply = client.reply(serial)
            # Whoever has more than its share under way may be told so.
            assert reply.error_name in (None, LIMITS)
            answers += [] if reply.error_name else [reply.body[0]]
    assert len(answers) > 20
    assert len(set(answers)) == 1
    assert answers[0].endswith("</node>\n")
    still_serves(world)


OFTEN = """
from loopd.daemon.server import dispatcher as bus
emit = bus.Bus.emit
def often(self, *what, **how):
    for _ in range(500):
        emit(self, *what, **how)
bus.Bus.emit = often
"""


def test_500_signals_in_a_row_cost_nobody_the_bus(new_world: Callable[..., World]) -> None:
    """Transport rule 1 (writer): nor do signals that come faster than the bus takes them."""
    world = new_world(prelude=OFTEN)
    listener, client = world.raw(), world.raw(OTHER)
    listener.add_match(f"type='signal',sender='{LOOPD}',member='InterfacesAdded'")
    world.polkit.on(ATTACH, Answer.HANG)
    with memfd() as fd:
        serial = client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
        world.polkit.wait_question(ATTACH)
        with queued(world):
            world.polkit.release(Answer.ALLOW)
        path, node, _ = client.reply(serial).body
    loops.used_numbers.add(int(node.removeprefix("/dev/loop")))
    listener.call_bus("GetId")
    # Others may have devices of their own.
    told = [each for each in listener.received if each.body and each.body[0] == path]
    assert [each.member for each in told] == ["InterfacesAdded"] * 500
    client.close()
    world.wait_devices(0)
    still_serves(world)


# --- 2: the reader -------------------------------------------------------------------------------


def test_a_message_of_24_mb_is_refused_by_its_header(world: World) -> None:
    """Transport rule 2 (reader): it is neither held nor parsed, and what follows is served."""
    client = world.raw()
    with memfd() as fd:
        client.call(MANAGER_PATH, PEER, "Ping")
        peak = Path(f"/proc/{world.daemon.pid}/clear_refs")
        peak.write_text("5")
        before = peak_rss(world)
        options = {str(number): Variant("s", "x" * 100_000) for number in range(240)}
        serial = client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, options], fds=[fd])
        after = client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd])
        assert client.reply(serial, 5).error_name == LIMITS
        assert client.reply(after, 5).error_name == NO_SUCH_DEVICE
        assert peak_rss(world) - before < 8 * MIB
    still_serves(world)


def peak_rss(world: World) -> int:
    status = Path(f"/proc/{world.daemon.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_each_fd_stays_with_its_message(world: World) -> None:
    """Transport rule 2 (reader): fds belong to their message, however many are read at once."""
    client = world.raw()
    with ExitStack() as stack:
        fds = [stack.enter_context(memfd()) for _ in range(3)]
        attached = [attach(client, fd) for fd in fds]
        others = [world.raw() for _ in range(4)]
        for other in others:
            other.call(MANAGER_PATH, PEER, "Ping")
        asked = []
        with stopped(world.daemon.pid):
            for other in others:
                for fd, device in zip(fds, attached, strict=True):
                    other.send(MANAGER_PATH, PEER, "Ping")
                    serial = other.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd])
                    asked.append((other, serial, device.path))
                    other.send(MANAGER_PATH, MANAGER, "ListDevices")
        for other, serial, path in asked:
            assert other.reply(serial).body == (path,)
        for device in attached:
            client.call(device.path, DEVICE, "Detach", "a{sv}", [{}])


def test_a_message_that_does_not_parse_costs_itself_only(library: str) -> None:
    """Transport rule 2 (reader): it is dropped or refused, and the connection is kept."""
    with FakeBus() as bus, Daemon(bus, library=library) as daemon, memfd() as fd:
        bus.reply(bus.send("Ping", interface=PEER))
        before = daemon.fd_count()
        text = wire.marshal("s", ["loop0"])
        bodies = {
            "a string longer than the body": b"\xff\xff\xff\x7f" + text[4:],
            "nothing": b"",
            "a string that is no text": text.replace(b"loop0", b"lo\xff\xfe0"),
        }
        for what, body in bodies.items():
            serial = bus.send("GetDeviceByNode", "s", body=body)
            assert bus.reply(serial).error_name == f"{BUS}.Error.InvalidArgs", what
        hopeless = Variant("s", "x")
        for _ in range(400):
            hopeless = Variant("v", hopeless)
        bodies_of_options = {
            "nothing": b"",
            "an array longer than the body": wire.marshal("hu", [0, 4096]),
            "a variant of no type": wire.marshal("hu", [0, 12]) + b"\x01\0\0\0k\0\x01?\0\0\0\0",
            "variants without end": wire.marshal("ha{sv}", [0, {"k": hopeless}]),
        }
        for what, body in bodies_of_options.items():
            for _ in range(20):  # more than may be under way
                serial = bus.send("Attach", "ha{sv}", body=body, fds=[fd])
                assert bus.reply(serial).error_name == f"{BUS}.Error.InvalidArgs", what
        for damage in (
            lambda data: data.replace(b"GetDeviceByNode", b"GetDevice\xff\xfeNode"),
            lambda data: data.replace(b"\x03\x01s\0", b"\x03\x01d\0", 1),
            lambda data: data.replace(b"\x07\x01s\0\x04\0\0\0", b"\x07\x01s\0\xff\xff\0\0", 1),
            lambda data: data[:1] + b"\x09" + data[2:],
        ):
            data = build("GetDeviceByNode", bus.next_serial(), text)
            damaged = damage(data)
            assert damaged != data
            bus.send_bytes(damaged)
        # A later version of the protocol may have these.
        bus.send("GetDevice", "h", [0], fds=[fd], type=7)
        serial = bus.send("ListDevices", extra_fields=[(200, Variant("s", "x"))])
        assert bus.reply(serial).error_name in (None, f"{BUS}.Error.InvalidArgs")
        serial = bus.send("GetDevice", "h", [0], fds=[fd])
        assert bus.reply(serial).error_name == NO_SUCH_DEVICE
        deadline = Deadline()
        while daemon.fd_count() != before:
            assert deadline.remaining, daemon.fds()
            bus.reply(bus.send("Ping", interface=PEER))
        daemon.kill()  # nobody would answer it when it says good-bye


def build(member: str, serial: int, body: bytes) -> bytes:
    return wire.build(
        serial=serial,
        path=MANAGER_PATH,
        interface=MANAGER,
        member=member,
        destination=LOOPD,
        signature="s",
        body=body,
        extra_fields=[(wire.SENDER, Variant("s", ":1.7"))],
    )


# --- 3, 4: what comes with a message -------------------------------------------------------------

WATCHED_CLOSE = """
import os, threading
close = os.close
def watched(fd):
    if threading.current_thread() is threading.main_thread():
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            target = ""
        if target.startswith("/memfd:"):
            print("Closed on the event loop: " + target, flush=True)
    close(fd)
os.close = watched
"""


def test_no_fd_of_a_client_is_closed_on_the_event_loop(new_world: Callable[..., World]) -> None:
    """Transport rule 3 (ownership): each is closed, in a thread, whatever the message was."""
    world = new_world(prelude=WATCHED_CLOSE, policies=[])
    client = world.raw()
    with memfd() as fd:
        kinds: list[tuple[str, str, str, list[Any], int]] = [
            (MANAGER, "GetDevice", "h", [0], 1),
            (MANAGER, "GetDevice", "h", [1], 1),
            (MANAGER, "GetDevice", "u", [0], 1),
            (MANAGER, "GetDevice", "h", [0], 3),
            (MANAGER, "ListDevices", "", [], 2),
            (MANAGER, "NoSuchMember", "h", [0], 1),
            (MANAGER, "Attach", "ha{sv}", [0, {"x": Variant("h", 0)}], 1),
            (MANAGER, "Attach", "ha{sv}", [0, {"reference": Variant("s", "x" * 200_000)}], 1),
            (f"{LOOPD}.NoSuch", "Attach", "h", [0], 1),
        ]
        for interface, member, signature, args, count in kinds:
            serial = client.send(MANAGER_PATH, interface, member, signature, args, fds=[fd] * count)
            assert client.reply(serial).type == wire.ERROR, (interface, member)
        client.send(MANAGER_PATH, MANAGER, "Told", "h", [0], fds=[fd], type=wire.SIGNAL)
        client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd], flags=1)
        attached = attach(client, fd)
        client.call(attached.path, DEVICE, "Detach", "a{sv}", [{}])
    world.wait_idle_fds()
    assert "Closed on the event loop" not in world.daemon.log


# --- 5: fds in replies ---------------------------------------------------------------------------


@pytest.mark.both_buses(False)  # dbus-broker passes calls on in another order
def test_the_fds_of_an_answer_stay_open_until_the_bus_has_them(
    new_world: Callable[..., World],
) -> None:
    """Transport rule 5 (reply fds): also while the socket is full, and if the client leaves."""
    world = new_world(config=ROOMY)
    clients = [world.raw(None) for _ in range(13)]
    leaving, staying, *filling = clients
    for client in clients:
        client.call(MANAGER_PATH, PEER, "Ping")
    with memfd() as fd:
        attached = attach(staying, fd)
        idle = len(world.daemon.fds())
        with ExitStack() as deaf:
            with stopped(world.daemon.pid):
                for client in filling:
                    for _ in range(13):
                        client.send(MANAGER_PATH, INTROSPECTABLE, "Introspect")
                # dbus-broker would pass on some of what follows first, to a socket that has room.
                wait_passed_on(world, *filling)
                serials = {
                    client: [
                        client.send(attached.path, DEVICE, "Open", "sa{sv}", ["r", {}])
                        for _ in range(3)
                    ]
                    for client in (leaving, staying)
                }
                wait_passed_on(world, *clients)
                deaf.enter_context(stopped(world.bus.pid))
            wait_for_want_of_room(world.daemon.pid)
            deadline = Deadline()
            while list(world.daemon.fds().values()).count(attached.node) < 7:
                assert deadline.remaining, (idle, world.daemon.fds())
            leaving.close()
        for serial in serials[staying]:
            reply = staying.reply(serial)
            (opened,) = reply.fds
            assert os.fstat(opened).st_rdev == os.stat(attached.node).st_rdev
            os.close(opened)
        staying.call(attached.path, DEVICE, "Detach", "a{sv}", [{}])
    still_serves(world)


def test_little_of_loopds_is_where_nothing_can_go_before_it(library: str) -> None:
    """In a socket of 200 KiB what root is answered would wait for minutes, if the bus is slow."""
    with FakeBus() as bus, Daemon(bus, library=library) as daemon:
        bus.reply(bus.send("Ping", interface=PEER))
        for _ in range(30):
            bus.send("Introspect", interface=INTROSPECTABLE)
        wait_for_want_of_room(daemon.pid)
        assert bus.unread() <= 32 << 10, bus.unread()
        daemon.kill()  # nobody would answer it when it says good-bye


# --- 6: handlers ---------------------------------------------------------------------------------

FAILING = """
from loopd.daemon.server import interface as service
async def failing(self, caller, target, *arguments):
    raise RuntimeError("the secret of /root/file")
service.Service._get_device = service.Service._list_devices = failing
"""


def test_a_bug_of_ours_is_told_to_the_log_and_not_to_the_caller(
    new_world: Callable[..., World],
) -> None:
    """Transport rule 6 (handlers): the answer is a fixed text, and the call's fds are closed."""
    world = new_world(prelude=FAILING, complaints=True)
    client = world.raw()
    with memfd() as fd:
        for _ in range(20):  # more than may be under way
            for member, signature, args, fds in (
                ("GetDevice", "h", [0], [fd]),
                ("ListDevices", "", [], []),
            ):
                serial = client.send(MANAGER_PATH, MANAGER, member, signature, args, fds=fds)
                reply = client.reply(serial)
                assert reply.error_name == f"{LOOPD}.Error.Failed"
                assert "secret" not in reply.body[0]
                assert "Error" not in reply.body[0]
    assert world.daemon.log.count("RuntimeError: the secret of /root/file") == 40


# --- 7, 8: others on the bus ---------------------------------------------------------------------


def become_monitor(client: RawClient) -> None:
    client.call(BUS_PATH, f"{BUS}.Monitoring", "BecomeMonitor", "asu", [[], 0], destination=BUS)


def test_a_starting_loopd_listens_for_ends_before_it_serves(
    bus: PrivateBus, polkit: PolkitDouble, library: str
) -> None:
    """Transport rule 7 (disconnects): one match, before the name is asked for.

    Transport rule 8 (peers): nobody is introspected, and nothing is asked that need not be.
    """
    with bus.connect() as monitor:
        become_monitor(monitor)
        with Daemon(bus, library=library), Caller(bus) as caller:
            with memfd(4096) as image:
                caller.detach(caller.attach(image).path)
        with bus.connect() as last:
            end = last.unique_name
        monitor.receive_where(
            lambda each: each.member == "NameOwnerChanged" and each.body == (end, end, ""),
            "the end",
        )
        said = [each for each in monitor.received if each.type == wire.METHOD_CALL]
    server = next(
        each.sender for each in said if each.member == "RequestName" and each.body[0] == LOOPD
    )
    serving = [str(each.member) for each in said if each.sender == server]
    assert serving == ["Hello", "AddMatch", "GetId", "RequestName", "ReleaseName"]
    match = next(
        each.body[0] for each in said if (each.sender, each.member) == (server, "AddMatch")
    )
    assert {"member='NameOwnerChanged'", "arg2=''", f"sender='{BUS}'"} <= set(match.split(","))
    asker = polkit.questions[-1].asker
    asked = [str(each.member) for each in said if each.sender == asker]
    # The matches are for hints of logind's.
    assert asked == [
        *("Hello", "NameHasOwner", "RequestName", "AddMatch", "AddMatch"),
        *("GetConnectionUnixUser", "CheckAuthorization"),
    ]


def test_fds_in_an_answer_do_not_reach_loopd(new_world: Callable[..., World]) -> None:
    """Transport rule 8 (peers), Transport rule 15 (every connection): the bus refuses them.

    dbus-daemon drops the answer, which is a no. dbus-broker ends the connection that cannot take
    it, and so loopd; polkit, logind and systemd have none in what loopd asks them.
    """
    world = new_world(authority=None, config="[deadlines]\nauthorization = 1\n")
    with world.bus.connect() as peer, memfd() as fd, memfd() as image:
        peer.call_bus("RequestName", "su", [POLKIT, 4])
        client = world.raw()
        serial = client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[image])
        question = peer.receive_where(
            lambda each: each.member == "CheckAuthorization", "the question"
        )
        peer.send(
            *(None, None, None, "(bba{ss})", [(True, False, {})]),
            type=wire.METHOD_RETURN,
            destination=question.sender,
            reply_serial=question.serial,
            fds=[fd, fd, fd],
        )
        assert client.reply(serial).error_name in (f"{BUS}.Error.AccessDenied", NO_REPLY)
        if isinstance(world.bus, PrivateBroker):
            assert world.daemon.wait() == 1
            return
        world.wait_idle_fds()
    assert world.device_count() == 0


# --- 15: every connection ------------------------------------------------------------------------

TELLS_WHAT_IT_READS = """
from loopd.bus import frame
read_header = frame.read_header
def telling(*arguments):
    header = read_header(*arguments)
    if header.member == "Flood":
        print("Parsed a flood's message", flush=True)
    return header
frame.read_header = telling
feed = frame.Reader.feed
def feeding(reader, data, fds, **how):
    if fds and frame.METHOD_CALL not in reader._types:
        print("Got fds where none are asked for", flush=True)
    return feed(reader, data, fds, **how)
frame.Reader.feed = feeding
"""


@pytest.mark.parametrize("policies", [None, []], ids=["our policy", "no policy"])
def test_no_connection_of_loopd_can_be_flooded(
    new_world: Callable[..., World], policies: list[Path] | None
) -> None:
    """Transport rule 15 (every connection): neither fds nor what nobody asked for is taken."""
    world = new_world(prelude=TELLS_WHAT_IT_READS, policies=policies)
    connections = connections_of(world)
    assert len(connections) == 2
    with memfd() as fd:
        for name in connections:
            flooder = world.raw()
            asking = name != flooder.owner_of(LOOPD)
            messages: list[dict[str, Any]] = [
                {"type": wire.SIGNAL},
                {"type": wire.METHOD_RETURN, "reply_serial": 3},
                {"type": wire.ERROR, "reply_serial": 3, "error_name": "a.b"},
                # Calls have turns where loopd serves.
                *([{"type": wire.METHOD_CALL, "flags": wire.NO_REPLY_EXPECTED}] if asking else []),
            ]
            for message in messages:
                for fds in ([], [fd]):
                    for _ in range(500):
                        flooder.send("/", "a.b", "Flood", destination=name, fds=fds, **message)
                        flooder.received.clear()
                flooder.call_bus("GetId")
                flooder.received.clear()
    still_serves(world)
    assert "Parsed a flood's message" not in world.daemon.log
    assert "Got fds where none are asked for" not in world.daemon.log


def connections_of(world: World) -> list[str]:
    """Return the unique names of all connections of the daemon's process."""
    with world.bus.connect() as client:
        names = [name for name in client.call_bus("ListNames")[0] if name.startswith(":")]
        return [name for name in names if process_of(client, name) == world.daemon.pid]


def process_of(client: RawClient, name: str) -> int | None:
    try:
        return int(client.call_bus("GetConnectionUnixProcessID", "s", [name])[0])
    except wire.CallError:
        return None  # it has left since


def test_a_questions_name_that_another_process_owns_is_told_and_loopd_goes_on(
    bus: PrivateBus, polkit: PolkitDouble, library: str
) -> None:
    """Transport rule 15 (every connection): what it would get is skipped all the same."""
    with bus.connect() as other:
        other.call_bus("RequestName", "su", [QUESTIONS, 4])
        with Daemon(bus, library=library) as daemon, Caller(bus) as caller:
            assert f"cannot own {QUESTIONS}" in daemon.log
            with memfd(4096) as image:
                caller.detach(caller.attach(image).path)
        assert bus.connect().owner_of(QUESTIONS) == other.unique_name
