# SPDX-License-Identifier: LGPL-2.1-or-later
"""For how long a user may have a device exclusively, and the pause that others have then."""

import asyncio
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from loopd.daemon.access import ROOT, Caller
from loopd.daemon.config import Deadlines
from loopd.daemon.devices import locks as module
from loopd.daemon.devices.device import Device
from loopd.errors import DeviceBusy
from loopd.loop.block_device import Lock
from tests.harness.images import MIB, make_plain
from tests.harness.inside import Inside, run_inside
from tests.harness.script import Script

UID = 1000
TIME = float(Deadlines().exclusive_lock)
"""Seconds for which a device may be locked exclusively."""


class Clock:
    """The event loop's clock, which can be set forward."""

    def __init__(self) -> None:
        """Follow the clock."""
        loop = asyncio.get_running_loop()
        self._ahead, self._time = 0.0, loop.time
        loop.time = self._now  # type: ignore[method-assign]

    def _now(self) -> float:
        return self._time() + self._ahead

    async def forward(self, seconds: float) -> None:
        """Let so much time go by, and all that was to happen meanwhile happen."""
        self._ahead += seconds
        for _ in range(3):
            await asyncio.sleep(0)


Told = Callable[[Inside, Clock, Device, Caller], Coroutine[Any, Any, None]]


def tell(tmp_path: Path, story: Told, uid: int = UID) -> None:
    """Tell a story of a device and its owner."""

    async def run(inside: Inside, _script: Script) -> None:
        clock, caller = Clock(), inside.caller(uid)
        device = await inside.attach(caller, make_plain(tmp_path / "image", MIB))
        await story(inside, clock, device, caller)
        inside.leave(caller)
        await inside.until_none(inside.remains)

    run_inside(tmp_path, run)


async def busy(inside: Inside, caller: Caller, device: Device) -> str:
    """Return why a device cannot be locked exclusively."""
    with pytest.raises(DeviceBusy) as failure:
        await inside.operations.lock(caller, device, Lock.EXCLUSIVE)
    assert device.lock is not Lock.EXCLUSIVE
    return str(failure.value)


def test_an_exclusive_lock_that_has_ended_is_not_taken_again_at_once(tmp_path: Path) -> None:
    """Locked again and again: udev has its look, whichever connection of the user's asks."""

    async def story(inside: Inside, clock: Clock, device: Device, caller: Caller) -> None:
        second = inside.caller(UID)
        await inside.operations.lock(caller, device, Lock.EXCLUSIVE)
        for _ in range(2):
            await clock.forward(TIME)
            assert device.lock is Lock.NONE
            for each in (caller, second):
                text = await busy(inside, each, device)
                assert re.search(rf"try again in {module._PAUSE:g} s$", text)
            # A shared lock is in nobody's way: udev takes one itself.
            await inside.operations.lock(second, device, Lock.SHARED)
            await inside.operations.lock(second, device, Lock.NONE)
            await clock.forward(module._PAUSE / 2)
            assert "try again in 2 s" in await busy(inside, second, device)
            await clock.forward(module._PAUSE / 2)
            await inside.operations.lock(second, device, Lock.EXCLUSIVE)
        await inside.operations.lock(second, device, Lock.NONE)

    tell(tmp_path, story)


@pytest.mark.parametrize("between", [Lock.NONE, Lock.SHARED])
def test_locks_that_follow_each_other_have_their_time_together(
    tmp_path: Path, between: Lock
) -> None:
    """Locked again and again."""

    async def story(inside: Inside, clock: Clock, device: Device, caller: Caller) -> None:
        for _ in range(3):
            await inside.operations.lock(caller, device, Lock.EXCLUSIVE)
            await clock.forward(TIME * 0.3)
            assert device.lock is Lock.EXCLUSIVE
            await inside.operations.lock(caller, device, between)
        await inside.operations.lock(caller, device, Lock.EXCLUSIVE)
        await clock.forward(TIME * 0.1)
        assert device.lock is Lock.NONE
        await busy(inside, caller, device)

    tell(tmp_path, story)


def test_a_pause_gives_all_of_the_time_back(tmp_path: Path) -> None:
    async def story(inside: Inside, clock: Clock, device: Device, caller: Caller) -> None:
        for _ in range(5):
            await inside.operations.lock(caller, device, Lock.EXCLUSIVE)
            await clock.forward(TIME * 0.9)
            assert device.lock is Lock.EXCLUSIVE
            await inside.operations.lock(caller, device, Lock.NONE)
            await clock.forward(module._PAUSE)

    tell(tmp_path, story)


def test_root_needs_no_pause(tmp_path: Path) -> None:
    async def story(inside: Inside, clock: Clock, device: Device, caller: Caller) -> None:
        for _ in range(2):
            await inside.operations.lock(caller, device, Lock.EXCLUSIVE)
            await clock.forward(TIME * 2)
            assert device.lock is Lock.EXCLUSIVE
            await inside.operations.lock(caller, device, Lock.NONE)

    tell(tmp_path, story, ROOT)
