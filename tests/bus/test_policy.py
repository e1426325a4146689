# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bus policy, enforced by a real bus: what never reaches loopd, and what must."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import wire
from tests.harness.bus import LOGIND, LOOPD, OUR_POLICY, QUESTIONS, PrivateBus
from tests.harness.raw import BUS, RawClient

MANAGER = "/org/example/Loop1"
DENIED = "org.freedesktop.DBus.Error.AccessDenied"


pytestmark = pytest.mark.both_buses


@pytest.fixture
def bus(bus_type: type[PrivateBus]) -> Iterator[PrivateBus]:
    with bus_type(policies=[OUR_POLICY]) as bus:
        yield bus


@pytest.fixture
def service(bus: PrivateBus) -> Iterator[RawClient]:
    """Who owns the name, in loopd's place."""
    with bus.connect() as client:
        client.call_bus("RequestName", "su", [LOOPD, 4])
        yield client


@pytest.fixture
def client(bus: PrivateBus) -> Iterator[RawClient]:
    if os.getuid() != 0:
        pytest.skip("only root can be nobody")
    with bus.connect(user="nobody") as client:
        yield client


@pytest.fixture
def fds() -> Iterator[list[int]]:
    fds = list(os.pipe())
    yield fds
    for fd in fds:
        os.close(fd)


def arrives(client: RawClient, service: RawClient, member: str, **how: Any) -> bool:
    """Whether such a call reaches the service; if not, the caller is told by the bus."""
    interface = how.pop("interface", LOOPD)
    serial = client.send(MANAGER, interface, member, **how)
    # The bus handles one message at a time: what passed stands before its answer to this.
    client.call_bus("GetId")
    refusals = [message for message in client.received if message.reply_serial == serial]
    service.call_bus("GetId")
    calls = [message for message in service.received if message.member == member]
    for call in calls:
        for fd in call.fds:
            os.close(fd)
        call.fds.clear()
    client.received.clear()
    service.received.clear()
    assert [refusal.error_name for refusal in refusals] == ([] if calls else [DENIED])
    return bool(calls)


def test_only_root_owns_the_name(bus: PrivateBus, client: RawClient) -> None:
    """Transport rule 13 (bus policy)."""
    with pytest.raises(wire.CallError) as refusal:
        client.call_bus("RequestName", "su", [LOOPD, 4])
    assert refusal.value.name == DENIED
    with bus.connect() as root:
        assert root.call_bus("RequestName", "su", [LOOPD, 4]) == (1,)


@pytest.mark.parametrize("interface", [LOOPD, "org.freedesktop.DBus.Properties", None])
def test_anyone_calls_anything_without_an_fd(
    client: RawClient, service: RawClient, interface: str | None
) -> None:
    """Transport rule 13 (bus policy)."""
    assert arrives(client, service, "Anything", interface=interface)


@pytest.mark.parametrize("member", ["Attach", "Detach", "Resize", "GetDevice"])
def test_what_takes_an_fd_gets_one_and_no_more(
    client: RawClient, service: RawClient, fds: list[int], member: str
) -> None:
    """CVE-2014-3532, CVE-2020-12049, Transport rule 13 (bus policy)."""
    assert arrives(client, service, member, fds=fds[:1])
    assert arrives(client, service, member)
    assert not arrives(client, service, member, fds=fds)


@pytest.mark.parametrize(
    ("interface", "member"),
    [
        (LOOPD, "ListDevices"),
        (LOOPD, "GetDeviceByNode"),
        (LOOPD, "NoSuchMember"),
        (f"{LOOPD}.Device", "Detach"),
        (f"{LOOPD}.Device", "Resize"),
        ("org.freedesktop.DBus.Properties", "Set"),
        (None, "Attach"),
    ],
)
def test_nothing_else_gets_an_fd(
    client: RawClient, service: RawClient, fds: list[int], interface: str | None, member: str
) -> None:
    """CVE-2014-3532, CVE-2020-12049, Transport rule 13 (bus policy)."""
    assert not arrives(client, service, member, interface=interface, fds=fds[:1])


def test_the_unique_name_is_no_way_round(
    client: RawClient, service: RawClient, fds: list[int]
) -> None:
    """Transport rule 13 (bus policy)."""
    assert not arrives(client, service, "ListDevices", destination=service.unique_name, fds=fds[:1])


@pytest.mark.parametrize("destination", ["name", "unique name"])
def test_a_signal_sent_to_the_service_is_dropped(
    client: RawClient, service: RawClient, destination: str
) -> None:
    """Transport rule 13 (bus policy)."""
    to = LOOPD if destination == "name" else service.unique_name
    client.send(MANAGER, LOOPD, "Signal", type=wire.SIGNAL, destination=to)
    client.call_bus("GetId")
    service.call_bus("GetId")
    assert [message for message in service.received if message.sender != BUS] == []


def test_a_broadcast_that_the_service_asked_for_arrives(
    client: RawClient, service: RawClient
) -> None:
    """Transport rule 13 (bus policy)."""
    service.add_match("type='signal',member='UserRemoved'")
    client.send("/", f"{LOGIND}.Manager", "UserRemoved", type=wire.SIGNAL, destination=None)
    client.call_bus("GetId")
    service.call_bus("GetId")
    assert [message.member for message in service.received if message.sender != BUS] == [
        "UserRemoved"
    ]


def test_a_reply_that_nobody_asked_for_is_dropped(
    client: RawClient, service: RawClient, fds: list[int]
) -> None:
    """Transport rule 13 (bus policy)."""
    for header in ({"type": wire.METHOD_RETURN}, {"type": wire.ERROR, "error_name": "a.b"}):
        client.send(None, None, None, reply_serial=1, fds=fds[:1], **header)
    client.call_bus("GetId")
    service.call_bus("GetId")
    assert [message for message in service.received if message.sender != BUS] == []


def test_the_answer_to_a_call_of_the_service_may_carry_fds(
    bus: PrivateBus, service: RawClient, fds: list[int]
) -> None:
    """Transport rule 13 (bus policy)."""
    with bus.connect() as logind:
        logind.call_bus("RequestName", "su", [LOGIND, 4])
        assert answered_with_fds(service, logind, LOGIND, "Inhibit", fds)


def test_the_answer_of_the_service_may_carry_fds(
    client: RawClient, service: RawClient, fds: list[int]
) -> None:
    """Transport rule 13 (bus policy)."""
    assert answered_with_fds(client, service, LOOPD, "Open", fds)


def answered_with_fds(
    caller: RawClient, callee: RawClient, name: str, member: str, fds: list[int]
) -> bool:
    """Whether these fds reach the caller of a method in its answer."""
    serial = caller.send("/", name, member, destination=name)
    call = callee.receive_where(lambda message: message.member == member, "the call")
    callee.send(
        None,
        None,
        None,
        type=wire.METHOD_RETURN,
        reply_serial=call.serial,
        destination=caller.unique_name,
        fds=fds,
    )
    answer = caller.reply(serial)
    for fd in answer.fds:
        os.close(fd)
    return answer.type == wire.METHOD_RETURN and len(answer.fds) == len(fds)


# The connection on which loopd asks others


@pytest.fixture
def asking(bus: PrivateBus) -> Iterator[RawClient]:
    """Who owns its name, in loopd's place; it takes fds, so that the policy alone is seen."""
    with bus.connect() as client:
        client.call_bus("RequestName", "su", [QUESTIONS, 0])
        yield client


def test_only_root_owns_the_name_for_questions(client: RawClient, asking: RawClient) -> None:
    """Transport rule 15 (every connection)."""
    with pytest.raises(wire.CallError) as refusal:
        client.call_bus("RequestName", "su", [QUESTIONS, 0])
    assert refusal.value.name == DENIED


@pytest.mark.parametrize("destination", ["name", "unique name"])
def test_nothing_is_sent_to_who_asks(
    client: RawClient, asking: RawClient, fds: list[int], destination: str
) -> None:
    """Transport rule 15 (every connection)."""
    to = QUESTIONS if destination == "name" else asking.unique_name
    for kind in (
        {"type": wire.METHOD_CALL},
        {"type": wire.SIGNAL},
        {"type": wire.METHOD_RETURN, "reply_serial": 1},
        {"type": wire.ERROR, "reply_serial": 1, "error_name": "a.b"},
    ):
        for attached in ([], fds[:1]):
            client.send("/", "a.b", "C", destination=to, fds=attached, **kind)
    client.call_bus("GetId")
    asking.call_bus("GetId")
    assert [message for message in asking.received if message.sender != BUS] == []


def test_answers_and_broadcasts_reach_who_asks(bus: PrivateBus, asking: RawClient) -> None:
    """Transport rule 15 (every connection)."""
    with bus.connect() as logind:
        logind.call_bus("RequestName", "su", [LOGIND, 4])
        assert answered_with_fds(asking, logind, LOGIND, "GetUser", [])
        asking.add_match(f"type='signal',sender='{LOGIND}'")
        logind.send("/", f"{LOGIND}.Manager", "UserRemoved", type=wire.SIGNAL, destination=None)
        asking.receive_where(lambda message: message.member == "UserRemoved", "the broadcast")
    asking.add_match(f"type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{LOGIND}'")
    with bus.connect() as logind:
        logind.call_bus("RequestName", "su", [LOGIND, 4])
        asking.receive_where(lambda message: message.member == "NameOwnerChanged", "the news")
