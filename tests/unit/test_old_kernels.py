# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels that the machine does not run: older ones, newer ones, and what each lacks or forgets."""

import errno
import fcntl
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from loopd.errors import DeviceBusy, InvalidArgs, NotSupported
from loopd.loop import attach, block_device, change, kernel, loop_device, query, uapi
from loopd.loop.block_device import Lock
from loopd.loop.kernel import PartitionExtent
from tests.harness.behaviours import GPT, status
from tests.harness.images import MIB
from tests.harness.lab import Lab
from tests.harness.lab import lab as make_lab
from tests.harness.scripted import FUNCTIONS, ScriptedKernel, Traits

MakeLab = Callable[..., Lab]

NO_CONFIGURE = Traits(release=(5, 4), configure=False, diskseq=False, says_partscan=False)
"""As Debian 10 and 11 had them, in part."""
LINUX_5_8 = Traits(
    release=(5, 8),
    forgets=frozenset({"size limit", "partition scan"}),
    diskseq=False,
    says_partscan=False,
)


@pytest.fixture
def on(area: Path) -> Iterator[MakeLab]:
    """Make a lab on a kernel of these traits."""
    with ExitStack() as stack:
        yield lambda traits: stack.enter_context(make_lab(area, traits))


def counted(lab: Lab, name: str) -> int:
    return lab.script.calls.count(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_scripted_kernel_has_every_function_with_its_arguments(name: str) -> None:
    """It would go unnoticed if the real one were called instead."""
    real = list(inspect.signature(getattr(kernel, name)).parameters)
    assert list(inspect.signature(getattr(ScriptedKernel, name)).parameters) == ["self", *real]


# --- LOOP_CONFIGURE -----------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "offset": 4096,
    "size_limit": 64 * 1024,
    "sector_size": 4096,
    "reference": b"name",
    "lock": Lock.SHARED,
}


def is_everything(device: loop_device.LoopDevice) -> bool:
    told = status(device)
    asked = query.binding(device.number, device.binding)
    return (
        (told.offset, told.size_limit, told.size) == (4096, 64 * 1024, 64 * 1024)
        and change.sector_size(device) == 4096
        and (told.direct_io, told.autoclear, told.read_only) == (True, True, False)
        and asked.reference == b"name"
    )


@pytest.mark.parametrize("unknown", [errno.EINVAL, errno.ENOTTY])
def test_without_loop_configure_the_older_calls_do_it(on: MakeLab, unknown: int) -> None:
    """A6, A7: which an ioctl that does not exist may be said to be in two ways."""
    lab = on(Traits(configure=False, unknown_ioctl=unknown))
    device = lab.attach(lab.image(), **EVERYTHING)
    assert is_everything(device)
    order = ["loop_set_fd", "loop_set_status64", "blkflsbuf", "loop_set_block_size"]
    order += ["loop_set_direct_io"]
    found = [name for name in lab.script.calls if name in order]
    assert found == order


def test_that_there_is_no_loop_configure_is_remembered(on: MakeLab) -> None:
    """A7."""
    lab = on(NO_CONFIGURE)
    lab.attach(lab.image())
    tried = counted(lab, "loop_configure")
    assert tried
    lab.attach(lab.image())
    assert counted(lab, "loop_configure") == tried


def test_a_clients_file_does_not_make_us_forget_loop_configure(on: MakeLab) -> None:
    """A7: EINVAL may be about what was asked for."""
    lab = on(Traits())
    lab.script.fail("loop_configure", errno.EINVAL)
    with pytest.raises(OSError, match="Invalid argument"):
        lab.attach(lab.image())
    assert lab.driver.configures
    assert lab.bound() == []


@pytest.mark.parametrize(
    ("forgotten", "request_"),
    [
        ("size limit", {"size_limit": 4096}),
        ("sector size", {"sector_size": 4096}),
        ("partition scan", {"partition_scan": True}),
        ("size limit", {"partition_scan": True}),
    ],
)
def test_what_loop_configure_forgets_is_seen_and_it_is_not_asked_again(
    on: MakeLab, forgotten: str, request_: dict[str, Any]
) -> None:
    """A5, A7: done over on another device, because clearing one may take a while."""
    lab = on(Traits(release=(5, 8), forgets=frozenset({forgotten}), says_partscan=False))
    device = lab.attach(lab.gpt(), **request_)
    told = status(device)
    assert told.size == request_.get("size_limit", 4 * MIB)
    assert change.sector_size(device) == request_.get("sector_size", 512)
    assert list(told.partitions) == (GPT if request_.get("partition_scan") else [])
    assert not lab.driver.configures
    assert counted(lab, "loop_ctl_add") == 2
    assert (counted(lab, "loop_configure"), counted(lab, "loop_set_fd")) == (1, 1)
    lab.attach(lab.image(), **request_)
    assert counted(lab, "loop_configure") == 1


def test_what_loop_configure_forgets_without_being_asked_is_no_matter(on: MakeLab) -> None:
    """A5."""
    lab = on(LINUX_5_8)
    lab.attach(lab.image(), offset=4096)
    assert lab.driver.configures
    assert counted(lab, "loop_set_fd") == 0


# --- the calls before it ------------------------------------------------------------------------


def test_a_device_whose_cache_is_in_use_is_asked_again(on: MakeLab) -> None:
    """A6: EAGAIN, 64 times at most, with pauses that grow."""
    lab = on(NO_CONFIGURE)
    lab.script.fail("loop_set_status64", errno.EAGAIN, times=63)
    lab.attach(lab.image(), offset=4096)
    assert len(lab.pauses) == 63
    assert all(0.010 <= each <= 0.250 for each in lab.pauses)
    assert max(lab.pauses[:8]) < max(lab.pauses[-8:])


def test_a_device_whose_cache_stays_in_use_is_given_up_and_cleared(on: MakeLab) -> None:
    """A6, A1."""
    lab = on(NO_CONFIGURE)
    lab.script.fail("loop_set_status64", errno.EAGAIN, times=64)
    with pytest.raises(BlockingIOError):
        lab.attach(lab.image(), offset=4096)
    assert lab.bound() == []
    assert counted(lab, "loop_clr_fd") == 1


def test_the_control_lock_is_not_kept_while_a_device_is_asked_again(on: MakeLab) -> None:
    lab = on(NO_CONFIGURE)

    def look() -> None:
        with block_device.opened(kernel.open_loop_control()) as control:
            assert block_device.try_lock(control.fileno(), Lock.EXCLUSIVE.operation)

    lab.script.before("loop_set_status64", look)
    lab.attach(lab.image())
    assert not lab.script.pending


def test_only_the_flags_that_can_be_set_are_set(on: MakeLab) -> None:
    """A6."""
    lab = on(NO_CONFIGURE)
    given: list[int] = []
    real = kernel.loop_set_status64

    def note(loop_fd: int, info: uapi.loop_info64) -> None:
        given.append(info.lo_flags)
        real(loop_fd, info)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "loop_set_status64", note)
        device = lab.attach(lab.image(), os.O_RDONLY)
    assert given == [uapi.LO_FLAGS_AUTOCLEAR]
    # These have come about in their own ways.
    assert status(device).read_only
    assert status(device).direct_io


@pytest.mark.parametrize(
    ("request_", "flushes"), [({}, 0), ({"offset": 512}, 1), ({"size_limit": 512}, 1)]
)
def test_the_cache_is_flushed_where_a_range_was_set(
    on: MakeLab, request_: dict[str, Any], flushes: int
) -> None:
    """A6: and it is no error if that fails."""
    lab = on(NO_CONFIGURE)
    lab.script.fail("blkflsbuf", errno.EACCES)
    lab.attach(lab.image(), **request_)
    assert counted(lab, "blkflsbuf") == flushes


def test_a_sector_size_that_does_not_take_is_told_and_nothing_stays_bound(on: MakeLab) -> None:
    """A6: checked, whatever the call said."""
    lab = on(NO_CONFIGURE)
    lab.script.fail("loop_set_block_size", errno.EINVAL)
    with pytest.raises(InvalidArgs, match=r"^sector-size: .* does not take 4096"):
        lab.attach(lab.image(), sector_size=4096)
    assert lab.bound() == []


def test_a_sector_size_larger_than_a_page_is_refused_before_anything_is_bound(on: MakeLab) -> None:
    lab = on(NO_CONFIGURE)
    with pytest.raises(InvalidArgs, match=r"^sector-size: "):
        lab.attach(lab.sparse(MIB), sector_size=131072)
    assert counted(lab, "loop_set_fd") == 0


def test_a_device_that_somebody_binds_first_is_theirs(on: MakeLab) -> None:
    """A8, by LOOP_SET_FD."""
    lab = on(NO_CONFIGURE)
    lab.script.fail("loop_set_fd", errno.EBUSY)
    device = lab.attach(lab.image())
    assert counted(lab, "loop_set_fd") == 2
    assert status(device).autoclear


def test_partitions_are_made_without_loop_configure_too(on: MakeLab) -> None:
    lab = on(NO_CONFIGURE)
    sizes: list[int] = []
    lab.script.after("loop_set_status64", lambda: sizes.append(query.status(lab.claims[-1]).size))
    device = lab.attach(lab.gpt(), partition_scan=True)
    assert list(status(device).partitions) == GPT
    assert sizes == [0]


# --- direct I/O ---------------------------------------------------------------------------------


@pytest.mark.parametrize("configure", [True, False])
def test_direct_io_that_does_not_take_is_done_without(on: MakeLab, configure: bool) -> None:
    """A4, A8: from scratch, because some kernels answer I/O errors on a device where it failed."""
    lab = on(Traits(configure=configure, direct_io=False))
    device = lab.attach(lab.image(), direct_io=True)
    assert not status(device).direct_io
    binding = "loop_configure" if configure else "loop_set_fd"
    assert counted(lab, "loop_clr_fd") == 1
    assert counted(lab, binding) == 2
    assert not change.set_direct_io(device, enable=True)


def test_udev_at_what_was_half_made_does_not_make_a_wanted_number_busy(on: MakeLab) -> None:
    lab = on(Traits(direct_io=False))
    looking: list[Any] = []

    def look() -> None:
        looking.append(lab.open(number))

    with block_device.opened(kernel.open_loop_control()) as control:
        number = kernel.loop_ctl_add(control.fileno(), -1)
    lab.script.after("loop_configure", look)
    lab.script.before("loop_ctl_add", lambda: looking.pop().close(), skip=3)
    device = lab.attach(lab.image(), direct_io=True, number=number)
    assert device.number == number
    assert looking == []


def test_a_file_open_for_direct_io_is_not_used_so_unless_asked_for(on: MakeLab) -> None:
    lab = on(Traits())
    device = lab.attach(lab.image(), os.O_RDWR | os.O_DIRECT, direct_io=False)
    assert not status(device).direct_io


# --- before Linux 5.15 --------------------------------------------------------------------------


def test_without_diskseqs_each_attachment_still_has_a_number_of_its_own(on: MakeLab) -> None:
    """A11."""
    lab = on(NO_CONFIGURE)
    seen = set()
    for _ in range(3):
        device = lab.attach(lab.image())
        assert status(device).diskseq == device.diskseq
        found = change.open_existing(device.number)
        assert found.diskseq == device.diskseq
        found.close()
        seen.add(device.diskseq)
        lab.detach(device)
    assert len(seen) == 3


# --- before Linux 6.11 --------------------------------------------------------------------------

UNBINDS_WHILE_OPEN = Traits(release=(6, 1), says_partscan=False)
"""As Debian 12 has it."""


def test_the_only_opener_unbinds_at_once(on: MakeLab) -> None:
    lab = on(UNBINDS_WHILE_OPEN)
    device = lab.attach(lab.image())
    assert loop_device.detach(device) is True
    assert lab.bound() == []
    lab.forget(device)


def test_a_client_is_never_the_only_opener_of_what_is_bound(on: MakeLab) -> None:
    """Stale device fd, A20: else its own CLR_FD would leave it an fd on the next user's image."""
    lab = on(UNBINDS_WHILE_OPEN)
    device = lab.attach(lab.image())
    device.handed_out = True
    with lab.open(device.number) as fd:
        for _ in range(3):
            assert loop_device.clear(device) is False
            # Whatever the client does with its fd, it is not alone.
            kernel.loop_clr_fd(fd.fileno())
            assert kernel.loop_binding(device.number) == device.binding
    assert loop_device.clear(device) is True
    assert lab.bound() == []
    lab.forget(device)


def test_a_number_that_somebody_may_have_open_is_not_used(on: MakeLab) -> None:
    """Stale device fd: a device is made anew, so that nobody can have had it before."""
    lab = on(UNBINDS_WHILE_OPEN)
    first = lab.attach(lab.image())
    number = first.number
    lab.detach(first)
    with lab.open(number):
        assert loop_device.remove(number) is False
        second = lab.attach(lab.image())
        assert second.number != number
        with pytest.raises(DeviceBusy, match=f"/dev/loop{number} did not come free"):
            lab.attach(lab.image(), number=number)
    assert lab.attach(lab.image(), number=number).number == number


def test_an_attempt_that_fails_leaves_no_number_behind(on: MakeLab) -> None:
    """Each is a new one there, and nobody else would take them away."""
    lab = on(UNBINDS_WHILE_OPEN)
    assert lab.scripted
    for _ in range(5):
        with pytest.raises(InvalidArgs):
            lab.attach(lab.sparse(MIB), sector_size=131072)
    assert lab.scripted.numbers() == []
    lab.script.fail("loop_configure", errno.EBUSY, times=3)
    device = lab.attach(lab.image())
    assert lab.scripted.numbers() == [device.number]


@pytest.mark.parametrize("holds", ["for a glance", "for ever"])
def test_whoever_opens_each_new_device_leaves_few_behind(
    on: MakeLab, holds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices made in vain: udev is faster than we are, or somebody keeps them."""
    monkeypatch.setattr(attach, "_NEW_DEVICE_LOCK_TIMEOUT", 0)
    lab = on(UNBINDS_WHILE_OPEN)
    assert lab.scripted
    theirs = ExitStack()

    def open_it() -> None:
        assert lab.scripted
        if holds == "for a glance":
            theirs.close()
        newest = max(lab.scripted.numbers(), key=lambda n: int(kernel.loop_attribute(n, "diskseq")))
        kernel.flock(theirs.enter_context(lab.open(newest)).fileno(), fcntl.LOCK_SH)

    lab.script.after("loop_ctl_add", open_it, times=1000)
    strays: list[int] = []
    with pytest.raises(DeviceBusy):
        lab.attach(lab.image(), numbers=attach.Numbers(stays=strays.append))
    assert len(lab.scripted.numbers()) <= 2
    assert strays == lab.scripted.numbers()


def test_a_glance_at_a_new_device_is_waited_for(on: MakeLab) -> None:
    """Devices made in vain: udev looks at each."""
    lab = on(UNBINDS_WHILE_OPEN)
    assert lab.scripted

    def open_it() -> None:
        theirs = lab.open(0)
        kernel.flock(theirs.fileno(), fcntl.LOCK_SH)
        lab.script.after_error("flock", theirs.close)

    lab.script.after("loop_ctl_add", open_it)
    device = lab.attach(lab.image())
    assert (device.number, device.is_new) == (0, True)
    assert counted(lab, "loop_ctl_add") == 1


def test_what_was_there_before_is_not_taken_for_new(on: MakeLab) -> None:
    """Devices of the module: others name them."""
    lab = on(UNBINDS_WHILE_OPEN)
    with block_device.opened(kernel.open_loop_control()) as control:
        kernel.loop_ctl_add(control.fileno(), 3)
    device = lab.attach(lab.image(), number=3)
    assert (device.number, device.is_new) == (3, False)
    other = lab.attach(lab.image(), number=4)
    assert (other.number, other.is_new) == (4, True)


def test_partitions_found_later_end_with_their_device(on: MakeLab) -> None:
    """Old partitions: sysfs says of each device that it is scanned, but for loop/partscan."""
    lab = on(UNBINDS_WHILE_OPEN)
    device = lab.attach(lab.gpt())
    assert status(device).partition_scan is False
    assert change.rescan_partitions(device) == GPT
    assert kernel.loop_attribute(device.number, "loop/partscan") == b"1"
    assert status(device).partition_scan is True
    device.close()  # as when loopd is killed
    assert kernel.loop_partitions(device.number) == []
    lab.forget(device)


def test_another_opener_that_goes_at_the_last_moment_loses_nobody_a_device(on: MakeLab) -> None:
    """A20: of the two calls that find out whether we are alone, the second one unbinds then."""
    lab = on(UNBINDS_WHILE_OPEN)
    assert lab.scripted
    device = lab.attach(lab.image())
    theirs = lab.open(device.number)
    lab.script.before("loop_clr_fd", theirs.close, skip=1)
    assert loop_device.detach(device) is True
    lab.forget(device)
    assert lab.bound() == []
    # And whatever somebody has bound to the number by now is theirs.
    device = lab.attach(lab.image())
    lab.scripted.let_go(device.number)
    lab.scripted.bind_by_others(device.number, lab.image())
    assert loop_device.clear(device) is True
    assert lab.bound() == [device.number]
    lab.forget(device)
    lab.clear(device.number)


# --- others -------------------------------------------------------------------------------------


def test_a_mounted_device_that_cannot_be_changed_is_busy(on: MakeLab) -> None:
    """From Linux 6.19 on."""
    lab = on(Traits(release=(6, 19), busy_when_mounted=True))
    device = lab.attach(lab.image())
    with lab.open(device.number, os.O_RDONLY | os.O_EXCL):
        with pytest.raises(DeviceBusy):
            change.set_reference(device, b"name")
        with pytest.raises(DeviceBusy):
            change.resize(device, offset=None, size_limit=4096, force=True)
    assert change.set_reference(device, b"name")


def test_a_kernel_with_a_parser_finds_nothing_before_we_have_looked(on: MakeLab) -> None:
    """Kernel's parser."""
    lab = on(Traits())
    assert lab.scripted
    lab.scripted.parsed = {7: PartitionExtent(7, 0, 512), 1: GPT[0]}
    device = lab.attach(lab.gpt(), partition_scan=True)
    assert list(status(device).partitions) == GPT
    # What its parser had made would have had to go.
    assert counted(lab, "blkpg_del_partition") == 0


def test_what_sysfs_does_not_let_us_write_is_left_as_it_is(on: MakeLab) -> None:
    lab = on(Traits(writable_sysfs=False))
    lower = lab.attach(lab.image())
    block_device.mirror_discard_limit(lower.number, os.makedev(7, lower.number))
    assert counted(lab, "set_loop_attribute") == 1


def test_a_driver_that_is_not_loaded_is_not_supported(on: MakeLab) -> None:
    lab = on(Traits())
    lab.script.fail("open_loop_control", errno.ENOENT)
    with pytest.raises(NotSupported, match="modprobe loop"):
        lab.attach(lab.image())


def test_a_device_is_removed_in_39_attempts_at_most(on: MakeLab) -> None:
    """A20."""
    lab = on(Traits())
    device = lab.attach(lab.image())
    lab.detach(device)
    with lab.open(device.number):
        assert loop_device.remove(device.number) is False
        assert counted(lab, "loop_ctl_remove") == 39
        assert sum(lab.pauses) == pytest.approx(5.73)
    assert loop_device.remove(device.number) is True
    assert loop_device.remove(device.number) is True
