# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who does not read what the bus holds of loopd's keeps nobody else from being told.

dbus-daemon reads no more from a sender of whose messages it holds 64 fds, or so many bytes.
"""

from functools import partial
from typing import Any

import pytest

from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH
from tests.harness.images import memfd
from tests.harness.raw import RawClient
from tests.harness.wire import Variant
from tests.harness.world import OTHER, USER, World

OPENED = 200
"""Three times the fds that dbus-daemon bears by default."""
BEARS = 256 << 10
"""Bytes that it bears in the test of signals; 127 MB by default."""
PRELUDE = f"""
from loopd import backlog
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
    deaf = world.raw(USER)
    with memfd() as fd:
        path = attach(deaf, fd)
    for _ in range(OPENED):
        # Answered while few enough wait; the bus and loopd may have the rest wait for long.
        deaf.send(path, DEVICE, "Open", "sa{sv}", ["r", {}], flags=0)
        deaf.send(MANAGER_PATH, MANAGER, "ListDevices", flags=1)
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
    signalled = 0
    with memfd() as fd:
        path = attach(user, fd)
        number = 0
        while signalled < 2 * BEARS:
            number += 1
            args = [f"reference {number:4}" + 40 * "x", {}]
            user.call(path, DEVICE, "SetReference", "sa{sv}", args)
            signalled += 200
        for other in (OTHER, None):
            serves(world, other)
        detach(user, path)
    assert "listeners do not read" in world.daemon.log
