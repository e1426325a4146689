# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client library where loopd does not come: what systemd tells of that, and for how long."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from loopd import errors
from loopd.bus.codec import Variant
from loopd.client import Unavailable, absence
from tests.harness.asynchronous import run_async
from tests.unit.test_client import LOOPD, Bus, client_of, raising

MISTAKE = "/etc/loopd.toml: limits: devices_per_usr: there is no such setting"

SIGNATURES = {"Job": "(uo)", "ExecMainStatus": "i", "NRestarts": "u"}


def unit(**changes: Any) -> dict[str, Any]:
    """What systemd tells of a unit that has ended with status 1, and that nothing will start."""
    told = {
        "LoadState": "loaded",
        "ActiveState": "failed",
        "Job": [0, "/"],
        "Result": "exit-code",
        "ExecMainStatus": 1,
        "StatusText": "",
        "NRestarts": 0,
    }
    values = {**told, **changes}
    return {name: Variant(SIGNATURES.get(name, "s"), each) for name, each in values.items()}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absence, "_PAUSE", 0)


def list_devices(prepare: Callable[[Bus, asyncio.Future[Any]], None]) -> list[Any]:
    """Ask a loopd that has not come; whoever sets the future answers the call."""

    async def ask() -> list[Any]:
        bus, answer = Bus(), asyncio.get_running_loop().create_future()
        bus.owner = None
        bus.answers["GetManagedObjects"] = lambda: answer
        prepare(bus, answer)
        return await client_of(bus).devices()

    return run_async(ask())


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (unit(ExecMainStatus=78, StatusText=MISTAKE), [MISTAKE, "'systemctl start loopd'"]),
        (unit(), ["exit status 1", "'journalctl -u loopd'"]),
        (unit(Result="timeout"), ["timeout", "'journalctl -u loopd'"]),
        (unit(Result="start-limit-hit"), ["given up", "'systemctl reset-failed loopd'"]),
        (unit(ActiveState="inactive", LoadState="masked"), ["'systemctl unmask loopd'"]),
        (unit(ActiveState="inactive", LoadState="bad-setting"), ["loopd.service"]),
        (unit(ActiveState="inactive", Result="success"), ["'systemctl status loopd'"]),
        (unit(ActiveState="inactive", Result="success", NRestarts=2), ["again and again"]),
    ],
)
def test_a_call_ends_when_systemd_has_given_up(told: dict[str, Any], words: list[str]) -> None:
    def prepare(bus: Bus, _: asyncio.Future[Any]) -> None:
        bus.unit = lambda: told

    with pytest.raises(Unavailable) as caught:
        list_devices(prepare)
    assert all(each in str(caught.value) for each in words)
    assert "installed" not in str(caught.value)


def test_a_loopd_that_ends_at_each_start_is_not_waited_for() -> None:
    starts = iter(range(1000))

    def prepare(bus: Bus, _: asyncio.Future[Any]) -> None:
        bus.unit = lambda: unit(ActiveState="activating", Job=[7, "/x"], NRestarts=next(starts))

    with pytest.raises(Unavailable, match="fails when it starts"):
        list_devices(prepare)


@pytest.mark.parametrize(
    "told",
    [
        unit(Job=[7, "/org/freedesktop/systemd1/job/7"]),
        unit(ActiveState="activating", Result="success"),
        unit(ActiveState="activating", NRestarts=1),
        unit(ActiveState="deactivating"),
    ],
    ids=["job", "starting", "restarted once", "stopping"],
)
def test_a_loopd_that_is_about_to_come_is_waited_for(told: dict[str, Any]) -> None:
    def prepare(bus: Bus, answer: asyncio.Future[Any]) -> None:
        questions = iter(range(100))

        def tell() -> dict[str, Any]:
            if next(questions) == 99:
                bus.owner = LOOPD
                answer.set_result([{}])
            return told

        bus.unit = tell

    assert list_devices(prepare) == []


def test_where_there_is_no_systemd_the_bus_is_waited_for() -> None:
    def prepare(bus: Bus, answer: asyncio.Future[Any]) -> None:
        def tell() -> dict[str, Any]:
            asyncio.get_running_loop().call_soon(answer.set_result, [{}])
            raise errors.PeerError("x", "org.freedesktop.DBus.Error.ServiceUnknown")

        bus.unit = tell

    assert list_devices(prepare) == []


def test_a_loopd_that_is_there_may_take_its_time() -> None:
    """As for a question for a password."""

    def prepare(bus: Bus, answer: asyncio.Future[Any]) -> None:
        async def call_bus(member: str, signature: str, body: list[Any]) -> list[Any]:
            asyncio.get_running_loop().call_later(0.01, answer.set_result, [{}])
            return [LOOPD]

        bus.call_bus = call_bus  # type: ignore[method-assign]
        bus.unit = raising(AssertionError("asked systemd"))

    assert list_devices(prepare) == []


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("org.freedesktop.systemd1.UnitMasked", unit(LoadState="masked"), "systemctl unmask"),
        ("org.freedesktop.DBus.Error.TimedOut", unit(StatusText=MISTAKE), MISTAKE),
        ("org.freedesktop.systemd1.NoSuchUnit", unit(LoadState="not-found"), "is it installed?"),
    ],
)
def test_what_the_bus_says_is_explained(name: str, told: dict[str, Any], words: str) -> None:
    def prepare(bus: Bus, _: asyncio.Future[Any]) -> None:
        bus.answers["GetManagedObjects"] = raising(errors.by_name(name, "whatever"))
        bus.unit = lambda: told

    with pytest.raises(Unavailable) as caught:
        list_devices(prepare)
    assert words in str(caught.value)
