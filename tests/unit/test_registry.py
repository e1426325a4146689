# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registry and manager over a scripted kernel: what is done behind loopd's back is noticed."""

import asyncio
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from loopd.daemon.actions import detach as module
from loopd.daemon.actions.change import ResizeOptions
from loopd.daemon.config import Config, Limits
from loopd.daemon.devices import registry
from loopd.daemon.devices.device import DETACHING, Device
from loopd.daemon.devices.records import Record, Records
from loopd.errors import DeviceBusy, LimitsExceeded, NoSuchDevice, Overlap
from loopd.fd import OwnedFd
from loopd.loop import block_device, change, kernel, loop_device, query
from loopd.loop.block_device import Lock
from loopd.loop.loop_device import LoopDevice
from tests.harness.asynchronous import run_async
from tests.harness.images import MIB, make_plain
from tests.harness.inside import Inside
from tests.harness.scripted import ScriptedKernel

UID = 1000


class Parts(Inside):
    """What the daemon is made of, with one caller and one image."""

    def __init__(self, directory: Path, scripted: ScriptedKernel, devices: int) -> None:
        super().__init__(
            directory, scripted, config=Config(limits=Limits(devices_per_user=devices))
        )
        self.directory = directory
        # Told by `look` alone.
        scripted.uevent = lambda *_: None
        self.one = self.caller(UID)
        self.changes = asyncio.Event()
        """Set when something is told to have changed."""
        self.image = make_plain(directory / "image", MIB)

    async def attach_image(self, **options: Any) -> Device:
        return await self.attach(self.one, self.image, **options)

    def _changed(self, device: Device) -> None:
        super()._changed(device)
        self.changes.set()

    def recorded(self, device: Device) -> Record:
        """Return what is on disk about a device."""
        found = Records(self.directory).load()
        return next(record for record in found if record.label == device.label)

    async def look(self, device: Device) -> None:
        """Do as at an event of the kernel's, and wait until it has been dealt with."""
        assert device.number is not None
        await self.registry._look(device.number)
        await self.registry._tasks.finish(10)


Story = Callable[[Parts], Coroutine[Any, Any, None]]
WithParts = Callable[..., None]


@pytest.fixture
def with_parts(area: Path) -> WithParts:
    """Run a story with the parts of a daemon over a scripted kernel, and look for what it left."""

    def run(story: Story, devices: int = 1) -> None:
        async def main() -> None:
            before = set(os.listdir("/proc/self/fd"))
            parts = Parts(area, scripted, devices)
            await story(parts)
            await parts.ending.stop(10)
            for tasks in (
                parts.ending._tasks,
                parts.manager._tasks,
                parts.registry._tasks,
                parts.attaching._tasks,
            ):
                await tasks.finish(10)
            parts.lifetimes.close()
            assert scripted.bound() == []
            assert parts.threads.stop(10) == 0
            assert len(parts.leases) == 0
            assert scripted.open_fds() == []
            assert set(os.listdir("/proc/self/fd")) == before

        scripted = ScriptedKernel()
        with scripted.installed():
            run_async(main())

    return run


def test_a_device_that_the_kernel_lets_go_of_takes_lease_lock_and_place_with_it(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image(lock=Lock.EXCLUSIVE)
        with pytest.raises(LimitsExceeded):
            await parts.attach_image(allow_overlap=True)
        parts.scripted.let_go(device.number)
        await parts.look(device)
        assert ("removed", device.path) in parts.told
        assert not parts.registry.knows(device)
        assert parts.leases.of(device.path) is None
        assert device.gone.is_set()
        with pytest.raises(NoSuchDevice):
            await parts.operations.resize(parts.one, device, ResizeOptions())
        # Its place is free again, and so is its file.
        await parts.attach_image()

    with_parts(story)


def test_a_number_that_was_unbound_and_bound_anew_is_another_device(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        parts.scripted.let_go(device.number)
        parts.scripted.bind_by_others(device.number, parts.image)
        await parts.look(device)
        assert ("removed", device.path) in parts.told
        theirs = parts.registry.numbered(device.number or 0)
        assert theirs
        assert not theirs.managed
        assert theirs.path != device.path
        parts.scripted.let_go(device.number)
        await parts.look(device)
        assert parts.registry.numbered(device.number or 0) is None

    with_parts(story)


def test_what_others_change_is_told_and_nothing_is_told_of_what_stays(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        parts.told.clear()
        await parts.look(device)
        assert parts.told == []
        os.truncate(parts.image, 2 * MIB)
        parts.scripted.take_up_size(device.number)
        await parts.look(device)
        assert parts.told == [("changed", device.path)]
        assert device.status.size == 2 * MIB

    with_parts(story)


def test_an_exclusive_lock_does_not_begin_anew_when_it_is_asked_for_again(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image(lock=Lock.EXCLUSIVE)
        (held,) = parts.locks._held.values()
        await parts.operations.lock(parts.one, device, Lock.EXCLUSIVE)
        assert [*parts.locks._held.values()] == [held]
        assert held.expiry
        assert not held.expiry.cancelled()
        await parts.operations.lock(parts.one, device, Lock.SHARED)
        assert held.expiry.cancelled()

    with_parts(story)


def test_a_lock_that_is_dropped_is_dropped_whoever_has_a_copy_of_its_fd(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image(lock=Lock.EXCLUSIVE)
        assert device.loop
        assert device.loop.lock
        with OwnedFd(kernel.dup(device.loop.lock.fileno()), kernel.close):
            parts.locks.drop(device)
            with block_device.opened(kernel.open_loop(device.loop.number, os.O_RDONLY)) as other:
                assert block_device.try_lock(other.fileno(), Lock.EXCLUSIVE.operation)
        assert device.lock is Lock.NONE
        # What comes after an unlock works as before.
        await parts.operations.sync(parts.one, device)
        await parts.operations.lock(parts.one, device, Lock.SHARED)
        assert device.lock is Lock.SHARED

    with_parts(story)


def test_a_lock_that_is_lost_while_it_is_changed_is_no_longer_told(with_parts: WithParts) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image(lock=Lock.SHARED)

        def lose(*_: Any, **__: Any) -> None:
            raise change.LockLost("gone")

        with mock.patch.object(change, "change_lock", lose), pytest.raises(DeviceBusy):
            await parts.operations.lock(parts.one, device, Lock.EXCLUSIVE)
        assert device.lock is Lock.NONE
        assert parts.locks.holder(device) is None

    with_parts(story)


def test_a_device_that_has_gone_unnoticed_is_in_nobodys_way(with_parts: WithParts) -> None:
    """By then a new file may have the inode of the one that it had."""

    async def story(parts: Parts) -> None:
        with block_device.opened(kernel.open_loop_control()) as control:
            number = kernel.loop_ctl_add(control.fileno(), -1)
        parts.scripted.bind_by_others(number, parts.image)
        await parts.registry._look(number)
        with pytest.raises(Overlap):
            await parts.attach_image()
        parts.scripted.let_go(number)
        device = await parts.attach_image()
        parts.ending.let_go(device)
        await device.gone.wait()

    with_parts(story)


def test_a_device_that_grows_and_one_that_is_attached_do_not_meet(with_parts: WithParts) -> None:
    """Each looks at what the other is about to map."""

    async def story(parts: Parts) -> None:
        device = await parts.attach_image(size_limit=4096)
        held, go_on = threading.Event(), threading.Event()
        real = kernel.loop_set_status64

        def slowly(loop_fd: int, info: Any) -> None:
            held.set()
            go_on.wait(20)
            real(loop_fd, info)

        with mock.patch.object(kernel, "loop_set_status64", slowly):
            growing = asyncio.ensure_future(
                parts.operations.resize(parts.one, device, ResizeOptions(size_limit=0))
            )
            await asyncio.to_thread(held.wait, 20)
            try:
                with pytest.raises(Overlap):
                    await parts.attach_image(offset=MIB // 2)
            finally:
                go_on.set()
            assert await growing == MIB
        await parts.operations.resize(parts.one, device, ResizeOptions(size_limit=4096))
        # What was claimed is free again.
        assert parts.claims._claimed == set()

    with_parts(story, devices=2)


def test_a_name_that_was_set_later_is_the_one_that_is_told(with_parts: WithParts) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        names = [b"%d" % number for number in range(20)]
        await asyncio.gather(
            *(parts.operations.set_reference(parts.one, device, name) for name in names)
        )
        assert device.number is not None
        told = query.binding(device.number, device.status.binding).reference
        assert device.reference == told

    with_parts(story)


def test_an_event_of_what_was_seen_is_no_reason_to_look(with_parts: WithParts) -> None:
    async def story(parts: Parts) -> None:
        heard: list[tuple[int, int]] = []
        parts.scripted.uevent = lambda number, seqnum: heard.append((number, seqnum))
        device = await parts.attach_image()
        number, seqnum = heard[-1]
        looked: list[int] = []

        def sight(number: int, _is: Any = registry._sight) -> Any:
            looked.append(number)
            return _is(number)

        with (
            mock.patch.object(registry, "_sight", sight),
            mock.patch.object(registry, "_LOOK_AGAIN", 0.01),
        ):
            for event in heard:
                parts.registry.heard(*event)
            await parts.registry._tasks.finish(10)
            assert looked == []
            os.truncate(parts.image, 2 * MIB)
            parts.scripted.take_up_size(number)
            parts.registry.heard(number, seqnum + 1)
            await parts.registry._tasks.finish(10)
            assert looked == [number]
            assert device.status.size == 2 * MIB
            parts.registry.heard(None, 0)  # those that were lost may have been of anything
            await parts.registry._tasks.finish(10)
            assert looked == [number, number]

    with_parts(story)


def test_however_often_events_are_lost_all_devices_are_looked_at_once_more(
    with_parts: WithParts,
) -> None:
    """Within the limits: who has a device open can make events faster than they are read."""

    async def story(parts: Parts) -> None:
        listed: list[list[int]] = []
        numbers = parts.registry._numbers

        def note() -> list[int]:
            listed.append(numbers())
            return listed[-1]

        with (
            mock.patch.object(parts.registry, "_numbers", note),
            mock.patch.object(registry, "_LOOK_AGAIN", 0.01),
        ):
            for _ in range(50):
                parts.registry.heard(None, 0)
            while not listed:  # noqa: ASYNC110  by a thread
                await asyncio.sleep(0)
            # What is lost from now on may be of devices that were looked at already.
            for _ in range(50):
                parts.registry.heard(None, 0)
            await parts.registry._tasks.finish(10)
        assert len(listed) == 2

    with_parts(story)


def test_an_event_that_came_while_a_device_was_attached_is_not_forgotten(
    with_parts: WithParts,
) -> None:
    """Between its status and its record, its size may change."""

    async def story(parts: Parts) -> None:
        heard: list[tuple[int, int]] = []
        parts.scripted.uevent = lambda number, seqnum: heard.append((number, seqnum))
        loop = asyncio.get_running_loop()
        status = query.status_by_fd

        def late(fd: int, number: int, *how: int) -> query.Status:
            told = status(fd, number, *how)
            os.truncate(parts.image, 2 * MIB)
            parts.scripted.take_up_size(number)
            event = number, heard[-1][1] + 1
            loop.call_soon_threadsafe(parts.registry.heard, *event)
            return told

        with mock.patch.object(query, "status_by_fd", late):
            device = await parts.attach_image()
        await parts.registry._tasks.finish(10)
        assert device.status.size == 2 * MIB

    with_parts(story)


def test_an_older_look_changes_nothing(with_parts: WithParts) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        older = device.status
        newer = dataclasses.replace(older, size=2 * MIB, seqnum=older.seqnum + 1)
        parts.registry._update(device, newer)
        parts.registry._update(device, older)
        assert device.status is newer

    with_parts(story)


def test_of_two_looks_without_an_event_the_one_that_began_later_counts(
    with_parts: WithParts,
) -> None:
    """The kernel does not tell of direct I/O."""

    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        number = device.number or 0
        older = query.status(number)
        newer = dataclasses.replace(query.status(number), direct_io=not older.direct_io)
        assert older.seqnum == newer.seqnum
        parts.registry._update(device, newer)
        parts.registry._update(device, older)
        assert device.status is newer

    with_parts(story)


def test_a_device_that_is_asked_about_over_and_over_is_looked_at_a_few_times(
    with_parts: WithParts,
) -> None:
    """Within the limits: whoever asks costs loopd and others the time of a look."""

    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        looks = 0

        def look(number: int, known: Any, _is: Any = query.is_as_it_was) -> Any:
            nonlocal looks
            looks += 1
            return _is(number, known)

        with mock.patch.object(query, "is_as_it_was", look):
            began = time.monotonic()
            for _ in range(200):
                await parts.registry.look_for_asker([device])
            seconds = time.monotonic() - began
        assert 8 <= looks <= 8 + seconds + 1
        # It goes unnoticed until somebody may look again, or the kernel tells of it.
        parts.scripted.let_go(device.number)
        while parts.registry.knows(device):
            await parts.registry.look_for_asker([device])

    with_parts(story)


def test_where_there_is_no_thread_those_who_ask_are_told_what_is_known(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        go_on = threading.Event()
        look = mock.Mock(side_effect=lambda *_: go_on.wait(20))
        with (
            mock.patch.object(query, "is_as_it_was", look),
            mock.patch.object(registry, "_PATIENCE", 0.01),
        ):
            await parts.registry.look_for_asker([device])
            assert parts.registry.knows(device)
            go_on.set()
            await parts.registry._tasks.finish(10)

    with_parts(story)


def test_others_whose_sector_sizes_hang_keep_one_thread_and_nobody_waits_twice(
    with_parts: WithParts,
) -> None:
    """Hanging files: below queue/ a change that waits for a file has those who read wait."""

    async def story(parts: Parts) -> None:
        with block_device.opened(kernel.open_loop_control()) as control:
            number = kernel.loop_ctl_add(control.fileno(), -1)
        parts.scripted.bind_by_others(number, parts.image)
        await parts.registry._look(number)
        device = parts.registry.numbered(number)
        assert device
        begun, go_on, asked = threading.Event(), threading.Event(), 0

        def hang(number: int, attribute: str, _is: Any = kernel.loop_attribute) -> Any:
            nonlocal asked
            if attribute == "queue/logical_block_size":
                asked += 1
                begun.set()
                go_on.wait(20)
            return _is(number, attribute)

        with (
            mock.patch.object(kernel, "loop_attribute", hang),
            mock.patch.object(registry, "_PATIENCE", 0.01),
        ):
            for _ in range(8):
                await parts.registry.look_for_asker([device])
            assert await asyncio.to_thread(begun.wait, 20)
            assert asked == 1
            go_on.set()
            await parts.registry._tasks.finish(10)
        parts.scripted.let_go(number)
        await parts.registry._look(number)

    with_parts(story)


def test_a_device_that_is_left_alone_is_looked_at_afterwards_and_its_successor_at_once(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        device = await parts.attach_image()
        assert device.number is not None
        with parts.registry.unwatched([device]):
            os.truncate(parts.image, 2 * MIB)
            parts.scripted.take_up_size(device.number)
            await parts.look(device)
            assert device.status.size == MIB
        await parts.registry._tasks.finish(10)
        assert device.status.size == 2 * MIB
        with parts.registry.unwatched([device]):
            parts.scripted.let_go(device.number)
            parts.registry.forget(device)
            parts.scripted.bind_by_others(device.number, parts.image)
            await parts.look(device)
            assert parts.registry.numbered(device.number)
        parts.scripted.let_go(device.number)
        await parts.look(device)

    with_parts(story)


# The end of devices


@contextmanager
def detaching(meanwhile: Callable[[LoopDevice], object]) -> Iterator[None]:
    """Have something done in the thread that is about to detach a device."""

    def detach(loop: LoopDevice, _is: Any = loop_device.detach) -> Any:
        meanwhile(loop)
        return _is(loop)

    with mock.patch.object(loop_device, "detach", detach):
        yield


def test_the_devices_of_a_client_end_together_and_one_that_hangs_by_itself(
    with_parts: WithParts,
) -> None:
    """Hanging files."""
    go_on = threading.Event()
    threads: dict[int, str] = {}

    async def story(parts: Parts) -> None:
        first, hanging, *others = [
            await parts.attach_image(allow_overlap=True) for _ in range(module._AT_A_TIME * 3)
        ]
        hanging.may_hang = True

        def hang(loop: LoopDevice) -> None:
            threads[loop.number] = threading.current_thread().name
            if loop.number == hanging.number:
                go_on.wait(20)

        with detaching(hang):
            parts.leave(parts.one)
            for device in (first, *others):
                await asyncio.wait_for(device.gone.wait(), 10)
            assert not hanging.gone.is_set()
            go_on.set()
            await asyncio.wait_for(hanging.gone.wait(), 10)
        alone = threads.pop(hanging.number or 0)
        assert alone not in threads.values()
        assert len({*threads.values()}) <= module._AT_A_TIME

    with_parts(story, devices=6)


def test_one_that_takes_long_to_write_back_does_not_keep_the_others_from_being_noted(
    with_parts: WithParts,
) -> None:
    go_on = threading.Event()

    async def story(parts: Parts) -> None:
        first, slow, *others = [
            await parts.attach_image(allow_overlap=True) for _ in range(module._AT_A_TIME * 3)
        ]
        parts.changes.clear()
        with detaching(lambda loop: loop.number == slow.number and go_on.wait(20)):
            parts.leave(parts.one)
            for device in (first, *others):
                await asyncio.wait_for(device.gone.wait(), 10)
            assert (slow.state, slow.gone.is_set()) == (DETACHING, False)
            await asyncio.wait_for(parts.changes.wait(), 10)  # and it is told
            assert parts.recorded(slow).detaching
            go_on.set()
            await asyncio.wait_for(slow.gone.wait(), 10)
        assert parts.registry._unwatched == {}

    with_parts(story, devices=6)


def test_a_bug_costs_one_device_of_many_another_attempt(
    with_parts: WithParts, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(parts: Parts) -> None:
        devices = [await parts.attach_image(allow_overlap=True) for _ in range(4)]

        def fail(loop: LoopDevice) -> None:
            if loop.number == devices[1].number:
                raise ValueError("a bug")

        with detaching(fail):
            parts.leave(parts.one)
            for device in devices:
                await asyncio.wait_for(device.gone.wait(), 10)
        assert [each.message for each in caplog.records if each.exc_info] == [
            f"cannot detach {devices[1].node}"
        ]

    with_parts(story, devices=4)


def test_a_detach_is_on_disk_before_it_begins_and_a_leaving_is_known_without(
    with_parts: WithParts,
) -> None:
    """The next loopd asks whether the holder is there, but nobody tells it of a Detach again."""

    async def story(parts: Parts) -> None:
        one, other = [await parts.attach_image(allow_overlap=True) for _ in range(2)]
        recorded: dict[int, bool] = {}

        def look(loop: LoopDevice) -> None:
            device = one if loop.number == one.number else other
            recorded[loop.number] = parts.recorded(device).detaching

        with detaching(look):
            parts.ending.let_go(one)
            parts.leave(parts.one)
            for device in (one, other):
                await asyncio.wait_for(device.gone.wait(), 10)
        assert recorded == {one.number: True, other.number: False}

    with_parts(story, devices=2)


def test_that_a_device_is_being_detached_is_told_only_if_it_takes_a_while(
    with_parts: WithParts,
) -> None:
    async def story(parts: Parts) -> None:
        quick = await parts.attach_image()
        parts.changes.clear()
        parts.ending.let_go(quick)
        await asyncio.wait_for(quick.gone.wait(), 10)
        assert not parts.changes.is_set()
        held = await parts.attach_image()
        parts.changes.clear()
        with block_device.opened(kernel.open_loop(held.number or 0, os.O_RDONLY)):
            parts.ending.let_go(held)
            await asyncio.wait_for(parts.changes.wait(), 10)
            assert (held.state, held.gone.is_set()) == (DETACHING, False)
        parts.registry.look_at(held.number)  # as when the kernel tells of the last close
        await asyncio.wait_for(held.gone.wait(), 10)

    with_parts(story)
