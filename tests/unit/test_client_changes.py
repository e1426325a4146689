# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the client library tells of changes, of a loopd that is restarted, and of a lost bus."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from loopd import client, errors
from loopd.bus.codec import Variant
from loopd.client import blocking, changes, link
from loopd.client.changes import Changes
from loopd.client.link import Link
from loopd.client.watch import DEVICE, NAME, OBJECT_MANAGER, PROPERTIES, Ended, Watch
from tests.harness.asynchronous import run_async
from tests.unit.test_client import (
    COME,
    IN_SIGNATURES,
    LEFT,
    LOOPD,
    OBJECT,
    Bus,
    client_of,
    properties,
    raising,
    removed,
    signal_from,
    turns,
)

OTHER = OBJECT + "1"
NO_REPLY = errors.by_name("org.freedesktop.DBus.Error.NoReply", "it left")
NOT_THERE = errors.by_name("org.freedesktop.DBus.Error.ServiceUnknown", "none")


def added(path: str = OTHER, **told: Variant) -> Any:
    body = (path, {DEVICE: properties(**told), PROPERTIES: {}})
    manager = "/org/example/Loop1"
    return signal_from(LOOPD, manager, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", *body)


def changed(path: str = OBJECT, sender: str = LOOPD, **told: Variant) -> Any:
    body = (DEVICE, told, [])
    return signal_from(sender, path, PROPERTIES, "PropertiesChanged", "sa{sv}as", *body)


def objects(**told: Variant) -> Callable[[], Any]:
    """What GetManagedObjects answers: the manager's own object is not among them."""
    return lambda: [{OBJECT: {DEVICE: properties(**told), PROPERTIES: {}}}]


class Told(list[Any]):
    """The changes of a client that gets signals, and looks at once or late."""

    def __init__(self) -> None:
        super().__init__()
        self.bus, self.watch = Bus(), Watch()
        self.bus.answers["GetManagedObjects"] = objects()
        self.client = client_of(self.bus, self.watch)

    async def by(self, *events: Any, late: bool = False, only: bool = False) -> "Told":
        """Iterate over what comes of signals, and of functions that are called between them."""
        device = self.client._device(OBJECT, "/dev/loop3", 41) if only else None
        self.bus.answers["GetAll"] = lambda: [properties()]
        async with self.client.changes(device) as iterator:
            assert [each.path for each, _ in iterator.devices] == [OBJECT]
            await turns()
            looking = None if late else asyncio.ensure_future(self._look(iterator))
            for event in events:
                event() if callable(event) else self.watch.on_signal(event)
                await turns()
            looking = looking or asyncio.ensure_future(self._look(iterator))
            await turns()
            if looking.done():
                self.append(looking.exception() or "end")
            looking.cancel()
            await asyncio.wait({looking})
        assert self.watch._listeners == []
        return self

    async def _look(self, iterator: Changes[Any]) -> None:
        async for change in iterator:
            self.append((change.kind, change.device.path, *change.names))


@pytest.mark.parametrize("late", [False, True])
def test_what_happens_is_told_in_order(late: bool) -> None:
    async def told() -> list[Any]:
        size = {"Size": Variant("t", 8192), "ReadOnly": Variant("b", False)}
        news = [added(), changed(**size), changed(OTHER, Reference=Variant("s", "x"))]
        return await Told().by(*news, removed(), removed(path=OTHER), late=late)

    assert run_async(told()) == [
        ("attached", OTHER),
        ("changed", OBJECT, "size"),
        ("changed", OTHER, "reference"),
        ("detached", OBJECT),
        ("detached", OTHER),
    ]


def test_what_is_no_news_is_not_told() -> None:
    other = ("org.example.Other", {"Size": Variant("t", 1)}, [])
    of_another_interface = signal_from(
        LOOPD, OBJECT, PROPERTIES, "PropertiesChanged", "sa{sv}as", *other
    )

    async def told() -> list[Any]:
        return await Told().by(
            added(OBJECT),
            changed(Size=Variant("t", 4096)),
            changed(sender=":1.66", Size=Variant("t", 1)),
            changed(OBJECT + "7", Size=Variant("t", 1)),
            of_another_interface,
            removed(path=OBJECT + "7"),
            changed(Novelty=Variant("s", "of a newer loopd")),
        )

    assert run_async(told()) == []


def test_what_the_next_loopd_finds_otherwise_is_told() -> None:
    async def told() -> list[Any]:
        each = Told()

        def meanwhile() -> None:
            each.bus.answers["GetManagedObjects"] = lambda: [
                {
                    OBJECT: {DEVICE: properties(Size=Variant("t", 512))},
                    OTHER: {DEVICE: properties(Number=Variant("u", 4))},
                }
            ]

        return await each.by(LEFT, meanwhile, COME)

    assert run_async(told()) == [("changed", OBJECT, "size"), ("attached", OTHER)]


def test_a_restart_that_keeps_everything_is_no_news() -> None:
    async def told() -> list[Any]:
        return await Told().by(LEFT, COME)

    assert run_async(told()) == []


def test_a_loopd_that_leaves_again_is_not_the_end() -> None:
    async def told() -> list[Any]:
        each = Told()

        def fail() -> None:
            each.bus.answers["GetManagedObjects"] = raising(NOT_THERE)

        def recover() -> None:
            each.bus.answers["GetManagedObjects"] = lambda: [{}]

        return await each.by(LEFT, fail, COME, recover, LEFT, COME)

    assert run_async(told()) == [("detached", OBJECT)]


def test_a_lost_bus_ends_it_with_an_error_of_its_own() -> None:
    async def told() -> list[Any]:
        each = Told()
        return await each.by(lambda: each.watch.end_all(Ended.BUS_LOST))

    (error,) = run_async(told())
    assert isinstance(error, client.Disconnected)


def test_who_does_not_look_for_long_is_told_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_MAX_HEARD", 3)

    async def told() -> list[Any]:
        each = Told()
        each.bus.answers["GetManagedObjects"] = objects()

        def sum_up() -> None:
            each.bus.answers["GetManagedObjects"] = objects(Size=Variant("t", 5))

        sizes = [changed(Size=Variant("t", number)) for number in (1, 2, 3, 4, 5)]
        return await each.by(*sizes, sum_up, late=True)

    assert run_async(told()) == [("changed", OBJECT, "size")]


def test_the_changes_of_one_device_end_with_it() -> None:
    async def told() -> list[Any]:
        return await Told().by(
            added(), changed(State=Variant("s", "detaching")), removed(), only=True
        )

    assert run_async(told()) == [("changed", OBJECT, "state"), ("detached", OBJECT), "end"]


def test_the_changes_of_a_device_that_goes_with_loopd_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to send a signal."""
    monkeypatch.setattr("loopd.client.device._SUCCESSION", 0)

    async def told() -> list[Any]:
        return await Told().by(LEFT, only=True)

    assert run_async(told()) == [("detached", OBJECT), "end"]


def test_a_device_is_the_same_object_wherever_it_comes_from() -> None:
    async def look() -> None:
        told = Told()
        told.bus.answers["GetDeviceByNode"] = lambda: [OBJECT]
        told.bus.answers["GetAll"] = lambda: [properties()]
        ((device, _),) = await told.client.devices()
        assert await told.client.device_by_node("loop3") is device
        async with told.client.changes() as iterator:
            told.watch.on_signal(removed())
            assert (await anext(iterator)).device is device

    run_async(look())


def test_the_blocking_front_iterates_too() -> None:
    with asyncio.Runner() as runner:
        told = Told()
        front = blocking.Client(runner, told.client)
        with front.changes() as iterator:
            ((device, known),) = iterator.devices
            assert (device.path, known.number) == (OBJECT, 3)
            told.watch.on_signal(removed())
            kind, gone, last, names = next(iterator)
            assert (kind, gone, last, names) == ("detached", device, known, ())
            told.watch.end_all(Ended.BUS_LOST)
            with pytest.raises(client.Disconnected):
                next(iterator)


# --- loopd is restarted -------------------------------------------------------------------------


def answers(*outcomes: Any) -> Callable[[], Any]:
    """An answer for each call: a body, or an error to raise."""
    left = list(outcomes)

    def answer() -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return answer


Call = Callable[[client.Device], Any]


@pytest.mark.parametrize(
    ("member", "call", "body"),
    [
        ("GetAll", lambda device: device.properties(), [properties()]),
        ("Resize", lambda device: device.resize(size_limit=512), [512]),
        ("SetReference", lambda device: device.set_reference("x"), []),
        ("SetLifetime", lambda device: device.set_lifetime("user"), []),
        ("Sync", lambda device: device.sync(), []),
        ("Detach", lambda device: device.detach(), [True]),
    ],
)
def test_what_a_loopd_that_left_did_not_answer_is_sent_to_the_next(
    member: str, call: Call, body: list[Any]
) -> None:
    async def called(*outcomes: Any) -> int:
        bus = Bus()
        bus.answers[member] = answers(*outcomes)
        await call(client_of(bus)._device(OBJECT, "/dev/loop3", 41))
        return len(bus.calls)

    assert run_async(called(NO_REPLY, body)) == 2
    with pytest.raises(client.Unavailable):
        run_async(called(NO_REPLY, NO_REPLY))  # and not for ever


def test_nothing_is_attached_twice() -> None:
    async def attached() -> None:
        bus = Bus()
        bus.answers["Attach"] = answers(NO_REPLY, [OBJECT, "/dev/loop3", 41])
        with pytest.raises(client.Unavailable, match="before it answered"):
            await client_of(bus).attach("/dev/null")
        assert len(bus.calls) == 1

    run_async(attached())


@pytest.mark.parametrize("by_fd", [False, True])
def test_a_detach_that_was_done_and_not_answered_is_done(by_fd: bool) -> None:
    async def detached(*outcomes: Any) -> bool:
        bus = Bus()
        bus.answers["Detach"] = answers(*outcomes)
        if by_fd:
            return await client_of(bus).detach_by_fd(0, lazy=True)
        return await client_of(bus)._device(OBJECT, "/dev/loop3", 41).detach(lazy=True)

    gone = errors.NoSuchDevice("x")
    assert run_async(detached(NO_REPLY, gone)) is True
    assert run_async(detached(NO_REPLY, [False])) is False
    with pytest.raises(errors.NoSuchDevice):
        run_async(detached(gone))


# --- the bus is lost ----------------------------------------------------------------------------


@pytest.fixture
def reconnecting(monkeypatch: pytest.MonkeyPatch) -> tuple[client.Client, Bus]:
    """A client whose connection is lost, and the bus that it can connect to anew."""
    lost, new = Bus(), Bus()
    lost.answers |= {
        "Attach": answers(*([f"{OBJECT}_{each}", "/dev/loop3", each] for each in range(6))),
        "GetAll": raising(errors.BusError("the bus closed the connection")),
        "Detach": lambda: [True],
    }

    async def opened(address: str) -> tuple[Any, Watch, str]:
        assert address == "unix:path=/x"
        return new, link.Watch(), ":1.30"  # type: ignore[attr-defined]

    monkeypatch.setattr(link, "_opened", opened)
    made = Link(lost, Watch(), interactive=False, address="unix:path=/x")  # type: ignore[arg-type]
    made.name = ":1.9"
    return client.Client(made), new


def test_a_lost_connection_is_told_as_such(reconnecting: tuple[client.Client, Bus]) -> None:
    async def ask() -> None:
        device = await reconnecting[0].attach("/dev/null")
        with pytest.raises(client.Disconnected, match="closed the connection"):
            await device.properties()

    run_async(ask())


def test_reconnecting_tells_what_is_left(
    reconnecting: tuple[client.Client, Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def reconnect() -> None:
        connected, bus = reconnecting
        watch = Watch()
        monkeypatch.setattr(link, "Watch", lambda: watch)
        devices = [await connected.attach("/dev/null") for _ in range(6)]
        leased, kept, held, detaching, vanished, detached = devices
        await detached.detach()
        found = {
            leased: properties(),
            kept: properties(Lifetime=Variant("s", "user"), Holder=Variant("s", "")),
            held: properties(Holds=Variant("u", 1)),
            detaching: properties(Lifetime=Variant("s", "system"), State=Variant("s", "detaching")),
        }
        told = {each.path: {DEVICE: what} for each, what in found.items()}
        bus.answers["GetManagedObjects"] = lambda: [told]
        bus.answers["GetAll"] = lambda: [properties()]
        there, gone = await connected.reconnect()
        assert there == (kept, held)
        assert gone == (leased, detaching, vanished)
        assert [each.gone for each in devices] == [True, False, False, True, True, True]
        # The objects go on, over the new connection.
        await kept.properties()
        assert bus.calls[-1] == (kept.path, "GetAll")
        # So do signals.
        async with connected.changes() as iterator:
            watch.on_signal(removed(path=kept.path))
            change = await asyncio.wait_for(anext(iterator), 10)
            assert (change.kind, change.device) == ("detached", kept)
        # And what has been told once is not told again.
        assert (await connected.reconnect()).gone == ()

    run_async(reconnect())


def test_a_device_that_another_connection_keeps_is_there(
    reconnecting: tuple[client.Client, Bus],
) -> None:
    async def reconnect() -> None:
        connected, bus = reconnecting
        device = await connected.attach("/dev/null")
        told = {device.path: {DEVICE: properties(Holder=Variant("s", ":1.21"))}}
        bus.answers["GetManagedObjects"] = lambda: [told]
        assert (await connected.reconnect()).there == (device,)

    run_async(reconnect())


def test_the_blocking_front_reconnects_with_its_own_devices(
    reconnecting: tuple[client.Client, Bus],
) -> None:
    connected, bus = reconnecting
    bus.answers["GetManagedObjects"] = lambda: [{}]
    with asyncio.Runner() as runner:
        front = blocking.Client(runner, connected)
        device = front.attach("/dev/null")
        assert front.reconnect().gone == (device,)
        assert device.gone


# --- the whole interface ------------------------------------------------------------------------


def test_loopd_tells_of_itself() -> None:
    async def ask() -> client.Daemon:
        bus = Bus()
        numbers = {"DeviceCount": 1, "MaxDevices": 2, "MaxDevicesPerUser": 3}
        told = {name: Variant("u", number) for name, number in numbers.items()}
        bus.answers["GetAll"] = lambda: [{"Version": Variant("s", "9"), **told}]
        found = await client_of(bus).daemon()
        assert bus.bodies == [[NAME]]
        return found

    assert run_async(ask()) == ("9", 1, 2, 3, "")


def test_every_method_of_the_interface_can_be_called() -> None:
    sources = "".join(
        inspect.getsource(module) for module in (client.client, client.device, client.changes)
    )
    methods = {member for interface, member in IN_SIGNATURES if interface.startswith(NAME)}
    missing = {member for member in methods if f'"{member}"' not in sources}
    assert missing == {"ListDevices"}  # which is for people; devices() tells more


def test_the_options_of_attach_are_the_same_everywhere() -> None:
    told = get_type_hints(client.Client.attach)
    parameters = inspect.signature(client.Client.attach).parameters.values()
    options = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert get_type_hints(client.AttachOptions) == {name: told[name] for name in options}
