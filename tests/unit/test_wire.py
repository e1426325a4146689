# SPDX-License-Identifier: LGPL-2.1-or-later
"""The connection over a socket pair: full sockets, slices, replies, fds, and its end."""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from loopd import errors
from loopd.bus import codec, dial, frame, transport


class Peer:
    """The other end, which reads when it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.reader = frame.Reader(1 << 20)

    def read(self, size: int = 1 << 16) -> list[frame.Frame]:
        """Read once."""
        data, ancillary, _, _ = self.socket.recvmsg(size, socket.CMSG_SPACE(64))
        fds = [fd for _, _, raw in ancillary for fd in memoryview(raw).cast("i")]
        return self.reader.feed(data, fds)

    def send(self, message: codec.Message, sender: str) -> None:
        """Send a message, as the bus would from `sender`."""
        message.sender = sender
        self.socket.sendall(serialize_from(message, sender))


def serialize_from(message: codec.Message, sender: str) -> bytes:
    from tests.unit.test_frame import with_sender

    assert sender == ":1.7"
    return with_sender(codec.serialize(message))


class Harness:
    """A connection with its peer, and what it was told."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.settimeout(20)
        self.peer = Peer(theirs)
        self.calls: list[frame.Frame] = []
        self.lost: list[str] = []
        self.closed: list[int] = []
        self.wary = False
        self.trusted: set[str] = set()
        self.unknown: asyncio.Future[None] | None = None
        self.asked: list[str] = []
        self.connection = transport.Connection(
            ours,
            max_message=1 << 16,
            on_call=self.calls.append,
            on_signal=self.calls.append,
            on_lost=self.lost.append,
            close_fds=self._close,
            is_wary=lambda: self.wary,
            trusts=self._trusts,
        )

    def _trusts(self, sender: str) -> "bool | asyncio.Future[None]":
        self.asked.append(sender)
        if self.unknown and not self.unknown.done():
            return self.unknown
        return sender in self.trusted

    def _close(self, fds: Iterable[int], _: str) -> None:
        for fd in fds:
            os.close(fd)
            self.closed.append(fd)

    def end(self) -> None:
        """Close both ends."""
        self.connection.close()
        self.peer.socket.close()


def story(body: Callable[[Harness], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine with a harness."""

    async def run() -> None:
        harness = Harness()
        try:
            await asyncio.wait_for(body(harness), 20)
        finally:
            harness.end()

    asyncio.run(run())


async def turn() -> None:
    """Let the event loop look at its sockets."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_full_socket_loses_nothing_and_keeps_the_order() -> None:
    """Transport rule 1 (writer)."""

    async def body(harness: Harness) -> None:
        count, text = 400, "x" * 1000  # a hundred times what the socket holds
        for _ in range(count):
            harness.connection.emit("/a", "b.c", "D", "s", [text])
        await turn()
        assert not harness.lost
        drained = asyncio.ensure_future(harness.connection.drain())
        serials: list[int] = []
        while len(serials) < count:
            serials += [one.header.serial for one in harness.peer.read() if one.header]
            await turn()
        assert serials == sorted(serials)
        await drained

    story(body)


def test_a_destination_that_fills_the_queue_loses_its_own_messages_only() -> None:
    """Transport rule 1 (writer)."""

    async def body(harness: Harness) -> None:
        greedy = frame.Header(frame.METHOD_CALL, 0, 1, sender=":1.6")
        modest = frame.Header(frame.METHOD_CALL, 0, 2, sender=":1.8")
        for _ in range(200):  # 20 MB
            harness.connection.reply(greedy, "s", ["x" * 100_000])
        harness.connection.reply(modest, "s", ["here"])
        seen: list[str] = []
        while ":1.8" not in seen:
            seen += [one.header.destination for one in harness.peer.read() if one.header]
            await turn()
        assert 1 <= seen.count(":1.6") < 100

    story(body)


def test_the_bus_going_away_is_told_once_and_ends_every_call() -> None:
    """Transport rule 12 (losing the bus)."""

    async def body(harness: Harness) -> None:
        call = asyncio.ensure_future(
            harness.connection.call(":1.7", "/a", "b.c", "D", timeout=None)
        )
        await turn()
        harness.peer.socket.close()
        with pytest.raises(errors.BusError):
            await call
        assert len(harness.lost) == 1
        with pytest.raises(errors.BusError):
            await harness.connection.call(":1.7", "/a", "b.c", "D", timeout=None)
        harness.connection.emit("/a", "b.c", "D", "", [])  # for nobody, and no error

    story(body)


def test_an_error_reply_is_raised_as_the_class_it_names() -> None:
    async def body(harness: Harness) -> None:
        call = asyncio.ensure_future(
            harness.connection.call(":1.7", "/a", "b.c", "D", timeout=None)
        )
        await turn()
        (request,) = harness.peer.read()
        assert request.header
        harness.peer.send(
            codec.error(
                ":1.1", request.header.serial, errors.DeviceBusy.dbus_name, "busy", serial=1
            ),
            ":1.7",
        )
        with pytest.raises(errors.DeviceBusy, match="busy"):
            await call

    story(body)


def test_a_reply_of_somebody_else_is_not_taken_for_the_answer() -> None:
    async def body(harness: Harness) -> None:
        call = asyncio.ensure_future(
            harness.connection.call(":1.9", "/a", "b.c", "D", timeout=None)
        )
        await turn()
        (request,) = harness.peer.read()
        assert request.header
        harness.peer.send(
            codec.method_return(":1.1", request.header.serial, "", [], serial=1), ":1.7"
        )
        await turn()
        assert not call.done()
        call.cancel()

    story(body)


def test_a_call_that_is_not_answered_times_out_and_its_late_fds_are_closed() -> None:
    """Transport rule 8 (peers)."""

    async def body(harness: Harness) -> None:
        with pytest.raises(errors.TimedOut):
            await harness.connection.call(":1.7", "/a", "b.c", "D", timeout=0.01)
        (request,) = harness.peer.read()
        assert request.header
        late = codec.method_return(":1.1", request.header.serial, "", [], serial=1, fds=[0])
        socket.send_fds(harness.peer.socket, [serialize_from(late, ":1.7")], [0])
        while not harness.closed:
            await turn()
        assert len(harness.closed) == 1

    story(body)


def test_fds_that_no_handler_takes_are_closed() -> None:
    """Transport rule 3 (ownership)."""

    async def body(harness: Harness) -> None:
        message = codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=1, fds=[0, 0])
        socket.send_fds(harness.peer.socket, [serialize_from(message, ":1.7")], [0, 0])
        while not harness.calls:
            await turn()
        assert len(harness.closed) == 2

    story(body)


def test_while_it_is_wary_fds_are_taken_of_those_only_whom_it_trusts() -> None:
    """The others' never have a number with us, so that nothing needs to be closed."""

    async def body(harness: Harness) -> None:
        def call(serial: int) -> bytes:
            message = codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=serial, fds=[0])
            return serialize_from(message, ":1.7")

        before = os.listdir("/proc/self/fd")
        harness.wary = True
        socket.send_fds(harness.peer.socket, [call(1)], [0])
        # A message that comes in two pieces, its fd with the first.
        socket.send_fds(harness.peer.socket, [call(2)[:40]], [0])
        harness.peer.socket.sendall(call(2)[40:])
        while len(harness.calls) < 2:
            await turn()
        assert [one.fds_lost for one in harness.calls] == [True, True]
        assert harness.closed == []
        assert os.listdir("/proc/self/fd") == before
        harness.trusted.add(":1.7")
        socket.send_fds(harness.peer.socket, [call(3) + call(4)], [0])
        while len(harness.calls) < 4:
            await turn()
        assert [one.fds_lost for one in harness.calls[2:]] == [False, False]
        assert len(harness.closed) == 1

    story(body)


def test_nothing_is_read_until_it_is_known_whose_fds_come_next() -> None:
    """Transport rule 16 (whose fds): what comes without fds is read all the same."""

    async def body(harness: Harness) -> None:
        def call(serial: int, fds: list[int]) -> bytes:
            message = codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=serial, fds=fds)
            return serialize_from(message, ":1.7")

        harness.wary = True
        harness.unknown = asyncio.get_running_loop().create_future()
        harness.peer.socket.sendall(call(1, []))
        while not harness.calls:
            await turn()
        assert harness.asked == []
        socket.send_fds(harness.peer.socket, [call(2, [0])], [0])
        harness.peer.socket.sendall(call(3, []))
        while not harness.asked:
            await turn()
        await turn()
        assert len(harness.calls) == 1
        harness.trusted.add(":1.7")
        harness.unknown.set_result(None)
        while len(harness.calls) < 3:
            await turn()
        assert harness.asked == [":1.7", ":1.7"]
        assert [one.fds_lost for one in harness.calls] == [False] * 3
        assert len(harness.closed) == 1

    story(body)


def test_a_connection_that_closes_while_it_waits_stays_closed() -> None:
    async def body(harness: Harness) -> None:
        harness.wary = True
        harness.unknown = asyncio.get_running_loop().create_future()
        message = codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=1, fds=[0])
        socket.send_fds(harness.peer.socket, [serialize_from(message, ":1.7")], [0])
        while not harness.asked:
            await turn()
        harness.connection.close()
        harness.unknown.set_result(None)
        await turn()
        assert harness.calls == []

    story(body)


def test_fds_are_handed_over_before_the_news_that_their_sender_has_left() -> None:
    """Transport rule 16 (whose fds): else they would be at nobody's expense."""

    async def body(harness: Harness) -> None:
        closed: list[int] = []
        harness.connection._on_signal = lambda _: closed.append(len(harness.closed))
        call = codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=1, fds=[0])
        news = codec.signal("/a", "b.c", "NameOwnerChanged", "", [], serial=2)
        socket.send_fds(harness.peer.socket, [serialize_from(call, ":1.7")], [0])
        harness.peer.socket.sendall(serialize_from(news, ":1.7"))
        while not closed:
            await turn()
        assert closed == [1]

    story(body)


def test_received_fds_are_not_for_children() -> None:
    async def body(harness: Harness) -> None:
        flags: list[bool] = []
        harness.connection._on_call = lambda one: flags.extend(map(os.get_inheritable, one.fds))
        message = codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=1, fds=[0])
        socket.send_fds(harness.peer.socket, [serialize_from(message, ":1.7")], [0])
        while not harness.closed:
            await turn()
        assert flags == [False]

    story(body)


def test_reply_fds_are_with_the_peer_when_the_write_is_done() -> None:
    """Transport rule 5 (reply fds)."""

    async def body(harness: Harness) -> None:
        header = frame.Header(frame.METHOD_CALL, 0, 1, sender=":1.7")
        reading, writing = os.pipe()
        await harness.connection.reply(header, "h", [0], [reading])
        os.close(reading)
        (reply,) = harness.peer.read()
        os.write(writing, b"through")
        assert os.read(reply.fds[0], 10) == b"through"
        for fd in (writing, *reply.fds):
            os.close(fd)

    story(body)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("unix:path=/nonexistent/bus", "No such file or directory"),
        ("tcp:host=localhost", "no address of a bus"),
        ("", "no address of a bus"),
        ("unix:abstract=loopd-test-nobody-listens;unix:path=/nonexistent", "No such file"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(address: str, words: str) -> None:
    with pytest.raises(errors.BusError, match=words):
        dial.connect(address)


def test_the_environment_names_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/somewhere")
    assert dial.system_bus_address() == "unix:path=/somewhere"
    monkeypatch.delenv("DBUS_SYSTEM_BUS_ADDRESS")
    assert dial.system_bus_address() == "unix:path=/run/dbus/system_bus_socket"


def test_signals_of_one_turn_go_with_the_answer_in_one_write_and_before_it() -> None:
    """Each write wakes the bus."""

    async def body(harness: Harness) -> None:
        caller = frame.Header(frame.METHOD_CALL, 0, 1, sender=":1.6")
        harness.connection.emit("/a", "b.c", "D", "", [])
        harness.connection.emit("/a", "b.c", "E", "", [])
        harness.connection.reply(caller, "", [])
        seen = [one.header.type for one in harness.peer.read() if one.header]
        assert seen == [frame.SIGNAL, frame.SIGNAL, frame.METHOD_RETURN]
        harness.connection.reply(caller, "", [])  # alone, it waits for nothing
        assert len(harness.peer.read()) == 1

    story(body)


def test_a_message_with_fds_goes_alone() -> None:
    """dbus-broker takes fds for those of the last message of a piece."""

    async def body(harness: Harness) -> None:
        caller = frame.Header(frame.METHOD_CALL, 0, 1, sender=":1.6")
        reading, writing = os.pipe()
        while not harness.connection._outbox._waits:
            harness.connection.reply(caller, "s", ["x" * 1000])
        harness.connection.reply(caller, "h", [0], [reading])
        harness.connection.reply(caller, "s", ["after"])
        pieces: list[list[frame.Frame]] = [[]]
        while not any(b"after" in each.data for each in pieces[-1]):
            pieces.append(harness.peer.read())
            await turn()
        (piece,) = (piece for piece in pieces if any(each.fds for each in piece))
        assert piece[-1].header
        assert (piece[-1].header.unix_fds, len(piece[-1].fds)) == (1, 1)
        for fd in (reading, writing, piece[-1].fds[0]):
            os.close(fd)

    story(body)


def test_what_was_put_in_is_sent_at_the_end() -> None:
    async def body(harness: Harness) -> None:
        harness.connection.emit("/a", "b.c", "D", "", [])
        harness.connection.close()
        assert len(harness.peer.read()) == 1

    story(body)


def test_serials_start_anew_after_the_last_and_are_never_0() -> None:
    async def body(harness: Harness) -> None:
        harness.connection._serial = 0xFFFFFFFE
        for _ in range(3):
            harness.connection.emit("/a", "b.c", "D", "", [])
        await turn()
        seen = [one.header.serial for one in harness.peer.read() if one.header]
        assert seen == [0xFFFFFFFF, 1, 2]

    story(body)
