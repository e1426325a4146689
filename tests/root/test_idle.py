# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd leaves when it has nothing to do, and no call is lost by that."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.deadline import Deadline
from tests.harness.polkit import Answer
from tests.harness.stall import stopped
from tests.harness.world import OTHER, USER, World, make_world

SECOND = "idle_timeout = 1\n"
LONGER = 1.2
"""Seconds after which it would have left."""


@pytest.fixture
def world() -> Iterator[World]:
    with make_world(config=SECOND) as made, made.test() as testing:
        yield testing


def stays(world: World) -> None:
    """Fail if loopd leaves though nobody calls it."""
    with pytest.raises(TimeoutError):
        world.daemon.process.wait(LONGER)


def test_a_loopd_without_devices_leaves_in_good_order(world: World) -> None:
    world.caller().manager("ListDevices")
    assert world.daemon.wait() == 0
    world.bus.wait_released(LOOPD)
    assert "leaving, with nothing to do" in world.daemon.log


def test_it_stays_for_a_device_whatever_keeps_it_and_leaves_after_it(world: World) -> None:
    client = world.caller()
    attached = client.attach(world.image())
    stays(world)
    (remote,) = client.device(attached.path, "Hold", "a{sv}", {})
    fd = remote.fetch()
    try:
        client.kill()
        stays(world)
    finally:
        os.close(fd)
    assert world.daemon.wait() == 0


def test_devices_of_others_do_not_keep_it(world: World) -> None:
    image = world.image()
    deadline = Deadline()
    while world.daemon.process.status is None:
        assert deadline.remaining, "it stays"
        subprocess.run(["losetup", "--detach", loops.losetup(image)], check=True)
    assert world.daemon.wait() == 0


def test_it_stays_for_a_call_that_waits(world: World) -> None:
    world.polkit.on("org.example.loop1.attach", Answer.HANG)
    client = world.caller()
    call = client.attach_begin(world.image())
    stays(world)
    world.polkit.release(Answer.ALLOW)
    path = call.end()[0]
    assert client.device(path, "Detach", "a{sv}", {}) == (True,)
    assert world.daemon.wait() == 0


def test_a_stop_answers_every_call_that_came_before_it(world: World) -> None:
    clients = [world.raw(user) for user in (USER, OTHER)]
    with stopped(world.daemon.pid):
        serials = [
            (client, client.send(MANAGER_PATH, MANAGER, "ListDevices"))
            for client in clients
            for _ in range(16)
        ]
        for client in clients:
            client.call_bus("GetId")  # the bus has passed them on
        world.daemon.process.signal(signal.SIGTERM)
    for client, serial in serials:
        assert client.reply(serial).error_name is None
    assert world.daemon.wait() == 0


PROGRAM = """#!/bin/sh
export PYTHONPATH='{checkout}'
exec {python} -m loopd --config {config} --runtime-directory {directory}/run
"""
SERVICE = f"""[D-BUS Service]
Name={LOOPD}
Exec={{program}}
"""


@contextmanager
def activating_bus(**options: Any) -> Iterator[PrivateBus]:
    """A bus that starts loopd itself."""
    with area("activation") as directory:
        config, program = directory / "loopd.toml", directory / "loopd"
        config.write_text(SECOND)
        paths = {"checkout": CHECKOUT, "config": config, "directory": directory}
        program.write_text(PROGRAM.format(python=sys.executable, **paths))
        program.chmod(0o755)
        (directory / f"{LOOPD}.service").write_text(SERVICE.format(program=program))
        with PrivateBus(servicedirs=[directory], **options) as bus:
            yield bus


def test_no_call_is_lost_when_it_leaves_and_the_bus_starts_it_again() -> None:
    """Calls come when it is just about to leave, and are answered, by whichever loopd."""
    with activating_bus() as bus, bus.connect() as client:
        owners = set()
        for number in range(-3, 4):
            client.call(MANAGER_PATH, MANAGER, "ListDevices")
            owners.add(client.owner_of(LOOPD))
            # Nobody calls until about the time when it leaves.
            client.drain()
            with pytest.raises(TimeoutError):
                Deadline(1.0 + number * 0.003).wait_readable([client.fileno()], "nothing")
            serials = [client.send(MANAGER_PATH, MANAGER, "ListDevices") for _ in range(5)]
            for serial in serials:
                assert client.reply(serial).error_name is None
        assert len(owners) > 1
        bus.wait_released(LOOPD)
