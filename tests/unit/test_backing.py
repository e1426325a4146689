# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first look at a passed file: how it is open, what it is on, by safe calls alone."""

import ctypes
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopd.errors import UnsupportedFile
from loopd.loop import backing_file, kernel
from loopd.loop.uapi import STATX_MNT_ID, flock64


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))
    return path


@pytest.fixture
def opened() -> Iterator[list[int]]:
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    "flags",
    [
        0,
        os.O_NONBLOCK,
        os.O_NOFOLLOW,
        os.O_CLOEXEC,
        os.O_NOATIME,
        os.O_DIRECT,
        os.O_SYNC,
        os.O_DSYNC,
        os.O_LARGEFILE,
    ],
)
@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_RDWR])
def test_ordinary_ways_to_open_are_accepted(
    image: Path, opened: list[int], access: int, flags: int
) -> None:
    opened.append(os.open(image, access | flags))
    file = backing_file.examine(opened[0])
    assert file.writable is (access == os.O_RDWR)
    status = image.stat()
    assert (file.identity.device, file.identity.inode) == (status.st_dev, status.st_ino)
    assert file.size == 8192


def test_a_temporary_file_without_a_name_is_accepted(tmp_path: Path, opened: list[int]) -> None:
    opened.append(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    assert backing_file.examine(opened[0]).writable


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (os.O_WRONLY, "writing only"),
        (os.O_RDWR | os.O_APPEND, "O_APPEND"),
        (os.O_RDONLY | os.O_APPEND, "O_APPEND"),
        (os.O_PATH, "O_PATH"),
    ],
)
def test_a_way_to_open_that_would_give_more_rights_is_refused(
    image: Path, opened: list[int], flags: int, words: str
) -> None:
    """Rights of an fd."""
    opened.append(os.open(image, flags))
    with pytest.raises(UnsupportedFile, match=words):
        backing_file.examine(opened[0])


def test_a_flag_that_nobody_thought_of_is_refused(
    image: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights of an fd."""
    opened.append(os.open(image, os.O_RDWR | os.O_NOATIME))
    monkeypatch.setattr(backing_file, "_ALLOWED_FLAGS", backing_file._ALLOWED_FLAGS & ~os.O_NOATIME)
    with pytest.raises(UnsupportedFile, match="not allowed"):
        backing_file.examine(opened[0])


def test_what_is_no_file_is_refused(tmp_path: Path, opened: list[int]) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened += [
        os.open(tmp_path, os.O_RDONLY),
        os.open(fifo, os.O_RDWR),
        os.open("/dev/null", os.O_RDWR),
        socket.socket().detach(),
        os.eventfd(0),
        os.pidfd_open(os.getpid()),
        *os.pipe(),
    ]
    for fd in opened:
        with pytest.raises(UnsupportedFile):
            backing_file.examine(fd)


@pytest.mark.parametrize("path", ["/proc/self/maps", "/proc/cpuinfo", "/sys/kernel/uevent_seqnum"])
def test_files_of_the_kernels_own_making_are_refused(path: str, opened: list[int]) -> None:
    opened.append(os.open(path, os.O_RDONLY))
    with pytest.raises(UnsupportedFile, match=r"files on (proc|sysfs) cannot"):
        backing_file.examine(opened[0])


def test_a_memfd_is_on_tmpfs_although_no_mount_shows_it(opened: list[int]) -> None:
    opened.append(os.memfd_create("x", os.MFD_ALLOW_SEALING))
    file = backing_file.examine(opened[0])
    assert (file.filesystem, file.writable, file.sealed) == ("tmpfs", True, False)


MFD_HUGETLB = 4
SYS_MEMFD_SECRET = 447


def of_huge_pages() -> int:
    return os.memfd_create("x", MFD_HUGETLB)


def of_secret_memory() -> int:
    fd = int(ctypes.CDLL(None, use_errno=True).syscall(SYS_MEMFD_SECRET, 0))
    if fd < 0:
        pytest.skip(f"this kernel makes no secret memory: {os.strerror(ctypes.get_errno())}")
    return fd


def of_huge_pages_to_read() -> int:
    fd = of_huge_pages()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (of_huge_pages, "hugetlbfs"),
        (of_huge_pages_to_read, "hugetlbfs"),
        (of_secret_memory, "only be mapped"),
    ],
)
def test_memory_that_cannot_be_read_and_written_is_refused(
    make: Callable[[], int], words: str, opened: list[int]
) -> None:
    """Odd memfds: although they are regular files."""
    opened.append(make())
    with pytest.raises(UnsupportedFile, match=words):
        backing_file.examine(opened[0])


# Locks of others


def locked(fd: int, kind: int, start: int, length: int, command: int = fcntl.F_OFD_SETLK) -> None:
    fcntl.fcntl(fd, command, bytes(flock64(l_type=kind, l_start=start, l_len=length)))


NONE, READER, WRITER = backing_file.Lock.NONE, backing_file.Lock.READER, backing_file.Lock.WRITER


@pytest.mark.parametrize(
    ("locks", "found"),
    [
        ([], NONE),
        # As QEMU has them: of what it does from 100 on, of what nobody else may from 200 on.
        ([(fcntl.F_RDLCK, 100, 2), (fcntl.F_RDLCK, 201, 1), (fcntl.F_RDLCK, 203, 1)], READER),
        ([(fcntl.F_RDLCK, 101, 1)], READER),
        ([(fcntl.F_RDLCK, 100, 1), (fcntl.F_RDLCK, 201, 1), (fcntl.F_RDLCK, 203, 1)], NONE),
        ([(fcntl.F_WRLCK, 0, 0)], WRITER),
        ([(fcntl.F_WRLCK, 1 << 40, 1)], WRITER),
        ([(fcntl.F_RDLCK, 0, 0)], NONE),  # a reader of the whole
    ],
)
def test_a_lock_of_a_writer_is_seen(
    image: Path, opened: list[int], locks: list[tuple[int, int, int]], found: backing_file.Lock
) -> None:
    """Locked by others."""
    opened += [os.open(image, os.O_RDWR), os.open(image, os.O_RDWR)]
    for lock in locks:
        locked(opened[1], *lock)
    for mode in (0o600, 0o660, 0o666, 0o644, 0o664, 0o640):
        image.chmod(mode)
        # A shared lock is a writer's where every user who can read the file can write it.
        certain = mode in (0o600, 0o660, 0o666)
        expected = WRITER if found is READER and certain else found
        assert backing_file.examine(opened[0]).lock is expected, oct(mode)
        assert backing_file.lock_of(opened[0]) is expected, oct(mode)


def test_a_lock_of_ones_own_is_in_nobodys_way(image: Path, opened: list[int]) -> None:
    opened += [os.open(image, os.O_RDWR), os.open(image, os.O_RDWR)]
    locked(opened[0], fcntl.F_WRLCK, 0, 0)
    assert backing_file.examine(opened[0]).lock is NONE
    locked(opened[0], fcntl.F_UNLCK, 0, 0)
    locked(opened[1], fcntl.F_WRLCK, 0, 0, fcntl.F_SETLK)  # of the process, whatever the fd
    assert backing_file.examine(opened[0]).lock is NONE


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, backing_file.F_SEAL_FUTURE_WRITE])
def test_a_memfd_sealed_against_writing_is_not_writable(seal: int, opened: list[int]) -> None:
    """Rights of an fd."""
    opened.append(os.memfd_create("x", os.MFD_ALLOW_SEALING))
    fcntl.fcntl(opened[0], fcntl.F_ADD_SEALS, seal)
    file = backing_file.examine(opened[0])
    assert (file.writable, file.sealed) == (False, True)


def test_the_filesystem_is_the_one_that_findmnt_names(image: Path, opened: list[int]) -> None:
    opened.append(os.open(image, os.O_RDONLY))
    said = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", image], capture_output=True, text=True, check=True
    )
    assert backing_file.examine(opened[0]).filesystem == said.stdout.strip()


def test_before_linux_5_8_the_fd_tells_its_mount(
    image: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.append(os.open(image, os.O_RDONLY))
    told = backing_file.examine(opened[0])
    statx = kernel.statx

    def older(*args: Any) -> Any:
        buf = statx(*args)
        assert buf.stx_mask & STATX_MNT_ID
        buf.stx_mask &= ~STATX_MNT_ID
        buf.stx_mnt_id = 0
        return buf

    monkeypatch.setattr(kernel, "statx", older)
    # Not by the device number, which is what is left otherwise.
    monkeypatch.setattr(backing_file.os, "minor", lambda _: 0xFFFFF)
    assert backing_file.examine(opened[0]) == told


def test_a_file_is_looked_at_without_a_call_that_may_hang(image: Path) -> None:
    """Hanging files."""
    program = (
        "import os, sys; from loopd.loop import backing_file; "
        "fd = os.open(sys.argv[1], os.O_RDWR); "
        "os.write(2, b'MARK'); backing_file.examine(fd); os.write(2, b'MARK')"
    )
    traced = subprocess.run(
        ["strace", "-y", sys.executable, "-c", program, image],
        capture_output=True,
        text=True,
        check=True,
    )
    looked = traced.stderr.split("MARK")[1:-1]
    calls = [line for line in "".join(looked).splitlines() if str(image) in line]
    names = {line.partition("(")[0] for line in calls}
    assert names == {"fcntl", "statx", "preadv2", "fallocate"}
    # No bytes, and none that there are: the kernel answers these before it asks the filesystem.
    assert [line.partition(", ")[2] for line in calls if line.startswith("preadv2")] == [
        '[{iov_base="", iov_len=0}], 1, 0, 0) = 0'
    ]
    assert all("EFBIG" in line for line in calls if line.startswith("fallocate"))
    assert all("AT_STATX_DONT_SYNC" in line for line in calls if line.startswith("statx"))


@pytest.mark.parametrize(
    ("mode", "guard"),
    [
        (0o644, ""),
        (0o1777, ""),
        (0o2664, ""),  # which nobody gets a group's rights by
        (0o2674, "set-group-ID"),
        (0o4600, "set-user-ID"),
        (0o6775, "set-user-ID"),
    ],
)
def test_a_file_with_set_id_bits_is_guarded(
    image: Path, opened: list[int], mode: int, guard: str
) -> None:
    """Guarded files."""
    image.chmod(mode)
    opened.append(os.open(image, os.O_RDONLY))
    assert backing_file.examine(opened[0]).guarded_by == backing_file.guarded_by(opened[0]) == guard
    image.chmod(0o644)
    assert backing_file.guarded_by(opened[0]) == ""


def test_only_local_files_are_sure_to_close_at_once(image: Path, opened: list[int]) -> None:
    opened += [os.open(image, os.O_RDONLY), os.memfd_create("x")]
    assert all(backing_file.closes_quickly(fd) for fd in opened)
    others = [
        socket.socket().detach(),
        *os.pipe(),
        os.open("/dev/null", os.O_RDWR),
        os.open("/proc/self/maps", os.O_RDONLY),
    ]
    opened += others
    assert not any(backing_file.closes_quickly(fd) for fd in others)
