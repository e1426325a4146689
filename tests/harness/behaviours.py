# SPDX-License-Identifier: LGPL-2.1-or-later
"""What loopd.loop does, as tests of any kernel there is.

tests/unit/test_scripted_kernel.py runs them on the scripted kernel, tests/root/test_real_kernel.py
on the real one, each with a `lab` of its own.  A docstring names the behaviour of systemd's
loop-util that is shown, as A1 to A28.
What goes on with a free device, which anybody may take, is alone on the machine.
"""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loopd.errors import DeviceBusy, InvalidArgs, LoopError, NoSuchDevice, UnsupportedFile
from loopd.fd import OwnedFd
from loopd.loop import (
    attach,
    backing_file,
    block_device,
    change,
    kernel,
    loop_device,
    partitions,
    query,
)
from loopd.loop.block_device import Lock
from loopd.loop.kernel import PartitionExtent
from tests.harness import images
from tests.harness.images import MIB
from tests.harness.lab import Lab

GPT = [PartitionExtent(1, MIB, MIB), PartitionExtent(2, 2 * MIB, MIB)]
"""The partitions that Lab.gpt() makes."""


def status(device: loop_device.LoopDevice) -> query.Status:
    """How a device is set up, which sysfs and the device itself have to agree about."""
    told = query.status(device.number)
    assert status_by_fd(device) == told
    return told


def status_by_fd(device: loop_device.LoopDevice) -> query.Status:
    return query.status_by_fd(device.fd.fileno(), device.number, device.binding, device.diskseq)


def strays(number: int) -> list[PartitionExtent]:
    """The partitions that are nobody's; those of a bound device are whose it is by now."""
    found = kernel.loop_partitions(number)
    return [] if kernel.loop_bound(number) else found


def try_flock(fd: OwnedFd, operation: int) -> bool:
    try:
        kernel.flock(fd.fileno(), operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- attach -------------------------------------------------------------------------------------


def test_a_file_is_attached_and_described(lab: Lab) -> None:
    """A14: the backing file's path, inode and device are recorded; A17: autoclear always."""
    path = lab.image(MIB)
    device = lab.attach(path)
    told = status(device)
    assert told.backing_file == os.fsencode(path)
    assert (told.size, told.offset, told.size_limit) == (MIB, 0, 0)
    assert change.sector_size(device) == 512
    assert (told.autoclear, told.read_only, told.partition_scan) == (True, False, False)
    file = path.stat()
    asked = query.binding(device.number, device.binding)
    assert (asked.file.device, asked.file.inode) == (file.st_dev, file.st_ino)
    assert asked.file.block is None


@pytest.mark.parametrize(
    ("flags", "request_", "read_only"),
    [
        (os.O_RDWR, {}, False),
        (os.O_RDWR, {"read_only": True}, True),
        (os.O_RDONLY, {"read_only": True}, True),
    ],
)
def test_read_only_comes_from_how_the_file_is_open(
    lab: Lab, flags: int, request_: dict[str, Any], read_only: bool
) -> None:
    """A17."""
    device = lab.attach(lab.image(), flags, **request_)
    assert status(device).read_only is read_only
    assert device.writable is not read_only


def test_offset_limit_reference_and_sector_size_are_set(lab: Lab) -> None:
    device = lab.attach(
        lab.image(MIB), offset=8192, size_limit=65536, sector_size=4096, reference=b"name"
    )
    told = status(device)
    assert (told.offset, told.size_limit, told.size) == (8192, 65536, 65536)
    assert change.sector_size(device) == 4096
    assert query.binding(device.number, device.binding).reference == b"name"


def test_a_device_begins_at_any_byte_and_does_without_direct_io_then(lab: Lab) -> None:
    path = lab.image(MIB)
    device = lab.attach(path, offset=188392, direct_io=True)
    told = status(device)
    assert (told.offset, told.size, told.direct_io) == (188392, (MIB - 188392) // 512 * 512, False)
    assert lab.script.calls.count("loop_configure") == 1
    with mmap.mmap(-1, 4096) as buffer, lab.open(device.number) as fd:
        kernel.preadv(fd.fileno(), buffer, 0)
        assert buffer[:] == path.read_bytes()[188392 : 188392 + 4096]
    assert resize(device, offset=1, size_limit=512) == 512
    assert status(device).offset == 1


def test_a_device_that_was_cleared_has_no_status(lab: Lab) -> None:
    device = lab.attach(lab.image())
    with lab.open(device.number) as fd:
        kernel.loop_clr_fd(fd.fileno())  # with two openers it waits for the last close
        assert status(device).autoclear
    lab.script.fail("loop_get_status64", errno.ENXIO)
    with pytest.raises(NoSuchDevice, match="no file attached any more"):
        status_by_fd(device)
    lab.script.fail("loop_get_status64", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        status_by_fd(device)


def test_each_attachment_has_a_diskseq_of_its_own(lab: Lab) -> None:
    """A11."""
    path = lab.image()
    seen = set()
    for _ in range(3):
        device = lab.attach(path)
        with lab.open(device.number) as fd:
            assert kernel.blkgetdiskseq(fd.fileno()) == device.diskseq
        assert status(device).diskseq == device.diskseq
        seen.add(device.diskseq)
        lab.detach(device)
    assert len(seen) == 3


@pytest.mark.alone
def test_bound_or_not(lab: Lab) -> None:
    """A2: what is not bound says ENXIO, and sysfs says it without asking the file."""
    device = lab.attach(lab.image())
    assert kernel.loop_bound(device.number)
    with block_device.opened(kernel.open_loop_control()) as control:
        number = kernel.loop_ctl_add(control.fileno(), -1)
        try:
            with lab.open(number) as fd, pytest.raises(OSError, match="No such device") as unbound:
                kernel.loop_get_status64(fd.fileno())
            assert unbound.value.errno == errno.ENXIO
            assert not kernel.loop_bound(number)
            with pytest.raises(NoSuchDevice):
                query.status(number)
        finally:
            assert loop_device.remove(number)


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        ({"size_limit": 511}, "size-limit"),
        ({"size_limit": MIB + 512}, "size-limit"),
        ({"offset": MIB}, "offset"),
        ({"offset": MIB - 100}, "offset"),
        ({"sector_size": 768}, "sector-size"),
        ({"sector_size": 2 * os.sysconf("SC_PAGE_SIZE") * 64}, "sector-size"),
        ({"sector_size": 4096, "size_limit": 512}, "size-limit"),
        ({"sector_size": None, "offset": 2**63}, "offset"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_bound(
    lab: Lab, request_: dict[str, Any], key: str
) -> None:
    """libblockdev #1171."""
    with pytest.raises(InvalidArgs, match=f"^{key}: "):
        lab.attach(lab.sparse(64 * MIB if key == "sector-size" else MIB), **request_)
    assert lab.bound() == []
    assert "loop_set_status64" not in lab.script.calls


@pytest.mark.parametrize(
    ("request_", "left"),
    [({"size_limit": MIB // 2}, 4096), ({}, 0), ({"partition_scan": True}, 511)],
)
def test_a_file_that_its_owner_cuts_meanwhile_is_refused_and_blames_nobody_else(
    lab: Lab, request_: dict[str, Any], left: int
) -> None:
    """A5: that the size is not what it should be need not be the kernel's fault."""
    path = lab.image(MIB)
    lab.script.before("loop_configure", lambda: os.truncate(path, left))
    with pytest.raises(InvalidArgs, match="has become smaller"):
        lab.attach(path, **request_)
    lab.require_bound([])
    assert lab.driver.configures


@pytest.mark.parametrize("what", ["directory", "fifo", "character device"])
def test_only_regular_files_and_block_devices_are_taken(lab: Lab, what: str) -> None:
    """A13."""
    path = lab.path()
    if what == "directory":
        path.mkdir()
        fd = os.open(path, os.O_RDONLY)
    elif what == "fifo":
        os.mkfifo(path)
        fd = os.open(path, os.O_RDWR)
    else:
        fd = os.open("/dev/zero", os.O_RDWR)
    with OwnedFd(fd), pytest.raises(UnsupportedFile):
        backing_file.examine(fd)


# --- undoing ------------------------------------------------------------------------------------


def calls_of_attach(lab: Lab, **request: Any) -> list[str]:
    """What an attach calls of the kernel, in order."""
    lab.script.calls.clear()
    device = lab.attach(lab.gpt(), **request)
    calls = list(lab.script.calls)
    lab.detach(device)
    return calls


@pytest.mark.parametrize(
    "request_",
    [{}, {"partition_scan": True, "lock": Lock.SHARED}],
    ids=["plain", "scanning-locked"],
)
def test_a_failure_at_any_call_leaves_nothing_bound_claimed_or_open(
    lab: Lab, request_: dict[str, Any]
) -> None:
    """libblockdev #1171, A1: whatever fails after binding, the device is cleared and closed."""
    path = lab.gpt()
    calls = calls_of_attach(lab, **request_)
    assert "loop_configure" in calls
    before = len(os.listdir("/proc/self/fd"))
    for index, name in enumerate(calls):
        if name == "close":
            continue  # close(2) always closes
        lab.script.fail(name, skip=calls[:index].count(name))
        with suppress(OSError, LoopError):
            lab.detach(lab.attach(path, **request_))
        lab.script.clear()
        lab.require_bound([])
        assert lab.claims == []
        assert len(os.listdir("/proc/self/fd")) == before, f"{name}, call {index}"


def test_a_device_that_others_clear_at_once_is_not_ours(lab: Lab) -> None:
    """A1, A8: cleared by someone else right after it was bound, so another one is taken."""
    taken: list[int] = []

    def clear() -> None:
        taken.append(lab.claims[-1])
        lab.clear(lab.claims[-1])

    lab.script.after("loop_configure", clear)
    device = lab.attach(lab.image())
    assert taken
    # With our fd open it only waits for the last close, ours: it is still the device we bound.
    assert status(device).autoclear


# --- others in between --------------------------------------------------------------------------


def after_choosing(lab: Lab, action: Callable[[int], None]) -> None:
    """Do something to the first device that an attach has chosen, before it is opened.

    Before Linux 6.11 it is a new one.
    """
    call = "loop_ctl_add" if block_device.unbinds_while_open() else "loop_ctl_get_free"
    lab.script.after(call, lambda: action(lab.script.returned))


def test_a_device_that_someone_else_binds_in_between_is_left_to_them(lab: Lab) -> None:
    """A8: bound already."""
    others = lab.image()
    theirs: list[int] = []
    after_choosing(lab, lambda number: theirs.append(lab.foreign(others, wanted=number)))
    device = lab.attach(lab.image())
    assert theirs
    assert theirs[0] != device.number
    assert query.status(theirs[0]).backing_file == os.fsencode(others)


@pytest.mark.alone
def test_a_device_that_vanishes_is_no_error(lab: Lab) -> None:
    """A8: removed before it is opened."""
    removed: list[bool] = []
    after_choosing(lab, lambda number: removed.append(loop_device.remove(number)))
    lab.attach(lab.image())
    assert removed == [True]


@pytest.mark.alone
def test_a_device_that_someone_keeps_locked_is_passed_over(lab: Lab) -> None:
    """Locked for ever, A8, A10: nobody waits for a device's lock with loop-control's held."""
    locked: list[int] = []

    def lock(number: int) -> None:
        kernel.flock(lab.open(number).fileno(), fcntl.LOCK_EX)
        locked.append(number)

    after_choosing(lab, lock)
    device = lab.attach(lab.image())
    assert locked
    assert device.number != locked[0]


@pytest.mark.alone
def test_the_64th_attempt_is_the_last(lab: Lab) -> None:
    """A8."""
    lab.pauses = []
    new_ones = attach.Numbers(choose=lambda control_fd: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_device, "retry_pauses", lambda attempts: [0.0] * attempts)
        # udev may be slow to look at the only new device.
        patch.setattr(attach, "_NEW_DEVICE_LOCK_TIMEOUT", 20.0)
        lab.script.fail("loop_ctl_add", errno.EEXIST, times=attach.ATTEMPTS)
        with pytest.raises(DeviceBusy, match="64 attempts"):
            lab.attach(lab.image(), numbers=new_ones)
        lab.script.fail("loop_ctl_add", errno.EEXIST, times=attach.ATTEMPTS - 1)
        lab.attach(lab.image(), numbers=new_ones)


@pytest.mark.alone
def test_stale_partitions_are_removed_and_another_device_is_tried(lab: Lab) -> None:
    """Old partitions, A9: the next image is never seen through a partition of a former life."""
    stale = stale_partition(lab)
    lab.script.after("loop_ctl_get_free", lambda: None)
    device = lab.attach(lab.image(4 * MIB))
    assert kernel.loop_partitions(device.number) == []
    assert device.number != stale or "blkpg_del_partition" in lab.script.calls


def stale_partition(lab: Lab) -> int:
    """An unbound device with a partition: one made without PARTSCAN outlives its binding."""
    number = lab.foreign(lab.image(4 * MIB))
    binding = kernel.loop_binding(number)
    with lab.open(number) as fd:
        kernel.blkpg_add_partition(fd.fileno(), 1, MIB, MIB)
    lab.clear(number)
    lab.wait_cleared(number, binding)
    assert kernel.loop_partitions(number) == [PartitionExtent(1, MIB, MIB)]
    return number


@pytest.mark.alone
def test_what_a_former_daemon_left_on_an_unbound_device_is_removed(lab: Lab) -> None:
    """Old partitions, A9: at start."""
    number = stale_partition(lab)
    loop_device.clean(number)
    assert kernel.loop_partitions(number) == []
    loop_device.clean(number)
    device = lab.attach(lab.gpt(), partition_scan=True)
    loop_device.clean(device.number)
    assert kernel.loop_partitions(device.number) == GPT
    loop_device.clean(0xFFFFF)


def test_a_partition_that_appears_just_before_binding_does_not_stay(lab: Lab) -> None:
    """Old partitions, A9: looked for again after binding and before first use."""

    def add() -> None:
        # An unbound device has no size, so it takes one that is bound for a moment.
        number = lab.claims[-1]
        with lab.open(number) as fd:
            kernel.blkpg_add_partition(fd.fileno(), 1, 0, 512)

    lab.script.after("loop_configure", add)
    device = lab.attach(lab.image(4 * MIB))
    assert kernel.loop_partitions(device.number) == []


@pytest.mark.alone
def test_the_wanted_number_and_no_other(lab: Lab) -> None:
    with block_device.opened(kernel.open_loop_control()) as control:
        number = kernel.loop_ctl_add(control.fileno(), -1)
    device = lab.attach(lab.image(), number=number)
    assert device.number == number
    with pytest.raises(DeviceBusy, match=f"/dev/loop{number} "):
        lab.attach(lab.image(), number=number)
    assert lab.bound() == [number]


# --- locks --------------------------------------------------------------------------------------


@pytest.mark.alone  # others take the lock of loop-control, too
def test_the_locks_are_taken_control_first_and_the_control_lock_is_not_kept(lab: Lab) -> None:
    """Locked for ever, A10."""
    held: list[bool] = []

    def look() -> None:
        with block_device.opened(kernel.open_loop_control()) as control:
            held.append(not try_flock(control, fcntl.LOCK_EX))

    lab.script.before("loop_configure", look)
    lab.script.before("blksszget", look)
    device = lab.attach(lab.image())
    # A new device is nobody else's, so it is waited for without.
    assert held == [not block_device.unbinds_while_open(), False]
    calls = lab.script.calls
    first_lock = calls.index("flock")
    assert calls.index("open_loop_control") < first_lock < calls.index("open_loop")
    # No lock is left, on either.
    with lab.open(device.number) as fd:
        assert try_flock(fd, fcntl.LOCK_EX)
    look()
    assert held[-1] is False


@pytest.mark.parametrize(
    ("kept", "shared", "exclusive"),
    [(Lock.NONE, True, True), (Lock.SHARED, True, False), (Lock.EXCLUSIVE, False, False)],
)
def test_the_lock_is_kept_downgraded_or_dropped_as_asked(
    lab: Lab, kept: Lock, shared: bool, exclusive: bool
) -> None:
    """A3, A10: on a second fd."""
    device = lab.attach(lab.image(), lock=kept)
    assert (device.lock is None) == (kept is Lock.NONE)
    with lab.open(device.number) as fd:
        assert try_flock(fd, fcntl.LOCK_SH) is shared
        kernel.flock(fd.fileno(), fcntl.LOCK_UN)
        assert try_flock(fd, fcntl.LOCK_EX) is exclusive


def test_a_lock_is_taken_changed_and_dropped_later(lab: Lab) -> None:
    """A25."""
    device = lab.attach(lab.image())
    lock = device.lock = change.take_lock(device, Lock.EXCLUSIVE)
    with lab.open(device.number) as fd:
        assert not try_flock(fd, fcntl.LOCK_SH)
        change.change_lock(device, lock, Lock.SHARED, held=Lock.EXCLUSIVE)
        assert try_flock(fd, fcntl.LOCK_SH)
        # Somebody else shares it now: no upgrade, and ours is still there.
        with pytest.raises(DeviceBusy, match="locked by someone else") as refused:
            change.change_lock(device, lock, Lock.EXCLUSIVE, held=Lock.SHARED)
        assert not isinstance(refused.value, change.LockLost)
        kernel.flock(fd.fileno(), fcntl.LOCK_UN)
        assert not try_flock(fd, fcntl.LOCK_EX)
        lock.close()
        assert try_flock(fd, fcntl.LOCK_EX)


def test_a_lock_that_others_take_while_it_is_changed_is_said_to_be_lost(lab: Lab) -> None:
    """A25: flock(2) lets go of the one before it has the other."""
    device = lab.attach(lab.image())
    lock = device.lock = change.take_lock(device, Lock.SHARED)
    with lab.open(device.number) as fd:
        assert try_flock(fd, fcntl.LOCK_SH)

        def take() -> None:
            assert try_flock(fd, fcntl.LOCK_EX)

        # After our attempt to get it exclusively, which lost the shared one.
        lab.script.after_error("flock", take)
        with pytest.raises(change.LockLost):
            change.change_lock(device, lock, Lock.EXCLUSIVE, held=Lock.SHARED)


def test_a_lock_of_somebody_else_is_not_waited_for(lab: Lab) -> None:
    """A25."""
    device = lab.attach(lab.image())
    with lab.open(device.number) as fd:
        assert try_flock(fd, fcntl.LOCK_EX)
        with pytest.raises(DeviceBusy):
            change.take_lock(device, Lock.SHARED)


# --- detach -------------------------------------------------------------------------------------


@pytest.mark.alone
def test_detach_writes_back_locks_removes_partitions_clears_and_closes(lab: Lab) -> None:
    """A20, with the lock rules of ours: the control lock is not taken, each wait has an end."""
    device = lab.attach(lab.gpt(), partition_scan=True, lock=Lock.EXCLUSIVE)
    assert kernel.loop_partitions(device.number) == GPT
    lab.script.calls.clear()
    lab.detach(device)
    calls = lab.script.calls
    order = ["close", "fsync", "flock", "blkpg_del_partition", "loop_clr_fd"]
    assert [calls.index(name) for name in order] == sorted(calls.index(name) for name in order)
    assert "open_loop_control" not in calls
    assert kernel.loop_partitions(device.number) == []
    assert loop_device.remove(device.number)
    with pytest.raises(OSError, match=r"No such|not exist"):
        kernel.open_loop(device.number, os.O_RDONLY)


def test_what_others_have_open_is_detached_at_their_last_close(lab: Lab) -> None:
    """A20: lazily."""
    device = lab.attach(lab.image())
    with lab.open(device.number):
        assert loop_device.detach(device) is True
        assert kernel.loop_binding(device.number) == device.binding
    lab.wait_unbound(device)
    lab.forget(device)


def test_what_was_handed_out_is_kept_open_until_the_last_close(lab: Lab) -> None:
    """A20: a client with an fd could turn autoclear off."""
    device = lab.attach(lab.image())
    device.handed_out = True
    with lab.open(device.number):
        assert loop_device.detach(device) is False
        assert loop_device.clear(device) is False
        assert kernel.loop_binding(device.number) == device.binding
    lab.end(device)


def test_a_device_that_others_lock_for_ever_is_cleared_without_the_lock(lab: Lab) -> None:
    """Locked for ever, A20."""
    device = lab.attach(lab.image())
    device.handed_out = True
    with lab.open(device.number) as fd:
        assert try_flock(fd, fcntl.LOCK_EX)
        assert loop_device.detach(device) is False
    lab.end(device)


@pytest.mark.alone
def test_a_device_that_is_gone_is_not_in_use(lab: Lab) -> None:
    device = lab.attach(lab.image())
    assert not block_device.in_use(device.number)
    with lab.open(device.number, os.O_RDONLY | os.O_EXCL):
        assert block_device.in_use(device.number)
    lab.detach(device)
    assert loop_device.remove(device.number)
    with pytest.raises(NoSuchDevice):
        block_device.in_use(device.number)


def test_a_device_in_use_is_not_removed(lab: Lab) -> None:
    """A20: LOOP_CTL_REMOVE is tried while the device is free, and no longer."""
    device = lab.attach(lab.image())
    assert loop_device.remove(device.number) is False
    assert kernel.loop_binding(device.number) == device.binding


def test_what_is_closed_and_not_detached_is_not_cleared_by_us(lab: Lab) -> None:
    """A21: foreign and relinquished devices; what was ours goes by autoclear."""
    number = lab.foreign(lab.image())
    foreign = change.open_existing(number)
    assert not foreign.ours
    lab.script.calls.clear()
    foreign.close()
    assert kernel.loop_bound(number)
    device = lab.attach(lab.image())
    with lab.open(device.number):
        device.close()
        assert kernel.loop_binding(device.number) == device.binding
    assert "loop_clr_fd" not in lab.script.calls
    lab.wait_unbound(device)
    lab.forget(device)


# --- devices that are there ---------------------------------------------------------------------


def test_an_existing_device_is_opened_by_number_fd_and_partition(lab: Lab) -> None:
    """A22."""
    device = lab.attach(lab.gpt(), partition_scan=True)
    found = change.open_existing(device.number)
    assert (found.number, found.diskseq, found.binding) == (
        device.number,
        device.diskseq,
        device.binding,
    )
    found.lock = change.take_lock(found, Lock.SHARED)
    with lab.open(device.number) as fd:
        assert not try_flock(fd, fcntl.LOCK_EX)
    found.close()
    named = query.named_by(OwnedFd(kernel.open_loop(device.number, os.O_RDONLY), kernel.close))
    assert (named.number, named.partition) == (device.number, None)
    named = query.named_by(
        OwnedFd(kernel.open_partition(device.number, 2, os.O_RDONLY), kernel.close)
    )
    assert (named.number, named.partition) == (device.number, 2)


@pytest.mark.alone
def test_another_device_on_the_number_is_not_taken_for_it(lab: Lab) -> None:
    """A22."""
    number = lab.foreign(lab.image())
    binding = kernel.loop_binding(number)
    assert binding is not None
    lab.clear(number)
    lab.wait_cleared(number, binding)
    with pytest.raises(NoSuchDevice):
        change.open_existing(number, binding)
    again = lab.attach(lab.image(), number=number)
    with pytest.raises(NoSuchDevice, match="another device"):
        change.open_existing(again.number, binding)


def test_a_device_is_opened_for_a_client_and_never_with_more_rights(lab: Lab) -> None:
    device = lab.attach(lab.gpt(), os.O_RDONLY, partition_scan=True)
    with pytest.raises(InvalidArgs, match="read-only"):
        change.open_node(device, writable=True)
    for which in (None, 1):
        change.open_node(device, writable=False, partition=which).close()
    with pytest.raises(NoSuchDevice, match="no partition 7"):
        change.open_node(device, writable=False, partition=7)


def test_autoclear_that_was_turned_off_is_on_again_before_an_fd_is_given(lab: Lab) -> None:
    device = lab.attach(lab.image())
    info = kernel.loop_get_status64(device.fd.fileno())
    info.lo_flags = 0
    kernel.loop_set_status64(device.fd.fileno(), info)
    assert not status(device).autoclear
    change.open_node(device, writable=False).close()
    assert status(device).autoclear


# --- changing -----------------------------------------------------------------------------------


def resize(device: loop_device.LoopDevice, **how: Any) -> int:
    given = {"offset": None, "size_limit": None, "force": False} | how
    return change.resize(device, **given)


def test_offset_and_limit_change_and_unchanged_means_no_call(lab: Lab) -> None:
    """A24."""
    device = lab.attach(lab.image(MIB))
    assert resize(device, offset=4096, size_limit=8192) == 8192
    assert (status(device).offset, status(device).size_limit) == (4096, 8192)
    lab.script.calls.clear()
    assert resize(device, offset=4096, size_limit=8192) == 8192
    assert "loop_set_status64" not in lab.script.calls
    assert resize(device, size_limit=0) == MIB - 4096


def test_a_grown_file_is_taken_up(lab: Lab) -> None:
    path = lab.image(MIB)
    device = lab.attach(path)
    os.truncate(path, 2 * MIB)
    assert status(device).size == MIB
    assert resize(device) == 2 * MIB


def test_what_is_exclusively_open_does_not_shrink_unless_forced(lab: Lab) -> None:
    device = lab.attach(lab.image(MIB))
    with lab.open(device.number, os.O_RDONLY | os.O_EXCL):
        with pytest.raises(DeviceBusy):
            resize(device, size_limit=4096)
        assert resize(device, size_limit=4096, force=True) == 4096


def test_a_reference_is_set_and_cleared_and_may_be_63_bytes(lab: Lab) -> None:
    """A28."""
    device = lab.attach(lab.image())

    def reference() -> bytes:
        return query.binding(device.number, device.binding).reference

    assert change.set_reference(device, b"x" * 63)
    assert reference() == b"x" * 63
    lab.script.calls.clear()
    assert not change.set_reference(device, b"x" * 63)
    assert "loop_set_status64" not in lab.script.calls
    assert change.set_reference(device, b"")
    assert reference() == b""
    with pytest.raises(InvalidArgs, match=r"^reference: "):
        change.set_reference(device, b"x" * 64)


def test_autoclear_is_set_and_cleared_and_says_whether_that_changed_it(lab: Lab) -> None:
    """A27."""
    number = lab.foreign(lab.image())
    device = change.open_existing(number)
    assert not change.set_autoclear(device, enable=False)
    assert change.set_autoclear(device, enable=True)
    assert query.status(number).autoclear
    assert not change.set_autoclear(device, enable=True)
    assert change.set_autoclear(device, enable=False)
    assert not query.status(number).autoclear
    device.close()


def test_a_setting_does_not_undo_another(lab: Lab) -> None:
    device = lab.attach(lab.gpt(), partition_scan=True, reference=b"one")
    resize(device, size_limit=3 * MIB)
    change.set_reference(device, b"two")
    told = status(device)
    assert (told.size, told.partition_scan, told.autoclear) == (3 * MIB, True, True)
    assert list(told.partitions) == GPT
    resize(device, size_limit=0)
    assert query.binding(device.number, device.binding).reference == b"two"


def test_the_sector_size_changes_live(lab: Lab) -> None:
    device = lab.attach(lab.image(MIB))
    assert change.set_sector_size(device, 4096) == 4096
    assert change.sector_size(device) == 4096
    assert change.set_sector_size(device, None) == 512
    with lab.open(device.number, os.O_RDONLY | os.O_EXCL), pytest.raises(DeviceBusy):
        change.set_sector_size(device, 1024)
    resize(device, size_limit=512 * 3)
    with pytest.raises(InvalidArgs, match=r"^sector-size: "):
        change.set_sector_size(device, 1024)
    resize(device, size_limit=0)
    with pytest.raises(InvalidArgs, match=r"^sector-size: "):
        change.set_sector_size(device, 64 * MIB)
    assert change.sector_size(device) == 512


def test_a_device_is_synced_and_the_error_is_seen(lab: Lab) -> None:
    """A26."""
    device = lab.attach(lab.image())
    change.sync(device)
    lab.script.fail("fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        change.sync(device)


# --- sector sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_the_sector_size_is_found_from_the_table(lab: Lab, size: int) -> None:
    """A16."""
    path = lab.path()
    path.write_bytes(bytes(size) + gpt_header() + bytes(MIB))
    device = lab.attach(path, sector_size=None)
    assert change.sector_size(device) == size


def gpt_header(*, revision: int = 0x10000, length: int = 92, sector: int = 1) -> bytes:
    return struct.pack("<8sIIIIQ", b"EFI PART", revision, length, 0, 0, sector).ljust(92, b"\0")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        gpt_header(revision=0x20000),
        gpt_header(length=91),
        gpt_header(length=4097),
        gpt_header(sector=2),
        gpt_header().lower(),
    ],
)
def test_what_is_no_table_means_512(lab: Lab, header: bytes) -> None:
    """A16."""
    path = lab.path()
    path.write_bytes(bytes(2048) + header + bytes(MIB))
    assert change.sector_size(lab.attach(path, sector_size=None)) == 512


def test_tables_for_more_than_one_sector_size_are_refused(lab: Lab) -> None:
    """A16."""
    path = lab.path()
    path.write_bytes(bytes(512) + gpt_header().ljust(512, b"\0") + gpt_header() + bytes(MIB))
    with pytest.raises(InvalidArgs, match=r"^sector-size: .*512 and 1024"):
        lab.attach(path, sector_size=None)


@pytest.mark.parametrize("offset", [512, 4096, 5120])
@pytest.mark.parametrize("direct", [0, os.O_DIRECT])
def test_the_table_is_looked_for_where_the_device_begins(
    lab: Lab, offset: int, direct: int
) -> None:
    """A16: also through an fd that allows aligned reads only."""
    path = lab.path()
    path.write_bytes(bytes(offset + 2048) + gpt_header() + bytes(MIB))
    device = lab.attach(path, os.O_RDWR | direct, sector_size=None, offset=offset, direct_io=False)
    assert change.sector_size(device) == 2048


def test_a_file_of_one_sector_has_no_table(lab: Lab) -> None:
    """A16."""
    assert change.sector_size(lab.attach(lab.image(512), sector_size=None)) == 512


# --- a tail of less than a sector ---------------------------------------------------------------

TAIL = 1024 + 100
"""Bytes at the end of a file: two sectors of 512 bytes, and no sector of 4096."""


def grow(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


def test_a_device_has_whole_sectors_only(lab: Lab) -> None:
    """What is left of a sector is in the device's size by the kernel, and reading it fails."""
    path = grow(lab.image(MIB), MIB + TAIL)
    device = lab.attach(path, sector_size=4096)
    assert status(device).size == MIB
    assert status(lab.attach(lab.image(MIB + TAIL))).size == MIB + 1024
    # A grown file is taken up as if there were no limit.
    grow(path, 2 * MIB + TAIL)
    assert resize(device) == status(device).size == 2 * MIB
    assert resize(device) == 2 * MIB
    grow(path, 2 * MIB + 4096)
    assert resize(device) == 2 * MIB + 4096
    assert status(device).size_limit == 0


def test_another_sector_size_changes_what_is_whole(lab: Lab) -> None:
    device = lab.attach(grow(lab.image(MIB), MIB + TAIL))
    for size, whole in ((4096, MIB), (1024, MIB + 1024), (2048, MIB), (512, MIB + 1024)):
        change.set_sector_size(device, size)
        assert status(device).size == whole
    assert status(device).size_limit == 0


def test_a_limit_is_kept_over_a_tail(lab: Lab) -> None:
    path = lab.image(2 * MIB)
    device = lab.attach(path, sector_size=4096, size_limit=MIB)
    grow(path, MIB - TAIL)
    assert resize(device) == MIB - 4096
    grow(path, 2 * MIB)
    assert resize(device) == MIB
    assert status(device).size_limit == MIB
    # One with an offset, too.
    grow(path, 2 * MIB + TAIL)
    assert resize(device, offset=512, size_limit=0) == 2 * MIB
    assert resize(device, offset=0, size_limit=4096) == 4096


# --- partitions ---------------------------------------------------------------------------------


def test_partitions_are_there_when_attach_returns(lab: Lab) -> None:
    device = lab.attach(lab.gpt(), partition_scan=True)
    told = status(device)
    assert list(told.partitions) == GPT
    assert (told.partition_scan, told.size, told.size_limit) == (True, 4 * MIB, 0)
    for each in GPT:
        assert kernel.partition_node_exists(device.number, each.number)


def test_the_kernels_parser_sees_nothing(lab: Lab) -> None:
    """Kernel's parser: it would make partitions that vanish and come again, from anyone's table."""
    limits: list[int] = []

    def look() -> None:
        limits.append(query.status(lab.claims[-1]).size)

    lab.script.after("loop_configure", look)
    device = lab.attach(lab.gpt(), partition_scan=True)
    assert limits == [0]
    assert status(device).size == 4 * MIB


def test_partitions_go_when_the_device_goes_by_itself(lab: Lab) -> None:
    """As after a kill -9 of whoever made them: PARTSCAN was set before the first was made."""
    device = lab.attach(lab.gpt(), partition_scan=True)
    device.close()
    lab.wait_unbound(device)
    assert strays(device.number) == []
    lab.forget(device)


def test_a_rescan_follows_the_table_and_leaves_alone_what_is_as_it_says(lab: Lab) -> None:
    path = lab.gpt()
    device = lab.attach(path, partition_scan=True)
    with lab.open(device.number, partition=1):
        images.make_gpt(path, [(2048, 2048), (4096, 1024), (6144, 512)])
        found = change.rescan_partitions(device)
        assert found == [
            GPT[0],
            PartitionExtent(2, 2 * MIB, MIB // 2),
            PartitionExtent(3, 3 * MIB, MIB // 4),
        ]
        images.make_gpt(path, [(2048, 1024)])
        with pytest.raises(DeviceBusy, match=f"loop{device.number}p1 is in use"):
            change.rescan_partitions(device)
    assert change.rescan_partitions(device) == [PartitionExtent(1, MIB, MIB // 2)]


def test_a_rescan_grows_what_is_in_use_and_tells_what_the_table_has(lab: Lab) -> None:
    path = images.make_gpt(lab.gpt(), [(2048, 1024), (6144, 512)])
    device = lab.attach(path, partition_scan=True)
    assert device.table == (1, 2)
    with lab.open(device.number, os.O_RDONLY | os.O_EXCL, partition=1):
        images.make_gpt(path, [(2048, 2048), (3000, 100), (6144, 512)])
        found = change.rescan_partitions(device)
    assert found == [GPT[0], PartitionExtent(3, 3 * MIB, MIB // 4)]
    assert device.table == (1, 2, 3)


def test_partitions_do_not_reach_past_the_end_of_their_device(lab: Lab) -> None:
    device = lab.attach(lab.gpt(), partition_scan=True)
    assert resize(device, size_limit=MIB + MIB // 2) == MIB + MIB // 2
    assert list(status(device).partitions) == [PartitionExtent(1, MIB, MIB // 2)]
    assert resize(device, size_limit=0) == 4 * MIB


def test_partitions_are_found_later_where_nobody_asked_for_them_at_first(lab: Lab) -> None:
    device = lab.attach(lab.gpt())
    assert status(device).partitions == ()
    assert change.rescan_partitions(device) == GPT
    assert status(device).partition_scan


def test_a_partition_is_resized(lab: Lab) -> None:
    """A23."""
    device = lab.attach(lab.gpt(), partition_scan=True)

    def to(size: int | None, number: int = 1) -> int:
        return change.resize_partition(device, number, size=size)

    assert to(MIB // 2) == MIB // 2
    assert status(device).partitions[0] == PartitionExtent(1, MIB, MIB // 2)
    lab.script.calls.clear()
    assert to(MIB // 2) == to(None) == MIB // 2
    assert "blkpg_resize_partition" not in lab.script.calls
    # As much as there is room for: up to the next one, or the end.
    assert to(0) == MIB
    assert to(0, number=2) == 2 * MIB
    for wrong in (MIB + 512, 100):
        with pytest.raises(InvalidArgs, match=r"^size-limit: "):
            to(wrong)
    with lab.open(device.number, os.O_RDONLY | os.O_EXCL, partition=1):
        with pytest.raises(DeviceBusy):
            to(4096)
        assert to(MIB) == MIB
    with pytest.raises(NoSuchDevice):
        to(512, number=5)


def test_a_partition_in_use_stays_and_the_device_with_it(lab: Lab) -> None:
    device = lab.attach(lab.gpt(), partition_scan=True)
    device.handed_out = True
    with lab.open(device.number, partition=2):
        assert partitions.remove_all(device.fd.fileno(), device.number) == 2
        assert kernel.loop_partitions(device.number) == GPT[1:]
        assert loop_device.detach(device) is False
    lab.end(device)
    assert strays(device.number) == []


# --- block devices ------------------------------------------------------------------------------


def test_a_loop_device_can_be_over_a_block_device(lab: Lab) -> None:
    """A12, A14: where a loop device is wanted all the same; the lower one's discard limit holds."""
    lower = lab.attach(lab.image(4 * MIB))
    kernel.set_loop_attribute(lower.number, "queue/discard_max_bytes", b"65536")
    fd = OwnedFd(kernel.open_loop(lower.number, os.O_RDWR), kernel.close)
    examined = backing_file.examine(fd.fileno())
    assert examined.identity.block
    assert examined.size == 4 * MIB
    upper = lab.attach_fd(fd, examined, offset=MIB, size_limit=MIB)
    told = query.status(upper.number)
    assert (told.size, told.offset) == (MIB, MIB)
    limit = int(kernel.loop_attribute(upper.number, "queue/discard_max_bytes"))
    assert limit <= 65536
    lab.detach(upper)
    assert kernel.loop_binding(lower.number) == lower.binding


# --- the calls before LOOP_CONFIGURE ------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY])
def test_the_calls_before_loop_configure_come_to_the_same(lab: Lab, flags: int) -> None:
    """A6: they are still there on every kernel."""
    request: dict[str, Any] = {
        "offset": 8192,
        "size_limit": 65536,
        "sector_size": 4096,
        "reference": b"name",
        "lock": Lock.SHARED,
    }
    told = []
    for configures in (True, False):
        lab.driver.configures = configures
        device = lab.attach(lab.image(), flags, **request)
        found = status(device)
        asked = query.binding(device.number, device.binding)
        told.append(
            (
                *(found.offset, found.size_limit, found.size, change.sector_size(device)),
                *(found.read_only, found.direct_io, found.autoclear, found.partition_scan),
                asked.reference,
            )
        )
    assert told[0] == told[1]
    assert lab.script.calls.count("loop_set_fd") == 1


def test_partitions_are_made_after_the_older_calls_too(lab: Lab) -> None:
    """A6."""
    lab.driver.configures = False
    device = lab.attach(lab.gpt(), partition_scan=True)
    told = status(device)
    assert list(told.partitions) == GPT
    assert (told.size, told.size_limit, told.partition_scan) == (4 * MIB, 0, True)
