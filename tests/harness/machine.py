# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hypothesis state machine: random operations on loop devices, ours and others', on any kernel.

It keeps its own account of what should be, in a few lines a device, and compares after each step.
Whatever happens, errors in the midst of an attach included, in the end nothing is bound, claimed or
open that was not before.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from loopd.errors import DeviceBusy, InvalidArgs, LoopError
from loopd.fd import OwnedFd
from loopd.loop import block_device, change, kernel, loop_device, query
from loopd.loop.block_device import Lock
from loopd.loop.kernel import PartitionExtent
from loopd.loop.loop_device import LoopDevice
from tests.harness.area import area
from tests.harness.images import MIB, make_gpt
from tests.harness.lab import Lab, lab
from tests.harness.scripted import Traits

TABLES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((2048, 2048), (4096, 2048)),
    ((2048, 1024),),
    ((2048, 2048), (4096, 1024), (6144, 512)),
)
"""First sector and count of the partitions of an image, of 4 MiB."""
FAULTS = ("loop_configure", "blksszget", "blkgetsize64", "loop_attribute", "blkgetdiskseq", "flock")
FAULTS += ("loop_set_status64", "loop_binding", "loop_partitions", "blkpg_add_partition")
FAULTS += ("open_loop", "loop_ctl_get_free", "preadv", "statx", "partition_node_exists")


@dataclass(eq=False)
class Image:
    """A file, and what its table says."""

    path: Path
    table: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def partitions(self) -> list[PartitionExtent]:
        return [
            PartitionExtent(index + 1, start * 512, count * 512)
            for index, (start, count) in enumerate(self.table)
        ]


@dataclass(eq=False)
class Expected:
    """A device of ours, and how it should be."""

    device: LoopDevice
    image: Image
    offset: int
    limit: int
    size: int
    sector_size: int
    read_only: bool
    partitions: list[PartitionExtent]
    scanned: bool
    lock: Lock
    reference: bytes = b""
    openers: list["Opener"] = field(default_factory=list)

    def in_use(self, partition: int | None = None) -> bool:
        """Whether it is exclusively open, or just a partition is."""
        return any(
            each.exclusive and (partition is None or each.partition in (None, partition))
            for each in self.openers
        )


@dataclass(eq=False)
class Opener:
    """Somebody else's fd on a device."""

    fd: OwnedFd
    expected: Expected
    exclusive: bool
    partition: int | None


class LoopMachine(RuleBasedStateMachine):
    """One run; `make_lab` says on which kernel."""

    make_lab: Callable[[Path], Any]

    images: Bundle[Image] = Bundle("images")
    devices: Bundle[Expected] = Bundle("devices")
    openers: Bundle[Opener] = Bundle("openers")
    strangers: Bundle[int] = Bundle("strangers")

    def __init__(self) -> None:
        super().__init__()
        self._exit = ExitStack()
        directory = self._exit.enter_context(area("machine"))
        self.lab: Lab = self._exit.enter_context(type(self).make_lab(directory))
        self.attached: list[Expected] = []
        self.going: list[Expected] = []

    def teardown(self) -> None:
        for expected in [*self.attached, *self.going]:
            for opener in expected.openers:
                opener.fd.close()
        self._exit.close()

    # --- files

    @rule(target=images, size=st.sampled_from([MIB, MIB + 512, 3 * MIB + 100]))
    def plain(self, size: int) -> Image:
        return Image(self.lab.sparse(size))

    @rule(target=images, table=st.sampled_from(TABLES))
    def partitioned(self, table: tuple[tuple[int, int], ...]) -> Image:
        return Image(self.lab.gpt(table), table)

    @rule(image=images)
    def grow(self, image: Image) -> None:
        os.truncate(image.path, image.size + MIB)

    # --- ours

    @rule(
        target=devices,
        image=images,
        read_only=st.booleans(),
        offset=st.sampled_from([0, 0, 512, MIB]),
        limit=st.sampled_from([0, 0, 4096, MIB, 1536]),
        sector_size=st.sampled_from([512, 512, 4096, None]),
        scan=st.booleans(),
        lock=st.sampled_from(Lock),
        direct_io=st.booleans(),
    )
    def attach(
        self,
        image: Image,
        read_only: bool,
        offset: int,
        limit: int,
        sector_size: int | None,
        scan: bool,
        lock: Lock,
        direct_io: bool,
    ) -> Any:
        unit = sector_size or 512
        room = image.size - offset
        fits = room >= unit and limit <= room and limit % unit == 0
        scan = scan and offset == 0 and limit == 0 and unit == 512
        request = {
            "read_only": read_only,
            "offset": offset,
            "size_limit": limit,
            "sector_size": sector_size,
            "partition_scan": scan,
            "lock": lock,
            "direct_io": direct_io,
        }
        try:
            device = self.lab.attach(image.path, **request)
        except InvalidArgs:
            assert not fits
            return multiple()
        assert fits
        expected = Expected(
            device=device,
            image=image,
            offset=offset,
            limit=limit,
            size=min(limit or room, room) // unit * unit,
            sector_size=unit,
            read_only=read_only,
            partitions=image.partitions() if scan else [],
            scanned=scan,
            lock=lock,
        )
        self.attached.append(expected)
        return expected

    @rule(
        image=images,
        fault=st.sampled_from(FAULTS),
        skip=st.integers(0, 6),
        code=st.sampled_from([errno.EIO, errno.EBUSY, errno.ENXIO, errno.EAGAIN, errno.ENOMEM]),
        scan=st.booleans(),
    )
    def attach_with_a_fault(
        self, image: Image, fault: str, skip: int, code: int, scan: bool
    ) -> None:
        before = self.lab.bound()
        self.lab.script.fail(fault, code, skip=skip)
        try:
            device = self.lab.attach(image.path, partition_scan=scan, lock=Lock.SHARED)
        except (OSError, LoopError):
            self.lab.script.clear()
        else:
            self.lab.script.clear()
            self.lab.end(device)
        self.lab.driver.configures = True
        self.lab.require_bound(before)

    @rule(expected=consumes(devices))
    def detach(self, expected: Expected) -> None:
        self.attached.remove(expected)
        if loop_device.detach(expected.device):
            assert not expected.openers
            self.lab.wait_unbound(expected.device)
            self.lab.forget(expected.device)
        else:
            self.going.append(expected)

    @rule()
    def clear_again(self) -> None:
        for expected in [each for each in self.going if not each.openers]:
            self.lab.end(expected.device)
            self.going.remove(expected)
        for expected in self.going:
            assert loop_device.clear(expected.device) is False

    @rule(
        expected=devices,
        offset=st.sampled_from([None, 0, 512, MIB]),
        limit=st.sampled_from([None, 0, 4096, MIB]),
        force=st.booleans(),
    )
    def resize(
        self, expected: Expected, offset: int | None, limit: int | None, force: bool
    ) -> None:
        if expected not in self.attached:
            return
        new_offset = expected.offset if offset is None else offset
        new_limit = expected.limit if limit is None else limit
        room = expected.image.size - new_offset
        size = min(new_limit or room, room) // expected.sector_size * expected.sector_size
        fits = room >= expected.sector_size and not (limit and limit > room)
        fits = fits and new_limit % expected.sector_size == 0
        moves = new_offset != expected.offset
        opened = {each.partition for each in expected.openers} - {None}
        try:
            told = change.resize(expected.device, offset=offset, size_limit=limit, force=force)
        except InvalidArgs:
            assert not fits
        except DeviceBusy:
            assert (expected.in_use() and (moves or size < expected.size)) or (moves and opened)
            assert not force
            assert kernel.loop_partitions(expected.device.number) == expected.partitions
        else:
            assert fits
            assert told == size
            expected.offset, expected.limit, expected.size = new_offset, new_limit, size
            if moves:
                expected.partitions = kernel.loop_partitions(expected.device.number)
            else:
                expected.partitions = [
                    each._replace(size=min(each.size, max(size - each.start, 0)) or each.size)
                    for each in expected.partitions
                    if each.start < size or each.number in opened
                ]

    @rule(expected=devices, reference=st.sampled_from([b"", b"name", b"x" * 63]))
    def set_reference(self, expected: Expected, reference: bytes) -> None:
        if expected in self.attached:
            change.set_reference(expected.device, reference)
            expected.reference = reference

    @rule(expected=devices, size=st.sampled_from([512, 1024, 4096]))
    def set_sector_size(self, expected: Expected, size: int) -> None:
        # Partitions would be looked for anew, for sectors of another size.
        if expected not in self.attached or expected.partitions:
            return
        looks = expected.device.cut.limit or expected.size % size
        try:
            change.set_sector_size(expected.device, size)
        except InvalidArgs:
            assert expected.limit % size or expected.size < size
        except DeviceBusy:
            assert expected.in_use()
        else:
            if looks and size != expected.sector_size:
                room = expected.image.size - expected.offset
                expected.size = min(expected.limit or room, room) // size * size
            expected.sector_size = size

    @rule(expected=devices, enable=st.booleans())
    def set_direct_io(self, expected: Expected, enable: bool) -> None:
        if expected in self.attached:
            told = change.set_direct_io(expected.device, enable)
            assert told == query.status(expected.device.number).direct_io

    @rule(expected=devices, kind=st.sampled_from(Lock))
    def lock(self, expected: Expected, kind: Lock) -> None:
        device = expected.device
        if expected not in self.attached:
            return
        if kind is Lock.NONE:
            if device.lock:
                device.lock.close()
                device.lock = None
        elif device.lock:
            change.change_lock(device, device.lock, kind, held=expected.lock)
        else:
            device.lock = change.take_lock(device, kind)
        expected.lock = kind

    # --- partitions

    @rule(expected=devices, table=st.sampled_from(TABLES))
    def rewrite_table(self, expected: Expected, table: tuple[tuple[int, int], ...]) -> None:
        if expected.image.size == 4 * MIB:
            make_gpt(expected.image.path, table)
            expected.image.table = table

    @rule(expected=devices)
    def rescan(self, expected: Expected) -> None:
        whole = (expected.offset, expected.limit, expected.sector_size) == (0, 0, 512)
        if expected not in self.attached or not whole or expected.size != expected.image.size:
            return
        wanted = expected.image.partitions()
        busy = {each.partition for each in expected.openers} - {None}
        grown = {(each.number, each.start): each.size for each in wanted}
        changing = {
            each.number
            for each in expected.partitions
            if grown.get((each.number, each.start), 0) < each.size
        }
        try:
            found = change.rescan_partitions(expected.device)
        except DeviceBusy:
            assert busy & changing
            expected.partitions = kernel.loop_partitions(expected.device.number)
        else:
            assert found == wanted
            expected.partitions = wanted
        expected.scanned = True

    @rule(expected=devices, size=st.sampled_from([0, 4096, MIB]), index=st.integers(0, 2))
    def resize_partition(self, expected: Expected, size: int, index: int) -> None:
        if expected not in self.attached or index >= len(expected.partitions):
            return
        now = expected.partitions[index]
        try:
            told = change.resize_partition(expected.device, now.number, size=size)
        except InvalidArgs:
            assert size
        except DeviceBusy:
            assert expected.in_use(now.number)
        except OSError:
            # A device that was made smaller has no room for the partitions that it had.
            assert expected.size < now.start + now.size
        else:
            expected.partitions[index] = now._replace(size=told)

    # --- others

    @rule(
        target=openers,
        expected=devices,
        exclusive=st.booleans(),
        partition=st.sampled_from([None, None, 1, 2]),
    )
    def open(self, expected: Expected, exclusive: bool, partition: int | None) -> Any:
        there = {each.number for each in expected.partitions}
        if expected not in self.attached or (partition and partition not in there):
            return multiple()
        flags = os.O_RDONLY | (os.O_EXCL if exclusive else 0)
        try:
            if partition is None:
                fd = kernel.open_loop(expected.device.number, flags)
            else:
                fd = kernel.open_partition(expected.device.number, partition, flags)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
            assert exclusive
            assert expected.in_use(partition)
            return multiple()
        opener = Opener(OwnedFd(fd, kernel.close), expected, exclusive, partition)
        expected.openers.append(opener)
        expected.device.handed_out = True
        return opener

    @rule(opener=consumes(openers))
    def close(self, opener: Opener) -> None:
        opener.fd.close()
        opener.expected.openers.remove(opener)

    @rule(expected=devices)
    def clear_by_others(self, expected: Expected) -> None:
        """What `losetup -d` does to a device of ours is of no effect while we have it open."""
        if expected in self.attached:
            self.lab.clear(expected.device.number)

    @rule(target=strangers, image=images)
    def attach_by_others(self, image: Image) -> int:
        return self.lab.foreign(image.path)

    @rule(number=consumes(strangers))
    def detach_by_others(self, number: int) -> None:
        binding = kernel.loop_binding(number)
        self.lab.clear(number)
        self.lab.wait_cleared(number, binding)

    # --- what has to be so at any time

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        for expected in self.attached:
            told = query.status(expected.device.number)
            assert told.binding == expected.device.binding
            limit = expected.device.asked_limit(told.size_limit)
            assert (told.offset, limit, told.size) == (
                expected.offset,
                expected.limit,
                expected.size,
            )
            assert change.sector_size(expected.device) == expected.sector_size
            assert told.read_only == expected.read_only
            assert told.autoclear
            assert told.partition_scan == expected.scanned
            assert list(told.partitions) == expected.partitions
            self._compare_lock(expected)
        for expected in self.going:
            assert kernel.loop_binding(expected.device.number) == expected.device.binding

    def _compare_lock(self, expected: Expected) -> None:
        with OwnedFd(kernel.open_loop(expected.device.number, os.O_RDONLY), kernel.close) as fd:
            shared = block_device.try_lock(fd.fileno(), fcntl.LOCK_SH)
            assert shared == (expected.lock is not Lock.EXCLUSIVE)
            with suppress(BlockingIOError):
                kernel.flock(fd.fileno(), fcntl.LOCK_UN)


def run(*, real: bool, examples: int, steps: int = 40, traits: Traits | None = None) -> int:
    """Run the machine so many times, with so many steps at most; returns the steps it took."""
    taken = 0

    class Machine(LoopMachine):
        make_lab = staticmethod(lambda directory: lab(directory, traits, real=real))

        @invariant()
        def step_is_counted(self) -> None:
            nonlocal taken
            taken += 1

    run_state_machine_as_test(
        Machine,
        settings=settings(
            settings.default, max_examples=examples, stateful_step_count=steps, database=None
        ),
    )
    return taken
