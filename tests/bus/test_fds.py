# SPDX-License-Identifier: LGPL-2.1-or-later
"""File descriptors in messages: what is not exactly one that a method asks for is refused.

Each test runs where no bus policy stands before loopd, and what our policy stops also where it
does, so that both of the two are seen to refuse.  World sees that the daemon's fds are the same
afterwards.
"""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import wire
from tests.harness.bus import LOOPD
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, OBJECT_MANAGER, PROPERTIES
from tests.harness.images import memfd
from tests.harness.raw import BUS, RawClient
from tests.harness.wire import Variant
from tests.harness.world import World

pytestmark = pytest.mark.both_buses

INVALID = f"{BUS}.Error.InvalidArgs"
DENIED = f"{BUS}.Error.AccessDenied"
NO_SUCH_DEVICE = f"{LOOPD}.Error.NoSuchDevice"
READ_ONLY = f"{BUS}.Error.PropertyReadOnly"

# With what an fd stands beside, in the methods that take one.
TAKES_ONE = {
    "Attach": ("ha{sv}", [{}]),
    "Detach": ("ha{sv}", [{}]),
    "Resize": ("ha{sv}", [{}]),
    "GetDevice": ("h", []),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what our policy has no part in without it only."""
    policies = ["our policy", "no policy"] if "polices" in metafunc.fixturenames else ["no policy"]
    metafunc.parametrize("world_options", policies, indirect=True)


@pytest.fixture(scope="module")
def world_options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {} if request.param == "our policy" else {"policies": []}


@pytest.fixture
def polices(world_options: dict[str, Any]) -> bool:
    """Whether our policy is in force."""
    return not world_options


@pytest.fixture
def client(world: World) -> RawClient:
    return world.raw()


@pytest.fixture
def fd() -> Iterator[int]:
    with memfd() as fd:
        yield fd


def refusal(client: RawClient, serial: int) -> tuple[str, bool]:
    """Return the error that answers a call, and whether it is the bus's own."""
    reply = client.reply(serial)
    assert reply.type == wire.ERROR, f"answered with {reply.body}"
    return str(reply.error_name), reply.sender == BUS


def still_serves(world: World, client: RawClient, fd: int) -> None:
    """See that loopd has its fds, none more and none less, and takes a good one as ever."""
    world.wait_idle_fds()
    serial = client.send(MANAGER_PATH, MANAGER, "GetDevice", "h", [0], fds=[fd])
    assert refusal(client, serial) == (NO_SUCH_DEVICE, False)


@pytest.mark.parametrize("member", TAKES_ONE)
def test_an_index_of_no_passed_fd_is_refused(
    world: World, client: RawClient, fd: int, member: str
) -> None:
    """CVE-2025-8067, Transport rule 4 (handles)."""
    signature, rest = TAKES_ONE[member]
    for index in (1, 2, 253, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1):
        for fds in ([], [fd]):
            serial = client.send(MANAGER_PATH, MANAGER, member, signature, [index, *rest], fds=fds)
            assert refusal(client, serial) == (INVALID, False), index
    still_serves(world, client, fd)


@pytest.mark.parametrize("member", TAKES_ONE)
def test_no_fd_of_the_daemon_can_be_named(
    world: World, client: RawClient, fd: int, member: str
) -> None:
    """CVE-2025-8067, Transport rule 4 (handles): its bus socket is among them: a handler that took
    the index for an fd would close it.
    """
    signature, rest = TAKES_ONE[member]
    numbers = sorted(world.idle_fds)
    for fds in ([], [fd]):
        # Index 0 is right where an fd is passed.
        for number in numbers if not fds else numbers[1:]:
            serial = client.send(MANAGER_PATH, MANAGER, member, signature, [number, *rest], fds=fds)
            assert refusal(client, serial) == (INVALID, False), number
    still_serves(world, client, fd)


@pytest.mark.parametrize("member", TAKES_ONE)
def test_a_missing_fd_is_refused(world: World, client: RawClient, fd: int, member: str) -> None:
    """CVE-2025-8067, Transport rule 4 (handles)."""
    signature, rest = TAKES_ONE[member]
    serial = client.send(MANAGER_PATH, MANAGER, member, signature, [0, *rest])
    assert refusal(client, serial) == (INVALID, False)
    serial = client.send(MANAGER_PATH, MANAGER, member, signature, [0, *rest], unix_fds=0)
    assert refusal(client, serial) == (INVALID, False)
    still_serves(world, client, fd)


@pytest.mark.parametrize("member", TAKES_ONE)
def test_more_fds_than_are_used_are_refused(
    world: World, client: RawClient, polices: bool, fd: int, member: str
) -> None:
    """CVE-2025-8067, Transport rule 4 (handles)."""
    signature, rest = TAKES_ONE[member]
    for count in (2, 16):
        for index in (0, 1):
            args = [index, *rest]
            serial = client.send(MANAGER_PATH, MANAGER, member, signature, args, fds=[fd] * count)
            assert refusal(client, serial) == ((DENIED, True) if polices else (INVALID, False))
    still_serves(world, client, fd)


HANDLES = [
    Variant("h", 0),
    Variant("h", 1),
    Variant("h", 2**32 - 1),
    Variant("ah", [0]),
    Variant("(h)", (0,)),
    Variant("v", Variant("h", 0)),
    Variant("a{sv}", {"offset": Variant("h", 0)}),
    Variant("a{hs}", {0: "x"}),
    Variant("av", [Variant("(vh)", (Variant("ah", [0, 0]), 0))]),
]


@pytest.mark.parametrize("member", ["Attach", "Detach", "Resize"])
def test_a_handle_in_the_options_is_refused(
    world: World, client: RawClient, fd: int, member: str
) -> None:
    """CVE-2025-8067, Transport rule 4 (handles)."""
    for key in ("offset", "size-limit", "reference", "lazy", "unheard-of"):
        for value in HANDLES:
            for fds in ([fd], []):
                args = [0, {key: value}]
                serial = client.send(MANAGER_PATH, MANAGER, member, "ha{sv}", args, fds=fds)
                assert refusal(client, serial) == (INVALID, False), (key, value)
    still_serves(world, client, fd)


@pytest.mark.parametrize("member", ["Attach", "Detach", "Resize"])
def test_a_second_fd_for_a_handle_in_the_options_is_refused(
    world: World, client: RawClient, polices: bool, fd: int, member: str
) -> None:
    """CVE-2025-8067: each fd is used exactly once then, but by no option that there is."""
    for first, second in ((0, 1), (1, 0)):
        serial = client.send(
            MANAGER_PATH,
            MANAGER,
            member,
            "ha{sv}",
            [first, {"offset": Variant("h", second)}],
            fds=[fd, fd],
        )
        assert refusal(client, serial) == ((DENIED, True) if polices else (INVALID, False))
    still_serves(world, client, fd)


@pytest.mark.parametrize(
    ("member", "before"), [("Detach", []), ("Resize", []), ("Sync", []), ("Open", ["r"])]
)
def test_a_device_method_takes_no_handle_in_its_options(
    world: World, client: RawClient, polices: bool, fd: int, member: str, before: list[str]
) -> None:
    """CVE-2025-8067."""
    reply = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
    path, node, _ = reply.body
    fds = world.wait_fds(
        lambda fds: len(fds) == len(world.idle_fds) + 2 and node in fds.values(),
        f"loopd to have {node} and the file more than when idle",
    )
    signature = "s" * len(before) + "a{sv}"
    numbers = sorted(fds)
    for number in numbers:
        args = [*before, {"lazy": Variant("h", number)}]
        assert refusal(client, client.send(path, DEVICE, member, signature, args)) == (
            INVALID,
            False,
        )
    args = [*before, {"lazy": Variant("h", 0)}]
    serial = client.send(path, DEVICE, member, signature, args, fds=[fd])
    assert refusal(client, serial) == ((DENIED, True) if polices else (INVALID, False))
    world.wait_fds(lambda now: now == fds, f"loopd to have the fds {fds} still")
    assert client.call(path, DEVICE, "Detach", "a{sv}", [{}]).body == (True,)


TAKES_NONE: dict[str, tuple[str, str, str, list[Any]]] = {
    "ListDevices": (MANAGER, "ListDevices", "", []),
    "GetDeviceByNode": (MANAGER, "GetDeviceByNode", "s", ["loop0"]),
    "GetManagedObjects": (OBJECT_MANAGER, "GetManagedObjects", "", []),
    "Get": (PROPERTIES, "Get", "ss", [MANAGER, "Version"]),
    "GetAll": (PROPERTIES, "GetAll", "s", [MANAGER]),
    "Set": (PROPERTIES, "Set", "ssv", [MANAGER, "Version", Variant("s", "x")]),
    "Set of a handle": (PROPERTIES, "Set", "ssv", [MANAGER, "Version", Variant("h", 0)]),
    "Introspect": (f"{BUS}.Introspectable", "Introspect", "", []),
    "Ping": (f"{BUS}.Peer", "Ping", "", []),
    "GetMachineId": (f"{BUS}.Peer", "GetMachineId", "", []),
}


@pytest.mark.parametrize("method", TAKES_NONE)
def test_a_method_without_a_handle_takes_no_fd(
    world: World, client: RawClient, polices: bool, fd: int, method: str
) -> None:
    """Transport rule 4 (handles)."""
    interface, member, signature, args = TAKES_NONE[method]
    for count in (1, 2, 16):
        serial = client.send(MANAGER_PATH, interface, member, signature, args, fds=[fd] * count)
        assert refusal(client, serial) == ((DENIED, True) if polices else (INVALID, False))
    still_serves(world, client, fd)


def test_a_property_cannot_be_set_to_an_fd_of_the_daemon(
    world: World, client: RawClient, fd: int
) -> None:
    """CVE-2025-8067, Transport rule 4 (handles)."""
    for number in world.idle_fds:
        args = [MANAGER, "Version", Variant("h", number)]
        name, _ = refusal(client, client.send(MANAGER_PATH, PROPERTIES, "Set", "ssv", args))
        assert name in (INVALID, READ_ONLY)
    still_serves(world, client, fd)


def test_fds_for_what_is_not_there_are_closed(
    world: World, client: RawClient, polices: bool, fd: int
) -> None:
    """CVE-2014-3532, CVE-2020-12049, Transport rule 3 (ownership)."""
    for path, interface, member, error in (
        (MANAGER_PATH, MANAGER, "NoSuchMember", "UnknownMethod"),
        (MANAGER_PATH, f"{LOOPD}.NoSuch", "Attach", "UnknownInterface"),
        (MANAGER_PATH, None, "NoSuchMember", "UnknownMethod"),
        (f"{MANAGER_PATH}/device/loop0_0", DEVICE, "Detach", "UnknownObject"),
        ("/no/such/object", MANAGER, "Attach", "UnknownObject"),
    ):
        # The policy looks at the interface and the member of a call, not at its path.
        stopped = polices and (interface, member) != (MANAGER, "Attach")
        expected = (DENIED, True) if stopped else (f"{BUS}.Error.{error}", False)
        for signature, args in (("ha{sv}", [0, {}]), ("", [])):
            serial = client.send(path, interface, member, signature, args, fds=[fd])
            assert refusal(client, serial) == expected, (path, interface, member)
    still_serves(world, client, fd)


def test_a_wrong_signature_is_refused_and_its_fd_closed(
    world: World, client: RawClient, fd: int
) -> None:
    """CVE-2014-3532, CVE-2020-12049."""
    wrong: list[tuple[str, list[Any]]] = [
        ("", []),
        ("h", [0]),
        ("a{sv}h", [{}, 0]),
        ("ua{sv}", [0, {}]),
        ("ia{sv}", [0, {}]),
        ("sa{sv}", ["/etc/passwd", {}]),
        ("va{sv}", [Variant("h", 0), {}]),
        ("(h)a{sv}", [(0,), {}]),
        ("aha{sv}", [[0], {}]),
        ("ha{ss}", [0, {}]),
        ("ha{sh}", [0, {"offset": 0}]),
        ("ha{sv}h", [0, {}, 0]),
        ("hha{sv}", [0, 0, {}]),
    ]
    for signature, args in wrong:
        serial = client.send(MANAGER_PATH, MANAGER, "Attach", signature, args, fds=[fd])
        assert refusal(client, serial) == (INVALID, False), signature
    still_serves(world, client, fd)


def test_fds_of_a_signal_are_closed(world: World, client: RawClient, fd: int) -> None:
    """CVE-2014-3532, CVE-2020-12049, Transport rule 3 (ownership)."""
    names = [("Attach", MANAGER), ("NameOwnerChanged", BUS), ("Anything", "a.b")]
    for destination in (LOOPD, client.owner_of(LOOPD)):
        for member, interface in names:
            client.send(
                MANAGER_PATH,
                interface,
                member,
                "hsss",
                [0, client.unique_name, client.unique_name, ""],
                destination=destination,
                fds=[fd],
                type=wire.SIGNAL,
            )
    # It comes after the signals, and nobody has left the bus by them.
    still_serves(world, client, fd)


def test_a_call_that_wants_no_reply_gets_none_and_its_fds_are_closed(
    world: World, client: RawClient, fd: int
) -> None:
    """CVE-2014-3532, CVE-2020-12049."""
    log = world.bus.process.log
    printed = len(log.text)
    flags = wire.NO_REPLY_EXPECTED
    serials = [
        client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [index, {}], fds=fds, flags=flags)
        for index, fds in ((1, [fd]), (0, [fd, fd]), (7, []))
    ]
    serials.append(client.send(MANAGER_PATH, MANAGER, "NoSuchMember", fds=[fd], flags=flags))
    serials.append(client.send(MANAGER_PATH, MANAGER, "ListDevices", flags=flags))
    client.call(MANAGER_PATH, f"{BUS}.Peer", "Ping")
    # dbus-daemon itself answers what its policy stops.
    answers = [each for each in client.received if each.reply_serial in serials]
    assert [each for each in answers if each.sender != BUS] == []
    # It would not have let one through, but would have said so.
    replies = ('type="method_return"', 'type="error"')
    assert not [
        line for line in log.text[printed:].splitlines() if any(it in line for it in replies)
    ]
    still_serves(world, client, fd)


def test_a_message_over_the_cap_is_refused_and_its_fd_closed(
    world: World, client: RawClient, fd: int
) -> None:
    """Transport rule 2 (reader)."""
    options = {"reference": Variant("s", "x" * 200_000)}
    serial = client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, options], fds=[fd])
    assert refusal(client, serial) == (f"{BUS}.Error.LimitsExceeded", False)
    still_serves(world, client, fd)


def test_what_loopd_opens_or_gets_is_closed_in_its_children(
    world: World, client: RawClient, fd: int
) -> None:
    path = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd]).body[0]
    inherited = []
    for number, target in world.daemon.fds().items():
        try:
            info = Path(f"/proc/{world.daemon.pid}/fdinfo/{number}").read_text()
        except FileNotFoundError:
            continue  # a glance at sysfs that is over
        (flags,) = (int(each, 8) for each in re.findall(r"^flags:\s*(\d+)$", info, re.MULTILINE))
        if number > 2 and not flags & os.O_CLOEXEC:
            inherited.append(target)
    assert inherited == []
    client.call(path, DEVICE, "Detach", "a{sv}", [{}])


def test_an_fd_that_finds_no_room_is_refused_and_loopd_goes_on(
    world: World, client: RawClient, fd: int
) -> None:
    """CVE-2014-3532, CVE-2020-12049, Transport rule 2 (reader)."""
    pid = world.daemon.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    lowest_free = min(set(range(len(world.idle_fds) + 1)) - set(world.idle_fds))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        for member, (signature, rest) in TAKES_ONE.items():
            serial = client.send(MANAGER_PATH, MANAGER, member, signature, [0, *rest], fds=[fd])
            assert refusal(client, serial) == (f"{BUS}.Error.LimitsExceeded", False)
            client.call(MANAGER_PATH, MANAGER, "ListDevices")
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    still_serves(world, client, fd)


def test_a_thousand_bad_calls_leave_no_fd(
    world: World, client: RawClient, polices: bool, fd: int
) -> None:
    """CVE-2014-3532, CVE-2020-12049, Transport rule 3 (ownership)."""
    kinds: list[tuple[str, str, str, list[Any], int]] = [
        (MANAGER, "Attach", "ha{sv}", [1, {}], 1),
        (MANAGER, "Attach", "ha{sv}", [0, {"x": Variant("h", 0)}], 1),
        (MANAGER, "GetDevice", "u", [0], 1),
        (MANAGER, "Detach", "ha{sv}", [2**32 - 1, {}], 0),
        (MANAGER, "GetDevice", "h", [0], 1),
        (MANAGER, "GetDevice", "h", [0], 16),
        (MANAGER, "NoSuchMember", "h", [0], 1),
        (MANAGER, "ListDevices", "", [], 2),
        (PROPERTIES, "Set", "ssv", [MANAGER, "Version", Variant("h", 0)], 1),
        (f"{LOOPD}.NoSuch", "Attach", "ha{sv}", [0, {}], 3),
    ]
    for _ in range(100):
        serials = [
            client.send(MANAGER_PATH, interface, member, signature, args, fds=[fd] * count)
            for interface, member, signature, args, count in kinds
        ]
        for serial in serials:
            refusal(client, serial)
    still_serves(world, client, fd)
