# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who does not read what the bus holds of loopd's keeps nobody else from being told.

dbus-daemon reads no more from a sender of whose messages it holds 64 fds, or so many bytes.
"""

from functools import partial
from typing import Any

import pytest

from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, PROPERTIES
from tests.harness.images import memfd
from tests.harness.raw import BUS, BUS_PATH, RawClient
from tests.harness.wire import Variant
from tests.harness.world import OTHER, USER, World

OPENED = 100
"""More than the 64 fds that dbus-daemon bears by default."""
BEARS = 64 << 10
"""Bytes that it bears in the test of signals; 127 MB by default."""
PRELUDE = f"""
from loopd.daemon.server import backlog
backlog._SIGNALS = {BEARS // 2}
backlog._BETWEEN = {BEARS // 64}
"""
"""In the same proportion."""


def attach(client: RawClient, fd: int, **options: Variant) -> str:
    args: list[Any] = [0, options]
    return str(client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", args, fds=[fd]).body[0])


def detach(client: RawClient, path: str) -> None:
    client.call(path, DEVICE, "Detach", "a{sv}", [{}])


def serves(world: World, user: str | None) -> None:
    """Have another user attach, open and detach."""
    with world.bus.connect(user) as client, memfd() as fd:
        path = attach(client, fd)
        opened = client.call(path, DEVICE, "Open", "sa{sv}", ["r", {}])
        assert len(opened.fds) == 1
        client.received.append(opened)  # closed with it
        client.call(MANAGER_PATH, MANAGER, "ListDevices")
        detach(client, path)


@pytest.mark.both_buses
def test_fds_that_a_client_does_not_read_make_loopd_mute_for_nobody_else(world: World) -> None:
    """Unread answers: by dbus-daemon's stock limits, it holds 64 fds of loopd's at most."""
    deaf, paces = world.raw(USER), world.raw(None)
    with memfd() as fd:
        path = attach(deaf, fd)
    # The bus fills the socket of the deaf one, and has to keep what comes after that.
    for _ in range(100):
        deaf.send(BUS_PATH, f"{BUS}.Introspectable", "Introspect", destination=BUS)
    for _ in range(OPENED):
        deaf.send(path, DEVICE, "Open", "sa{sv}", ["r", {}])
        # One after the other, because of many at a time most are refused.
        for _ in range(3):
            paces.call(path, PROPERTIES, "GetAll", "s", [DEVICE])
    for user in (OTHER, None):
        serves(world, user)
    # Who begins to read is served as well.
    with world.bus.connect(USER) as same_user:
        deaf.close()
        same_user.call(MANAGER_PATH, MANAGER, "ListDevices")


@pytest.mark.parametrize("bus_type", [partial(PrivateBus, limits={"max_incoming_bytes": BEARS})])
def test_signals_that_a_listener_does_not_read_make_loopd_mute_for_nobody(new_world: Any) -> None:
    """Unread signals: dbus-daemon holds one until the last listener has read it."""
    world = new_world(prelude=PRELUDE)
    deaf, user = world.raw(OTHER), world.raw(USER)
    deaf.add_match(f"sender='{LOOPD}'")
    with memfd() as fd:
        path = attach(user, fd)
        # Each change of the property Locked is a signal of 200 bytes and more.
        for _ in range(BEARS // 200):
            for kind in ("shared", "none"):
                user.call(path, DEVICE, "Lock", "sa{sv}", [kind, {}])
        for other in (OTHER, None):
            serves(world, other)
        detach(user, path)
    assert "listeners do not read" in world.daemon.log
