# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who sends more than loopd serves is told so, then not heard, and costs nobody else anything.

How long others wait meanwhile is measured by bench.flood; here they are served at all.
"""

import signal
from typing import Any

import pytest

from tests.harness.bus import LOOPD
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.deadline import Deadline
from tests.harness.flood import KINDS, flood
from tests.harness.images import memfd
from tests.harness.polkit import Answer
from tests.harness.raw import BUS, RawClient
from tests.harness.wire import ERROR, Variant, build
from tests.harness.world import OTHER, USER, World

pytestmark = pytest.mark.both_buses

ATTACH = "org.example.loop1.attach"
LIMITS_EXCEEDED = f"{BUS}.Error.LimitsExceeded"
UNDER_WAY = 16
QUESTIONS = 56
"""Of the 128 in all, an eighth is root's, and one user gets half of the rest."""
TOLD = 16
MIB = 1 << 20


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    return {"config": "[limits]\nquestions_per_user = 100\n"}


def fill(world: World, client: RawClient, fd: int) -> list[int]:
    """Have as many calls under way as a connection may; they wait for polkit."""
    # Its user may have more, once a call was authorized.
    args: list[Any] = [0, {}]
    attached = client.reply(client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", args, fds=[fd]))
    client.call(attached.body[0], f"{MANAGER}.Device", "Detach", "a{sv}", [{}])
    world.polkit.on(ATTACH, Answer.HANG)
    serials = [
        client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
        for _ in range(UNDER_WAY)
    ]
    world.polkit.wait_question(ATTACH, count=1 + UNDER_WAY)
    return serials


def send_at_once(client: RawClient, count: int) -> list[int]:
    """Send so many calls in one piece; return their serials."""
    serials = [client.next_serial() for _ in range(count)]
    calls = [
        build(
            serial=serial,
            path=MANAGER_PATH,
            interface=MANAGER,
            member="ListDevices",
            destination=LOOPD,
        )
        for serial in serials
    ]
    client.send_bytes(b"".join(calls))
    return serials


def refusals(client: RawClient, serials: list[int]) -> list[int]:
    """Return the calls that have been answered, by LimitsExceeded each."""
    answers = [each for each in client.drain() if each.reply_serial in serials]
    assert {(each.type, each.error_name) for each in answers} <= {(ERROR, LIMITS_EXCEEDED)}
    return [int(each.reply_serial or 0) for each in answers]


def served_again(client: RawClient) -> int:
    """Call until a call is heard; return how many were not.

    Which ones are is told by others: an answer to a later call of the same connection comes later.
    """
    unheard = 0
    while True:
        serial = client.send(MANAGER_PATH, MANAGER, "ListDevices")
        try:
            client.reply(serial, timeout=0.2)
        except TimeoutError:
            unheard += 1
            assert unheard < 100
        else:
            return unheard


def test_a_connection_that_floods_is_told_so_some_times_and_then_not_heard(world: World) -> None:
    """Transport rule 2 (reader)."""
    client, other = world.raw(), world.raw()
    with memfd() as fd:
        waiting = fill(world, client, fd)
        # Stopped for a moment, loopd finds them all at once.
        world.daemon.process.signal(signal.SIGSTOP)
        try:
            sent = send_at_once(client, 2000)
            client.call_bus("GetId")  # the bus has passed them on
        finally:
            world.daemon.process.signal(signal.SIGCONT)
        # It is heard of nobody's flood but its own.
        other.call(MANAGER_PATH, MANAGER, "ListDevices")
        world.polkit.release(Answer.DENY)
        for serial in waiting:
            assert client.reply(serial).error_name == f"{BUS}.Error.AccessDenied"
        served_again(client)
        told = refusals(client, sent)
        # Those that a slow bus brings later may all be told.
        assert TOLD <= len(told) < len(sent)


def test_a_connection_that_waits_for_each_answer_is_always_told(world: World) -> None:
    """Transport rule 6 (handlers)."""
    client = world.raw()
    with memfd() as fd:
        waiting = fill(world, client, fd)
        for _ in range(200):
            reply = client.reply(client.send(MANAGER_PATH, MANAGER, "ListDevices"))
            assert reply.error_name == LIMITS_EXCEEDED
        world.polkit.release(Answer.DENY)
        for serial in waiting:
            client.reply(serial)


def test_fds_of_what_is_not_heard_are_closed(world: World) -> None:
    """Transport rule 3 (ownership): world sees that none is left."""
    client = world.raw()
    with memfd() as fd:
        waiting = fill(world, client, fd)
        for _ in range(500):
            client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd])
        world.polkit.release(Answer.DENY)
        for serial in waiting:
            client.reply(serial)
        served_again(client)


def test_large_calls_that_are_too_many_are_told_from_their_headers(world: World) -> None:
    """Transport rule 2 (reader)."""
    client = world.raw()
    sent = [
        client.send(MANAGER_PATH, MANAGER, "GetDeviceByNode", "s", ["x" * 200_000])
        for _ in range(10)
    ]
    for serial in sent:
        assert client.reply(serial).error_name == LIMITS_EXCEEDED


def test_large_options_are_read_up_to_the_cap_only(world: World) -> None:
    """Transport rule 2 (reader): a container of many small things takes longest to read."""
    client = world.raw()
    with memfd() as fd:
        for count, error in ((100, "InvalidArgs"), (20_000, "LimitsExceeded")):
            options = {f"key{number}": Variant("u", 1) for number in range(count)}
            args = [0, options]
            serial = client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", args, fds=[fd])
            assert client.reply(serial).error_name == f"{BUS}.Error.{error}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_keeps_nobody_from_being_served(world: World, kind: str) -> None:
    """Transport rule 2 (reader)."""
    other = world.raw(OTHER)
    with flood(world.bus, kind, USER) as flooder:
        for _ in range(30):
            other.call(MANAGER_PATH, MANAGER, "ListDevices")
        with memfd() as fd:
            # The bus itself may refuse what carries an fd while others fill its queue with theirs.
            for _ in range(200):
                args: list[Any] = [0, {}]
                serial = other.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", args, fds=[fd])
                reply = other.reply(serial)
                if (reply.type, reply.sender) != (ERROR, BUS):
                    break
        path = reply.body[0]
        other.call(path, f"{MANAGER}.Device", "Detach", "a{sv}", [{}])
        assert flooder.status is None
        assert world.daemon.rss() < 64 * MIB
    # What it has sent is still on its way; then World sees that nothing of it is left.
    other.call(MANAGER_PATH, MANAGER, "ListDevices")


def test_many_connections_of_one_user_are_one_user(world: World) -> None:
    """Quota dodges: each of them floods, and what they have together is what one would have."""
    clients = [world.raw() for _ in range(40)]
    other = world.raw(OTHER)
    world.polkit.on(ATTACH, Answer.HANG)
    with memfd() as fd:
        sent = {
            client: [
                client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
                for _ in range(UNDER_WAY)
            ]
            for client in clients
        }
    world.polkit.wait_question(ATTACH, count=QUESTIONS)
    refused, deadline = 0, Deadline()
    while refused < len(clients) * UNDER_WAY - QUESTIONS:
        assert deadline.remaining, refused
        for client, serials in sent.items():
            client.call_bus("GetId")  # what has come so far is read on the way to its answer
            refused += len(refusals(client, serials))
        other.call(MANAGER_PATH, MANAGER, "ListDevices")
    assert len(world.polkit.questions) == QUESTIONS
    world.polkit.release(Answer.DENY)
    for client in clients:
        client.close()


def test_replies_that_are_not_read_do_not_disconnect_loopd(world: World) -> None:
    """Transport rule 1 (writer)."""
    client = world.raw()
    before = client.owner_of(LOOPD)
    for _ in range(2000):
        client.send(MANAGER_PATH, f"{BUS}.Introspectable", "Introspect")
    other = world.raw(OTHER)
    other.call(MANAGER_PATH, MANAGER, "ListDevices")
    client.close()
    other.call(MANAGER_PATH, MANAGER, "ListDevices")
    assert other.owner_of(LOOPD) == before
