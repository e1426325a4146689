# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is told of devices, and how often."""

import asyncio
from dataclasses import replace
from typing import Any
from unittest import mock

from loopd.daemon.config import Limits
from loopd.daemon.devices.device import DETACHING, Device
from loopd.daemon.server.announcer import DEVICE, PATH, Announcer
from loopd.loop.query import Status
from tests.harness.asynchronous import run_async

STATUS = Status(
    binding=1,
    diskseq=1,
    device_number=7 << 8,
    backing_file=b"/file",
    offset=0,
    size_limit=0,
    size=4096,
    read_only=False,
    direct_io=False,
    autoclear=True,
    partition_scan=False,
    partitions=(),
)


def test_changes_in_one_turn_are_told_at_once_as_they_are_in_the_end() -> None:
    """Transport rule 1 (writer): signals are coalesced, however fast something changes."""

    async def body() -> None:
        told: list[Any] = []
        registry = mock.Mock(managed=1)
        announcer = Announcer(registry, Limits(), "", emit=lambda *args, **_: told.append(args))
        announcer.start()
        device = Device(number=0, name="loop0", diskseq=1, status=STATUS)
        announcer.added(device)
        await asyncio.sleep(0)
        told.clear()
        for size in range(1, 501):
            device.status = replace(STATUS, size=size * 512)
            announcer.changed(device)
        await asyncio.sleep(0)
        ((path, _, member, _, (_, changed, _)),) = told
        assert (path, member) == (device.path, "PropertiesChanged")
        assert {name: value.value for name, value in changed.items()} == {"Size": 500 * 512}
        announcer.changed(device)  # and nothing that is as it was
        await asyncio.sleep(0)
        assert len(told) == 1

    run_async(body())


def test_what_has_changed_is_told_before_the_end() -> None:
    """A client that waits for a device to be detaching does not miss it."""

    async def body() -> None:
        told: list[Any] = []
        registry = mock.Mock(managed=1)
        announcer = Announcer(registry, Limits(), "", emit=lambda *args, **_: told.append(args))
        announcer.start()
        device = Device(number=0, name="loop0", diskseq=1, status=STATUS)
        announcer.added(device)
        await asyncio.sleep(0)
        told.clear()
        device.state = DETACHING
        announcer.changed(device)
        announcer.removed(device)
        changed, removed = ((path, member, body) for path, _, member, _, body in told)
        assert changed[:2] == (device.path, "PropertiesChanged")
        assert {name: value.value for name, value in changed[2][1].items()} == {"State": DETACHING}
        assert removed == (PATH, "InterfacesRemoved", [device.path, [DEVICE]])
        await asyncio.sleep(0)
        assert len(told) == 2  # and nothing of it afterwards

    run_async(body())
