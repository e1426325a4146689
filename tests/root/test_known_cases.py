# SPDX-License-Identifier: LGPL-2.1-or-later
"""What went wrong in other programs of this kind, where it takes a whole system to try it.

docs/known-cases.md lists all of the cases, and the tests of those that have them elsewhere.
"""

import fcntl
import os
import pwd
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from loopd.loop import partition_table
from tests.harness import loops
from tests.harness.area import area as make_area
from tests.harness.caller import MANAGER, MANAGER_PATH, Attached
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_gpt, make_plain, memfd
from tests.harness.polkit import RULES_NONE
from tests.harness.process import Process
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World, make_world

LOOP_CHANGE_FD = 0x4C06
AT_ONCE = 5.0
"""Seconds that a busy machine may take for what takes some milliseconds."""


def is_bound(attached: Attached) -> bool:
    return loops.loop_is_bound(attached.number, attached.diskseq)


# --- what loopd calls ----------------------------------------------------------------------------

PATHS = "open,openat,openat2,open_by_handle_at,creat,truncate,chroot,link,linkat,symlink,symlinkat"
PATHS += ",rename,renameat,renameat2,unlink,unlinkat,mknod,mknodat,chmod,fchmodat,chown,fchownat"
MOUNTS = "mount,umount2,move_mount,open_tree,fsopen,fsconfig,fsmount,fspick,mount_setattr"
MOUNTS += ",pivot_root,swapon,unshare,setns"
TRACED = f"execve,execveat,read,pread64,readv,preadv,preadv2,mmap,{PATHS},{MOUNTS}"
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")


@contextmanager
def traced(pid: int) -> Iterator[list[tuple[str, str]]]:
    """Note what a process calls, and all that it starts; the list is filled at the end."""
    calls: list[tuple[str, str]] = []
    with make_area("trace") as directory:
        file = directory / "trace"
        command = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={TRACED}", "-o", file]
        deadline = Deadline()
        with Process([*command, "-p", str(pid)], name="strace") as strace:
            while "attached" not in strace.log.text:
                assert deadline.remaining, strace.log.text
                assert strace.status is None, strace.log.text
            yield calls
        found = map(CALL.match, file.read_text(errors="replace").splitlines())
        calls += [(each[1], each[2]) for each in found if each]


def of_image(arguments: str, image: str) -> bool:
    """Whether the first argument is an fd on a loop device or on the image."""
    return bool(re.match(rf"\d+<(/dev/loop\d|{re.escape(image)})", arguments))


def test_loopd_mounts_nothing_runs_nothing_and_opens_no_path_of_a_client(world: World) -> None:
    """CVE-2025-6019, GHSA-qq4x-vfq4-9h9g: a trace of all that is done for a user's image."""
    caller = world.caller(USER)
    image = make_gpt(world.new_path(), [(2048, 2048), (8192, 2048)], size=64 * MIB, owner=USER)
    bystander = world.image()
    with traced(world.daemon.pid) as calls:
        attached = caller.attach(image, partition_scan=True)
        # In this order: when a disk that was open for writing is closed, udev has the kernel look
        # for partitions, and one without a parser finds none.
        for partition in ({"partition": 1}, {}):
            caller.open_device(attached.path, "rw", partition).close()
        # What loopd would open by the path now is another file.
        image.rename(image.with_name("moved"))
        image.symlink_to(bystander)
        os.truncate(image.with_name("moved"), 65 * MIB)
        caller.resize(attached.path)
        caller.resize(attached.path, size_limit=16 * MIB)
        for member, signature, *args in (
            ("Sync", "a{sv}", {}),
            ("RescanPartitions", "a{sv}", {}),
            ("SetDirectIO", "ba{sv}", False, {}),
            ("SetReference", "sa{sv}", "name", {}),
            ("SetSectorSize", "ua{sv}", 0, {}),
            ("Lock", "sa{sv}", "shared", {}),
        ):
            caller.device(attached.path, member, signature, *args)
        moved = image.with_name("moved")
        assert caller.manager("GetDevice", "h", 0, fds=[moved]) == (attached.path,)
        with pytest.raises(CallError, match="Overlap"):
            caller.attach(moved)
        assert caller.manager("Detach", "ha{sv}", 0, {}, fds=[moved]) == (True,)
    names = {name for name, _ in calls}
    assert names & set(MOUNTS.split(",")) == set()
    opened = [arguments for name, arguments in calls if name in PATHS.split(",")]
    assert [each for each in opened if f"/dev/loop{attached.number}" in each]  # it does see them
    assert [each for each in opened if str(world.files) in each] == []
    run = [arguments for name, arguments in calls if name.startswith("execve")]
    assert run  # of the table's reader
    assert [each for each in run if str(partition_table._READER) not in each] == []
    # Of the image no more than where partition tables are.
    results = [
        int(arguments.rpartition(" = ")[2])
        for name, arguments in calls
        if "read" in name and of_image(arguments, str(world.files)) and ") = " in arguments
    ]
    assert results
    assert sum(results) < 512 * 1024
    assert [each for name, each in calls if name == "mmap" and "/dev/loop" in each] == []


# --- locks, and files that are swapped ------------------------------------------------------------


def test_a_lock_that_a_dead_client_left_is_in_nobodys_way(world: World) -> None:
    """Locked for ever: an fd of the device holds its flock after detach and the client's end."""
    holder, other = world.caller(USER), world.caller(OTHER)
    attached = holder.attach(world.image())
    opened = holder.open_device(attached.path, "r")
    fd = opened.fetch()  # somebody else has it, too
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert holder.detach(attached.path) is False
        holder.kill()
        for scan in (False, True, False):
            call = other.attach_begin(world.image(owner=OTHER), partition_scan=scan)
            following = Attached(*call.end(AT_ONCE))
            loops.used_numbers.add(following.number)
            assert following.number != attached.number
            assert other.detach(following.path) is True
        assert is_bound(attached)
    finally:
        os.close(fd)
    loops.wait_unbound(attached.number, attached.diskseq)


@contextmanager
def appending(world: World) -> Iterator[int]:
    fd = os.open(make_plain(world.new_path()), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def on_fuse(world: World) -> Iterator[int]:
    with Fuse() as fuse:
        fd = os.open(fuse.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


@pytest.mark.parametrize("swap_in", [appending, on_fuse])
def test_a_file_that_was_swapped_in_changes_nothing_about_whose_device_it_is(
    world: World, swap_in: Callable[[World], AbstractContextManager[int]]
) -> None:
    """LOOP_CHANGE_FD: it is counted, listed and detached as before, and no more than it was."""
    caller, other = world.caller(USER), world.caller(OTHER)
    image = world.image(mode=0o666)
    attached = caller.attach(image, "r")
    with swap_in(world) as file:
        opened = caller.open_device(attached.path, "r")
        fd = opened.fetch()
        opened.close()
        try:
            fcntl.ioctl(fd, LOOP_CHANGE_FD, file)
            loop = loops.look_at(attached.number)
            assert loop
            assert loop.diskseq > attached.diskseq
            told = caller.get_all(attached.path)
            assert (told["Owner"], told["ReadOnly"]) == (pwd.getpwnam(USER).pw_uid, True)
            assert told["Diskseq"] == attached.diskseq
            assert world.device_count() == 1
            with pytest.raises(CallError, match="read-only"):
                caller.open_device(attached.path, "rw")
            served = Attached(*other.attach_begin(world.image(owner=OTHER)).end(AT_ONCE))
            loops.used_numbers.add(served.number)
            assert other.detach(served.path) is True
            # It is known by the file that was checked, and not by what is behind it now.
            fds = [image]
            assert caller.manager("GetDevice", "h", 0, fds=fds) == (attached.path,)
            assert caller.detach(attached.path) is False
        finally:
            os.close(fd)
        caller.wait_signal("InterfacesRemoved", lambda each: each.args[0] == attached.path)
        assert not loops.loop_is_bound(attached.number, loop.diskseq)
    assert world.device_count() == 0


# --- who is asking -------------------------------------------------------------------------------

HIGH = 4_000_000_000


def test_a_uid_that_polkit_cannot_look_up_is_refused() -> None:
    """CVE-2018-19788: above the signed numbers, and with no account as far as polkit sees."""
    with make_world(authority=RULES_NONE, accounts=[HIGH]) as world, world.test():
        client = world.raw(HIGH)
        with memfd() as fd:
            for flags in (0, 4):
                with pytest.raises(CallError) as refusal:
                    client.call(
                        *(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}]), fds=[fd], flags=flags
                    )
                assert refusal.value.name.rpartition(".")[2] in (
                    "AccessDenied",
                    "InteractiveAuthorizationRequired",
                )
        assert world.device_count() == 0
