# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that are kept for the next attach: which, how many, and not for long."""

import asyncio
import errno
import fcntl
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loopd.daemon.access import NOBODY, ROOT
from loopd.daemon.config import Config, Limits
from loopd.daemon.devices import spare_numbers as module
from loopd.daemon.devices.spare_numbers import Spares
from loopd.daemon.threads import Threads
from loopd.loop import kernel
from tests.harness.asynchronous import run_async
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_plain
from tests.harness.inside import Inside, run_inside, scripted_kernel
from tests.harness.script import Script
from tests.harness.scripted import ScriptedKernel, Traits

UID = 1000


@pytest.fixture(autouse=True)
def none_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr(kernel, "loop_bound", lambda _: False)
    monkeypatch.setattr(kernel, "loop_numbers", list)


class Removals(Threads):
    """Notes what is to be removed, and removes nothing."""

    def __init__(self, awaited: int) -> None:
        """`over` is set when as many are noted as are awaited."""
        super().__init__()
        self.numbers: list[int] = []
        self.over = asyncio.Event()
        self._awaited = awaited

    def remove(
        self, _function: Callable[[int], bool], number: int, done: Callable[[bool], None]
    ) -> None:
        """Note it."""
        self.numbers.append(number)
        self.done = done
        if len(self.numbers) >= self._awaited:
            self.over.set()


def removed(story: Callable[[Spares], None], *, later: int = 0) -> list[int]:
    """Return what is removed in a story, at once and so many `later`."""

    async def run() -> list[int]:
        removals = Removals(later)
        story(Spares(removals))
        if later:
            assert not removals.numbers
            await asyncio.wait_for(removals.over.wait(), module._KEPT_FOR + 5)
        return removals.numbers

    return asyncio.run(run())


def keep(*numbers: int) -> Callable[[Spares], None]:
    def story(spares: Spares) -> None:
        for number in numbers:
            spares.take(number, UID, is_new=True)
            spares.keep(number)

    return story


def test_a_few_are_kept_and_those_are_the_lowest() -> None:
    """What LOOP_CTL_GET_FREE names is not taken away between its answer and the open."""
    assert removed(keep(0, 1, 2, 3)) == []
    assert removed(keep(0, 1, 2, 3, 4, 5)) == [4, 5]
    assert removed(keep(9, 8, 7, 6, 5, 4)) == [9, 8]
    assert removed(keep(3, 3, 3, 3, 3, 3)) == []


def test_they_go_when_no_other_of_the_user_has_come_for_a_while() -> None:
    assert removed(keep(3, 5, 4), later=3) == [5, 4, 3]


def test_one_that_is_in_use_again_is_not_removed() -> None:
    def story(spares: Spares) -> None:
        keep(3, 4)(spares)
        spares.take(3, UID)
        spares.remove_all()
        spares.remove_all()

    assert removed(story) == [4]


def test_all_go_when_loopd_does() -> None:
    assert removed(lambda spares: (keep(2, 1)(spares), spares.remove_all())[1]) == [2, 1]


def choose(spares: Spares, uid: int) -> int | None:
    return spares.numbers(uid).choose(-1)


def suits(spares: Spares, uid: int, *numbers: int) -> list[bool]:
    return [spares.numbers(uid).suits(number) for number in numbers]


def first_new(spares: Spares, uid: int, count: int = 1) -> list[int]:
    """Return the numbers that are tried first for a new device."""
    return [*itertools.islice(spares.numbers(uid).new(), count)]


def test_none_is_given_to_another_user() -> None:
    """Numbers of devices: who mounts one by its name would mount the other's file."""

    def story(spares: Spares) -> None:
        keep(1, 2, 3, 4, 5)(spares)
        spares.take(6, UID)  # it can be unbound before anybody hears of it
        assert suits(spares, UID, 1, 5, 6, 7) == [True, True, True, True]
        assert suits(spares, UID + 1, 1, 5, 6, 7) == [False, False, False, True]
        assert (choose(spares, UID), choose(spares, UID + 1)) == (1, None)
        spares.take(3, UID + 1)
        spares.keep(3)
        assert choose(spares, UID + 1) == 3  # its own
        spares.take(1, UID + 1)
        assert choose(spares, UID) == 2
        spares.take(2, NOBODY)  # losetup came and went
        assert suits(spares, UID + 1, 2) == [False]
        assert suits(spares, UID, 2) == [True]

    assert removed(story) == [5]


def test_one_that_others_have_bound_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def story(spares: Spares) -> None:
        keep(1, 2)(spares)
        monkeypatch.setattr(kernel, "loop_bound", lambda number: number == 1)
        assert choose(spares, UID) == 2

    assert removed(story) == []


def test_what_was_there_before_is_neither_kept_nor_removed() -> None:
    """Devices of the module: others name them."""

    def story(spares: Spares) -> None:
        for number in range(8):
            spares.take(number, UID)
            spares.keep(number)
        assert choose(spares, UID) is None
        spares.left_by_others(3)
        spares.remove_all()

    assert removed(story) == []


def test_what_was_made_in_vain_is_removed_until_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_AGAIN_AFTER", 0)

    async def run() -> None:
        removals = Removals(1)  # and each one after it
        spares = Spares(removals)
        await asyncio.to_thread(spares.numbers(UID).stays, 9)
        for count in (1, 2, 3):
            await removals.over.wait()
            removals.over.clear()
            removals.done(count == 3)
        assert removals.numbers == [9, 9, 9]
        assert (spares._made, spares._going) == (set(), frozenset())

    asyncio.run(asyncio.wait_for(run(), 20))


def test_no_more_are_made_while_many_cannot_be_removed() -> None:
    """Devices made in vain."""

    async def run() -> None:
        removals = Removals(0)
        spares = Spares(removals)
        for number in range(module._GOING):
            assert first_new(spares, UID) == [-1]
            spares._remove(number)
        assert first_new(spares, UID) == []
        removals.done(True)
        assert first_new(spares, UID) == [-1]

    asyncio.run(run())


def test_what_others_have_used_since_is_removed_when_they_are_done() -> None:
    def story(spares: Spares) -> None:
        keep(4)(spares)
        spares.take(4, NOBODY)
        spares.remove_all()
        spares.left_by_others(4)

    assert removed(story) == [4]


def test_a_new_device_gets_no_number_of_another_user() -> None:
    """Numbers of devices."""

    def story(spares: Spares) -> None:
        assert first_new(spares, UID) == [-1]
        spares.take(0, UID, is_new=True)
        assert first_new(spares, UID + 1) == [-1]  # it is there, so it is not made
        spares.keep(0)
        keep(2, 3, 4, 5)(spares)
        assert first_new(spares, UID + 1, 3) == [1, 6, 7]
        assert first_new(spares, UID, 3) == [-1, 0, 1]
        spares.take(6, UID + 1)
        assert first_new(spares, UID + 1, 2) == [1, 7]

    assert removed(story) == [5]


def test_the_kernel_is_asked_for_no_number_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine can have a thousand devices, and each of these calls would fail."""

    def story(spares: Spares) -> None:
        keep(2)(spares)
        monkeypatch.setattr(kernel, "loop_numbers", lambda: [*range(1000), 1002])
        assert first_new(spares, UID + 1, 3) == [1000, 1001, 1003]

    assert removed(story) == []


def test_whose_they_were_is_remembered_beyond_their_removal() -> None:
    """Numbers of devices."""

    async def run() -> None:
        removals = Removals(2)
        spares = Spares(removals)
        keep(1, 2, 3)(spares)
        spares.take(3, UID)
        await asyncio.wait_for(removals.over.wait(), module._KEPT_FOR + 5)
        assert removals.numbers == [2, 1]
        assert suits(spares, UID + 1, 1, 2, 3) == [False, False, False]
        assert first_new(spares, UID + 1, 2) == [0, 4]

    asyncio.run(run())


def test_whose_they_were_is_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_FOR", 0.01)
    monkeypatch.setattr(module, "_REMEMBERED_FOR", 0.02)

    async def run() -> None:
        spares = Spares(Removals(0))
        keep(1, 2, 3)(spares)
        spares.take(3, UID)
        spares.take(2, NOBODY)
        deadline = Deadline()
        while spares._timers:
            assert deadline.remaining
            await asyncio.sleep(0)
        assert suits(spares, UID + 1, 1, 2, 3) == [True, True, False]
        assert spares._owners == {3: UID}

    asyncio.run(run())


@pytest.mark.parametrize("count", [1, 3, 6, 12, 64])
def test_no_number_goes_to_another_user_by_whatever_way(tmp_path: Path, count: int) -> None:
    """Numbers of devices, with root's among them."""
    image = make_plain(tmp_path / "image", MIB)
    config = Config(limits=Limits(devices_per_user=64))

    async def main(scripted: ScriptedKernel) -> None:
        inside = Inside(tmp_path, scripted, config=config)
        left: dict[int, int] = {}
        """The number of each device that somebody had, by the last one to have it."""
        for uid in (UID, UID + 1, ROOT, UID, ROOT):
            caller = inside.caller(uid)
            devices = [
                await inside.attach(caller, image, read_only=True, offset=index * 512)
                for index in range(count)
            ]
            for device in devices:
                assert device.number is not None
                assert left.get(device.number, uid) == uid
                left[device.number] = uid
            for device in devices:
                await inside.manager.detach(caller, device)
            await inside.until_none(inside.remains)
        await inside.end()

    with scripted_kernel() as (scripted, _):
        run_async(main(scripted))


def test_a_number_that_cannot_be_made_is_not_taken_for_one_that_is_there(tmp_path: Path) -> None:
    image = make_plain(tmp_path / "image", MIB)

    async def story(inside: Inside, script: Script) -> None:
        caller = inside.caller(ROOT)
        device = await inside.attach(caller, image, number=5)
        assert await inside.manager.detach(caller, device)
        for code in (errno.EPERM, errno.ENOSPC):  # it is there, unbound
            script.fail("loop_ctl_add", code)
            with pytest.raises(OSError, match=re.escape(os.strerror(code))) as failure:
                await inside.attach(caller, image, number=5)
            assert failure.value.errno == code
            assert inside.scripted.bound() == []

    run_inside(tmp_path, story)


def test_openers_that_come_between_leave_few_devices(tmp_path: Path) -> None:
    """Devices made in vain: as udev does on Linux 6.1, where each attach makes a device."""
    image = make_plain(tmp_path / "image", MIB)

    async def story(inside: Inside, script: Script) -> None:
        scripted = inside.scripted
        glances: list[int] = []

        def glance() -> None:
            while glances:
                scripted.close(glances.pop())
            fd = scripted.open_loop(max(scripted.numbers()), os.O_RDONLY)
            scripted.flock(fd, fcntl.LOCK_SH)
            glances.append(fd)

        caller = inside.caller(UID)
        for _ in range(50):
            script.after("loop_ctl_add", glance)
            device = await inside.attach(caller, image)
            assert await inside.manager.detach(caller, device)
            assert len(scripted.numbers()) <= module._GOING + module._KEPT + 2
        while glances:
            scripted.close(glances.pop())
        deadline = Deadline()
        while scripted.numbers() or inside.spares._made:
            assert deadline.remaining
            await asyncio.sleep(0.01)

    run_inside(tmp_path, story, Traits(release=(6, 1), says_partscan=False))


def test_what_the_module_made_is_there_in_the_end(tmp_path: Path) -> None:
    """Devices of the module."""
    image = make_plain(tmp_path / "image", MIB)

    async def story(inside: Inside, script: Script) -> None:
        scripted = inside.scripted
        for number in range(8):
            scripted.loop_ctl_add(-1, number)
        caller = inside.caller(ROOT)
        devices = [await inside.attach(caller, image, read_only=True) for _ in range(4)]
        devices.append(await inside.attach(caller, image, read_only=True, number=3))
        for device in devices:
            assert await inside.manager.detach(caller, device)
        deadline = Deadline()
        while len(scripted.numbers()) > 8:
            assert deadline.remaining
            await asyncio.sleep(0.01)
        assert scripted.numbers() == [*range(8)]

    run_inside(tmp_path, story)
    run_inside(tmp_path, story, Traits(release=(6, 1), says_partscan=False))
