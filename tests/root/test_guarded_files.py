# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files whose kernel-kept guards an ordinary user's writes heed and the loop driver's do not.

write(2) takes the set-id bits from a file, and fallocate(2) refuses to make holes in one that is
append-only or immutable, also by an fd from before. A worker of the driver's is root, and skips
both checks. The rest is what it does heed.
"""

import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.bus import LOOPD
from tests.harness.images import MIB, memfd, pattern
from tests.harness.polkit import Answer
from tests.harness.wire import CallError
from tests.harness.world import World

UNSUPPORTED = f"{LOOPD}.Error.UnsupportedFile"
ATTACH = "org.example.loop1.attach"
BLKDISCARD = 0x1277
# struct vfs_cap_data, revision 2: CAP_NET_RAW, permitted and effective.
NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)

GUARDS = {
    "set-user-ID": 0o4755,
    "set-group-ID": 0o2775,
    "both": 0o6775,
    "set-user-ID, not executable": 0o4644,
    "append-only": "a",
    "immutable": "i",
}


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    return {}


@contextmanager
def guarded(path: Path, guard: str) -> Iterator[None]:
    """Give a file the guard until the end of the block."""
    what = GUARDS[guard]
    if isinstance(what, int):
        path.chmod(what)
        yield
        return
    subprocess.run(["chattr", f"+{what}", path], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{what}", path], check=True, timeout=60)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """An fd from before the guard."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def on_node(node: str, change: Callable[[int], object]) -> None:
    """Change what is on a device as its user could."""
    with opened(Path(node)) as fd:
        change(fd)
        os.fsync(fd)


def discard(fd: int) -> None:
    fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", 0, 64 * 1024))


def write(fd: int) -> None:
    os.pwrite(fd, b"w" * 4096, 0)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_users_device_never_writes_to_a_file_that_is_guarded(world: World, guard: str) -> None:
    """Guarded files."""
    user, root = world.caller(), world.caller(None)
    image = world.image(owner=None, mode=0o666)
    with opened(image) as fd, guarded(image, guard):
        world.polkit.questions.clear()
        for mapping in ({}, {"read-only": False}):
            with pytest.raises(CallError, match="read-only") as refusal:
                user.attach(fd, mapping=mapping)
            assert refusal.value.name == UNSUPPORTED
        assert world.polkit.questions == []  # nobody is asked for a password for that
        attached = user.attach(fd, read_only=True)
        assert user.get(attached.path, "ReadOnly") is True
        assert user.detach(attached.path) is True
        attached = root.attach(fd)
        assert root.get(attached.path, "ReadOnly") is False
        assert root.detach(attached.path) is True


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_comes_while_polkit_thinks_is_seen(world: World, guard: str) -> None:
    """Guarded files."""
    user = world.caller()
    image = world.image(owner=None, mode=0o666)
    with opened(image) as fd, ExitStack() as stack:
        world.polkit.on(ATTACH, Answer.HANG)
        call = user.attach_begin(fd)
        world.polkit.wait_question()
        stack.enter_context(guarded(image, guard))
        world.polkit.release(Answer.ALLOW)
        with pytest.raises(CallError, match="read-only") as refusal:
            call.end()
        assert refusal.value.name == UNSUPPORTED
        assert not [
            each for each in loops.bound_loops().values() if each.backing_file == str(image)
        ]
        assert world.device_count() == 0


def test_the_mark_of_a_group_that_nobody_gets_by_it_is_no_guard(world: World) -> None:
    user = world.caller()
    image = world.image(mode=0o2664)
    image.chmod(0o2664)
    assert user.detach(user.attach(image).path) is True


@pytest.mark.parametrize("guard", GUARDS)
def test_what_the_refusal_is_for(world: World, guard: str) -> None:
    """Guarded files: where this fails the driver has learned to look, and nothing is to be refused
    any more.
    """
    root = world.caller(None)
    image = world.image(owner=None)
    with opened(image) as fd, guarded(image, guard):
        attached = root.attach(fd, direct_io=False)
        if isinstance(GUARDS[guard], int):
            on_node(attached.node, write)
            assert image.read_bytes()[:4096] == b"w" * 4096
            assert stat.S_IMODE(image.stat().st_mode) == GUARDS[guard]
        else:
            on_node(attached.node, discard)
            assert image.read_bytes()[: 64 * 1024] == bytes(64 * 1024)
        assert root.detach(attached.path) is True


# What the driver heeds


def test_file_capabilities_go_with_the_first_write(world: World) -> None:
    """Guarded files."""
    user = world.caller()
    image = world.image()
    os.setxattr(image, "security.capability", NET_RAW)
    attached = user.attach(image, direct_io=False)
    assert os.listxattr(image) == ["security.capability"]
    on_node(attached.node, write)
    assert os.listxattr(image) == []
    assert user.detach(attached.path) is True


def test_an_immutable_file_is_not_written_to(world: World) -> None:
    """Guarded files: one that became so after it was attached."""
    user = world.caller()
    image = world.image()
    attached = user.attach(image, direct_io=False)
    with guarded(image, "immutable"), pytest.raises(OSError, match="Input/output error"):
        on_node(attached.node, write)
    assert image.read_bytes() == pattern(0, MIB)
    assert user.detach(attached.path) is True


@pytest.mark.parametrize("change", [write, discard])
def test_a_memfd_that_is_sealed_later_is_not_written_to(
    world: World, change: Callable[[int], object]
) -> None:
    """Guarded files."""
    user = world.caller()
    with memfd(MIB, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) as fd:
        before = os.pread(fd, MIB, 0)
        attached = user.attach(fd, direct_io=False)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with pytest.raises(OSError, match=r"Input/output error|Remote I/O|not permitted"):
            on_node(attached.node, change)
        assert os.pread(fd, MIB, 0) == before
        assert user.detach(attached.path) is True


def test_a_program_that_is_attached_writably_is_not_run(world: World) -> None:
    """Guarded files."""
    user = world.caller()
    image = world.image(mode=0o755)
    attached = user.attach(image)
    with pytest.raises(OSError, match="Text file busy"):
        subprocess.run([image], check=False)
    assert user.detach(attached.path) is True
