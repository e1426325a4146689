# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that others use in ways that a loop device would spoil, and memory that is no file."""

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from loopd.loop.uapi import flock64
from tests.harness import loops
from tests.harness.area import area as make_area
from tests.harness.bus import LOOPD
from tests.harness.loopctl import Loopctl, copy_package, one_sentence
from tests.harness.polkit import Answer
from tests.harness.wire import CallError
from tests.harness.world import World, make_world

ATTACH = "org.example.loop1.attach"
UNSUPPORTED = f"{LOOPD}.Error.UnsupportedFile"
OVERLAP = f"{LOOPD}.Error.Overlap"
MFD_HUGETLB = 4
SYS_MEMFD_SECRET = 447


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with make_world() as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def not_attached(world: World, image: Path) -> None:
    assert not [each for each in loops.bound_loops().values() if each.backing_file == str(image)]
    assert world.device_count() == 0


# Swap files


@contextmanager
def swapped_to(path: Path) -> Iterator[None]:
    for command in ("mkswap", "swapon"):
        subprocess.run([command, path], check=True, capture_output=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["swapoff", path], check=True, timeout=60)


@pytest.mark.parametrize("user", ["root", "user"])
def test_an_active_swap_file_is_refused_while_it_is_one(world: World, user: str) -> None:
    """Active swap files."""
    caller = world.caller(None) if user == "root" else world.caller()
    image = world.image(owner=None, mode=0o600)
    with opened(image) as fd:
        with swapped_to(image):
            world.polkit.questions.clear()
            for read_only in (False, True):
                with pytest.raises(CallError, match="swapoff") as refusal:
                    caller.attach(fd, read_only=read_only)
                assert refusal.value.name == UNSUPPORTED
            assert world.polkit.questions == []
            not_attached(world, image)
            # Who can only read it does no harm.
            with opened(image, os.O_RDONLY) as readable:
                assert caller.detach(caller.attach(readable).path) is True
        assert caller.detach(caller.attach(fd).path) is True


# Locks


def lock(fd: int, kind: int, start: int = 0, length: int = 0) -> None:
    lock = flock64(l_type=kind, l_start=start, l_len=length)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, bytes(lock))


def as_qemu(fd: int) -> None:
    """What it locks of a disk that it writes to."""
    lock(fd, fcntl.F_RDLCK, 100, 2)
    for byte in (201, 203):
        lock(fd, fcntl.F_RDLCK, byte, 1)


def whole(fd: int) -> None:
    lock(fd, fcntl.F_WRLCK)


@pytest.mark.parametrize("take", [as_qemu, whole])
def test_a_file_that_its_writer_has_locked_is_an_overlap(
    world: World, take: Callable[[int], None]
) -> None:
    """Locked by others."""
    caller, image = world.caller(), world.image()
    with opened(image) as theirs:
        take(theirs)
        world.polkit.questions.clear()
        with pytest.raises(CallError, match="allow-overlap") as refusal:
            caller.attach(image)
        assert refusal.value.name == OVERLAP
        assert world.polkit.questions == []
        for options in ({"allow_overlap": True}, {"read_only": True}):
            assert caller.detach(caller.attach(image, **options).path) is True
        lock(theirs, fcntl.F_UNLCK)
        assert caller.detach(caller.attach(image).path) is True


def test_a_user_who_may_only_read_a_file_keeps_root_from_it_by_no_lock(world: World) -> None:
    """Locked by others."""
    root, image = world.caller(None), world.image(owner=None, mode=0o644)
    with opened(image, os.O_RDONLY) as readers:
        as_qemu(readers)
        assert root.detach(root.attach(image).path) is True
        image.chmod(0o600)
        with pytest.raises(CallError, match="allow-overlap"):
            root.attach(image)


@pytest.mark.parametrize("use", ["locked", "swapped to"])
def test_a_use_that_comes_while_polkit_thinks_is_seen(world: World, use: str) -> None:
    """Locked by others; Active swap files."""
    caller, image = world.caller(), world.image()
    with opened(image) as theirs, ExitStack() as stack:
        world.polkit.on(ATTACH, Answer.HANG)
        call = caller.attach_begin(image)
        world.polkit.wait_question()
        if use == "locked":
            as_qemu(theirs)
        else:
            stack.enter_context(swapped_to(image))
        world.polkit.release(Answer.ALLOW)
        with pytest.raises(CallError) as refusal:
            call.end()
        assert refusal.value.name == (OVERLAP if use == "locked" else UNSUPPORTED)
        not_attached(world, image)


# Memory


def of_huge_pages() -> int:
    return os.memfd_create("x", MFD_HUGETLB)


def of_secret_memory() -> int:
    fd = int(ctypes.CDLL(None, use_errno=True).syscall(SYS_MEMFD_SECRET, 0))
    if fd < 0:
        pytest.skip(f"this kernel makes no secret memory: {os.strerror(ctypes.get_errno())}")
    return fd


@pytest.mark.parametrize("make", [of_huge_pages, of_secret_memory])
@pytest.mark.parametrize("user", ["root", "user"])
def test_memory_that_cannot_be_read_and_written_is_refused(
    world: World, make: Callable[[], int], user: str
) -> None:
    """Odd memfds."""
    caller = world.caller(None) if user == "root" else world.caller()
    fd = make()
    try:
        os.truncate(fd, 1 << 21)
        world.polkit.questions.clear()
        for read_only in (False, True):
            with pytest.raises(CallError, match="file") as refusal:
                caller.attach(fd, read_only=read_only)
            assert refusal.value.name == UNSUPPORTED
        assert world.polkit.questions == []
    finally:
        os.close(fd)


# loopctl


def test_loopctl_says_what_to_do_about_a_program_that_runs(world: World) -> None:
    program = world.new_path()
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o755)
    with (
        make_area("package") as directory,
        subprocess.Popen([program], stdin=subprocess.PIPE) as running,
    ):
        loopctl = Loopctl(world.bus, copy_package(directory), world.files)
        status, out, err = loopctl.run("run", program, "--", "true", user="root")
        assert (status, out) == (125, "")
        assert one_sentence(err)
        assert "Text file busy" in err
        assert "-r attaches it read-only" in err
        assert loopctl.run("run", "-r", program, "--", "true", user="root") == (0, "", "")
        running.communicate()
