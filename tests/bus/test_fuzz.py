# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages that nobody would send: whatever comes, loopd answers each call once, and is as before.

Hypothesis makes up a few messages at a time for a client that has a device.  Some make the bus
close the client's connection, and then all that it had has to go.  Each test runs with our bus
policy and without, as in test_fds.
"""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness import wire
from tests.harness.bus import LOOPD
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.images import memfd
from tests.harness.messages import Packet, Replies, packets
from tests.harness.polkit import Answer
from tests.harness.raw import BUS, DisconnectedError, RawClient
from tests.harness.world import World

FAILED = "loopd failed; its log says why"
MANAGE_OTHERS = "org.example.loop1.manage-others"
OPEN_OTHERS = "org.example.loop1.open-others-device"

moments = settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", params=["our policy", "no policy"])
def world_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {} if request.param == "our policy" else {"policies": []}


@pytest.fixture
def fuzzed(world: World) -> Iterator[World]:
    """The world, where all is allowed but what others on this machine would notice.

    Fails in the end if loopd has answered what it should not have, which only the bus sees.
    """
    for action in (MANAGE_OTHERS, OPEN_OTHERS):
        world.polkit.on(action, Answer.DENY)
    printed = len(world.bus.process.log.text)
    yield world
    refused = [
        line
        for line in world.bus.process.log.text[printed:].splitlines()
        if f'sender="{owner(world)}"' in line and re.search(r'type="(method_return|error)"', line)
    ]
    assert refused == []


def owner(world: World) -> str:
    """Return the unique name of loopd."""
    with world.bus.connect() as client:
        return str(client.owner_of(LOOPD))


@pytest.fixture
def fds(world: World) -> Iterator[list[int]]:
    """Fds of all kinds, first the ones that can be attached."""
    image = world.image(64 * 1024)
    with ExitStack() as stack:
        found = [stack.enter_context(memfd(64 * 1024))]
        for path, flags in (
            (image, os.O_RDWR),
            (image, os.O_RDONLY),
            (image, os.O_WRONLY | os.O_APPEND),
            (image, os.O_PATH),
            (world.files, os.O_RDONLY | os.O_DIRECTORY),
            (os.devnull, os.O_RDWR),
            ("/proc/self/status", os.O_RDONLY),
        ):
            found.append(os.open(path, flags | os.O_CLOEXEC))
            stack.callback(os.close, found[-1])
        for fd in (*os.pipe(), os.eventfd(0)):
            found.append(fd)
            stack.callback(os.close, fd)
        yield found


class Sender:
    """A client with a device, and what it has sent and got."""

    def __init__(self, client: RawClient, fds: list[int]) -> None:
        self.client = client
        self._fds = fds
        self._answers: dict[int, list[str | None]] = {}
        """By serial who has answered, in the order of the answers."""
        attach = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=fds[:1])
        self._device = str(attach.body[0])

    def send(self, packet: Packet, first_fd: int) -> tuple[int, Replies]:
        """Send a message; return its serial and what it asks for."""
        serial = self.client.next_serial()
        data = packet.data(serial, self._device)
        self._answers[serial] = []
        passed = [
            self._fds[number % len(self._fds)] for number in range(first_fd, first_fd + packet.fds)
        ]
        self.client.send_bytes(data, passed)
        return serial, packet.replies(data)

    def wait_answers(self, serials: set[int]) -> None:
        """Wait until all of these have an answer, and all that was sent before has come."""
        while any(not self._answers[serial] for serial in serials):
            self._take(self.client.receive())
        ping = self.client.next_serial()
        self._answers[ping] = []
        self.client.send(MANAGER_PATH, f"{BUS}.Peer", "Ping", serial=ping)
        while not self._answers[ping]:
            self._take(self.client.receive())

    def answers(self, serial: int) -> list[str | None]:
        """Return who has answered a call, as often as they did."""
        return self._answers[serial]

    def _take(self, message: wire.Message) -> None:
        for fd in message.fds:
            os.close(fd)
        if message.type in (wire.METHOD_RETURN, wire.ERROR):
            # What it says of a bug of its own.
            assert message.body[:1] != (FAILED,)
            self._answers[message.reply_serial or 0].append(message.sender)


def check(world: World, fds: list[int], batch: list[Packet], first_fd: int) -> bool:
    """Send a batch, and fail unless loopd is as before; say whether the bus stayed with it."""
    with world.bus.connect("nobody") as client:
        loopd = client.owner_of(LOOPD)
        sender = Sender(client, fds)
        sent: list[tuple[int, Replies]] = []
        try:
            sent.extend(sender.send(packet, first_fd) for packet in batch)
            sender.wait_answers({serial for serial, replies in sent if replies is Replies.ONE})
            stayed = True
        except DisconnectedError:
            stayed = False
        for serial, replies in sent:
            answers = sender.answers(serial)
            assert len(answers) <= 1, "answered more than once"
            # The bus itself answers what its policy stops.
            assert loopd not in answers or replies is not Replies.NONE, "asked for no answer"
    end(world)
    return stayed


def end(world: World) -> None:
    """Wait until all that a client had is gone, after it."""
    # An attach may be under way still, of which no count tells.
    world.wait_idle_fds()
    world.wait_devices(0)


def test_each_call_gets_one_answer_whatever_it_asks_for(fuzzed: World, fds: list[int]) -> None:
    """Of messages for which the bus has no reason to close the connection."""

    @moments
    @given(st.lists(packets(polite=True), min_size=4, max_size=8), st.sampled_from([0, 0, 1, 2, 5]))
    def run(batch: list[Packet], first_fd: int) -> None:
        assert check(fuzzed, fds, batch, first_fd), "the bus closed the connection"

    run()


def test_what_the_bus_may_close_the_connection_for_leaves_nothing(
    fuzzed: World, fds: list[int]
) -> None:
    @moments
    @given(st.lists(packets(), min_size=1, max_size=4), st.sampled_from([0, 0, 1, 2, 5]))
    def run(batch: list[Packet], first_fd: int) -> None:
        check(fuzzed, fds, batch, first_fd)

    run()


def test_bytes_that_are_no_message_reach_nobody(fuzzed: World, fds: list[int]) -> None:
    good = wire.build(serial=9, path=MANAGER_PATH, interface=MANAGER, member="ListDevices")

    @moments
    @given(
        st.lists(
            st.binary(max_size=200) | st.integers(0, len(good)).map(lambda end: good[:end]),
            min_size=1,
            max_size=4,
        ),
        st.integers(0, 3),
    )
    def run(pieces: list[bytes], count: int) -> None:
        with fuzzed.bus.connect("nobody") as client:
            Sender(client, fds)
            with suppress(DisconnectedError):
                for piece, passed in zip(pieces, itertools.repeat(fds[:count]), strict=False):
                    client.send_bytes(piece, passed if piece else ())
        end(fuzzed)

    run()
