# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who writes what the event loop reads: the event loop alone; threads return facts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from loopd.daemon.access import ROOT
from loopd.daemon.actions.change import ResizeOptions
from loopd.daemon.config import Config, Deadlines
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.leases import SYSTEM, Lease
from loopd.daemon.devices.spare_numbers import Spares
from loopd.errors import TimedOut
from loopd.loop.block_device import Lock
from loopd.loop.loop_device import LoopDevice
from tests.harness.images import MIB, make_gpt
from tests.harness.inside import Inside, run_inside
from tests.harness.script import Script

EVENT_LOOP = threading.main_thread()


@contextmanager
def written_by_the_event_loop(inside: Inside) -> Iterator[list[str]]:
    """Note what threads write of devices that are recorded, of their leases, and of spares."""
    found: list[str] = []

    def is_recorded(thing: Any) -> bool:
        return any(thing in (device, device.lease, device.loop) for device in inside.registry)

    def guarded(write: Callable[..., None]) -> Callable[..., None]:
        def guard(thing: Any, name: str, value: Any) -> None:
            if threading.current_thread() is not EVENT_LOOP and is_recorded(thing):
                found.append(f"{type(thing).__name__}.{name}")
            write(thing, name, value)

        return guard

    with ExitStack() as stack:
        for kind in (Device, Lease, LoopDevice, Spares):
            stack.enter_context(
                mock.patch.object(kind, "__setattr__", guarded(kind.__setattr__), create=True)
            )
        yield found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_gpt(tmp_path / "image")


def test_no_thread_writes_what_the_event_loop_reads(tmp_path: Path, image: Path) -> None:
    async def story(inside: Inside, _script: Script) -> None:
        with written_by_the_event_loop(inside) as found:
            caller = inside.caller(ROOT)
            device = await inside.attach(
                caller, image, partition_scan=True, lock=Lock.SHARED, lifetime=SYSTEM
            )
            do = inside.operations
            await do.set_autoclear(caller, device, True)
            await do.set_autoclear(caller, device, False)
            await do.set_lifetime(caller, device, "connection")
            await do.set_reference(caller, device, b"name")
            await do.set_direct_io(caller, device, False)
            await do.rescan_partitions(caller, device)
            await do.resize(caller, device, ResizeOptions(size_limit=MIB, force=True))
            await do.set_sector_size(caller, device, 1024)
            await do.sync(caller, device)
            await do.lock(caller, device, Lock.EXCLUSIVE)
            await do.lock(caller, device, Lock.NONE)
            (await do.open(caller, device, writable=False, partition=None)).close()
            hold = await do.hold(caller, device)
            assert await inside.manager.detach(caller, device)
            hold.close()
            assert (device.reference, device.sector_size) == (b"name", 1024)
            await inside.until_none(inside.remains)
        assert found == []

    run_inside(tmp_path, story)


@pytest.mark.parametrize("enable", [True, False])
def test_a_lease_may_end_while_a_thread_is_at_work(
    tmp_path: Path, image: Path, enable: bool
) -> None:
    """A thread that looks twice finds no lease the second time."""
    leases: dict[Device, list[Lease | None]] = {}

    def lease(device: Device) -> Lease | None:
        kept = leases.setdefault(device, [None])
        # To a thread it ends as soon as the thread has seen it.
        in_thread = threading.current_thread() is not EVENT_LOOP
        return kept.pop() if in_thread and len(kept) > 1 else kept[-1]

    def grant(device: Device, value: Lease | None) -> None:
        leases[device] = [value] if value is None else [None, value]

    async def story(inside: Inside, _script: Script) -> None:
        caller = inside.caller(ROOT)
        with mock.patch.object(Device, "lease", property(lease, grant), create=True):
            device = await inside.attach(caller, image, lifetime=SYSTEM)
            await inside.operations.set_autoclear(caller, device, enable)
            assert await inside.manager.detach(caller, device)
            await inside.until_none(inside.remains)

    run_inside(tmp_path, story)


def test_what_comes_too_late_is_taken_up_all_the_same(tmp_path: Path, image: Path) -> None:
    """Else the next operation would go by what was before."""
    go_on = threading.Event()

    async def story(inside: Inside, script: Script) -> None:
        caller = inside.caller(ROOT)
        device = await inside.attach(caller, image)
        hasty = Config(deadlines=Deadlines(operation=1))
        script.before("loop_set_status64", lambda: go_on.wait(20) and None)
        with mock.patch.object(inside.manager, "_config", hasty), pytest.raises(TimedOut):
            await inside.operations.set_reference(caller, device, b"late")
        assert device.reference == b""
        inside.told.clear()
        go_on.set()
        # The next operation waits for it.
        async with device.operating:
            assert device.reference == b"late"
            assert ("changed", device.path) in inside.told
        assert await inside.manager.detach(caller, device)
        await inside.until_none(inside.remains)

    run_inside(tmp_path, story)
