# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd hears of loopd, whose part the test plays."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loopd import errors
from loopd.daemon.host import systemd as systemd_peer
from tests.harness.area import area
from tests.harness.bus import PrivateBus
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.stall import stopped

# systemd hears the same of each.
pytestmark = pytest.mark.one_library

INTERVAL = 0.2
"""Seconds."""


class Systemd:
    """The socket that a service notifies."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.environment = {
            "NOTIFY_SOCKET": str(path),
            "WATCHDOG_USEC": str(int(INTERVAL * 1_000_000)),
        }

    def heard(self, timeout: float | None = None) -> str:
        """Return what is said next."""
        Deadline(timeout).wait_readable([self.socket.fileno()], "what systemd is told")
        return self.socket.recv(4096).decode()

    def heard_so_far(self) -> list[str]:
        """Return all that has been said and not been heard."""
        said = []
        try:
            while True:
                said.append(self.socket.recv(4096, socket.MSG_DONTWAIT).decode())
        except BlockingIOError:
            return said


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    with area("notify") as directory:
        made = Systemd(directory / "notify")
        with made.socket:
            yield made


def test_systemd_hears_of_the_start_the_life_and_the_end(
    make_daemon: Callable[..., Daemon], systemd: Systemd
) -> None:
    daemon = make_daemon(environment=systemd.environment)
    assert systemd.heard() == "READY=1"
    for _ in range(3):
        assert systemd.heard() == "WATCHDOG=1"
    assert daemon.terminate() == 0
    said = systemd.heard_so_far()
    assert said[-1] == "STOPPING=1"
    assert set(said[:-1]) <= {"WATCHDOG=1"}


def test_a_loopd_that_the_bus_does_not_answer_is_not_alive(
    bus: PrivateBus, make_daemon: Callable[..., Daemon], systemd: Systemd
) -> None:
    """Transport rule 12 (losing the bus): the watchdog's ping goes through the bus."""
    make_daemon(environment=systemd.environment)
    assert systemd.heard() == "READY=1"
    assert systemd.heard() == "WATCHDOG=1"
    with stopped(bus.pid):
        with suppress(TimeoutError):
            systemd.heard(INTERVAL * 3)  # one that was under way
        with pytest.raises(TimeoutError):
            systemd.heard(INTERVAL * 3)
    assert systemd.heard() == "WATCHDOG=1"


def test_a_loopd_that_hangs_is_not_alive(
    make_daemon: Callable[..., Daemon], systemd: Systemd
) -> None:
    daemon = make_daemon(environment=systemd.environment)
    assert systemd.heard() == "READY=1"
    with stopped(daemon.pid):
        systemd.heard_so_far()
        with pytest.raises(TimeoutError):
            systemd.heard(INTERVAL * 3)
    assert systemd.heard() == "WATCHDOG=1"


class EnoughError(Exception):
    """Ends what goes on for ever."""


def test_what_else_is_to_be_looked_after_does_not_wait_for_the_bus() -> None:
    """Transport rule 12 (losing the bus): such as whether systemd keeps each device's fds."""
    looked, told = 0, []

    async def ask() -> None:
        raise errors.TimedOut("the bus did not answer")

    async def look() -> None:
        nonlocal looked
        looked += 1
        if looked == 3:
            raise EnoughError

    async def tell(state: str) -> None:
        told.append(state)

    with pytest.raises(EnoughError):
        asyncio.run(asyncio.wait_for(systemd_peer.stay_alive(0.001, ask, look, tell), 20))
    assert (looked, told) == (3, [])


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_interval_is_the_environments(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], interval: float | None
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert systemd_peer.watchdog_interval() == interval
