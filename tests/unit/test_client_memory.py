# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of files in memory: what is in them, and what happens to the source meanwhile."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopd import errors
from loopd.client.memory import Progress, copy_into_memory
from loopd.fd import OwnedFd
from tests.harness.asynchronous import run_async
from tests.harness.images import MIB, make_plain, pattern
from tests.unit.test_client import OBJECT, Bus, client_of


def opened(path: Path, flags: int = os.O_RDONLY) -> OwnedFd:
    return OwnedFd(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK))


def copied(source: OwnedFd, progress: Progress | None = None) -> OwnedFd:
    """A copy, made on an event loop of its own."""
    return run_async(copy_into_memory(source, progress))


def content(fd: OwnedFd) -> bytes:
    return os.pread(fd.fileno(), os.fstat(fd.fileno()).st_size, 0)


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def wait_threads() -> None:
    """Wait until no copy is under way."""
    for thread in threading.enumerate():
        if thread.name == "copy":
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _no_fd_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    wait_threads()
    assert open_fds() == before


Reading = Callable[[Callable[[], int], int], int]


@pytest.fixture
def on_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Reading], None]:
    """Have a function called in place of each read, with the read itself and its offset."""

    def replace(function: Reading) -> None:
        really = os.preadv

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            return function(lambda: really(fd, buffers, offset), offset)

        monkeypatch.setattr(os, "preadv", preadv)

    return replace


# --- what is in it ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4097, 3 * MIB + 511])
def test_the_copy_has_the_bytes_and_the_name_of_the_file(area: Path, size: int) -> None:
    """A19"""
    path = make_plain(area / "disk.img", size)
    with copied(opened(path)) as memory:
        assert content(memory) == pattern(0, size)
        assert os.readlink(f"/proc/self/fd/{memory.fileno()}") == "/memfd:disk.img (deleted)"
        assert not os.get_inheritable(memory.fileno())


@pytest.mark.parametrize("name", [b"x" * 255, b"\xff\n\x1b"])
def test_a_name_of_any_bytes_will_do(area: Path, name: bytes) -> None:
    """A19"""
    path = make_plain(Path(os.fsdecode(os.fsencode(area) + b"/" + name)), 512)
    with copied(opened(path)) as memory:
        link = os.readlink(os.fsencode(f"/proc/self/fd/{memory.fileno()}"))
        assert link == b"/memfd:" + name[:249] + b" (deleted)"


def test_what_is_written_to_the_copy_is_not_written_to_the_file(area: Path) -> None:
    """A19"""
    path = make_plain(area / "disk.img", 4096)
    with copied(opened(path)) as memory:
        os.pwrite(memory.fileno(), b"written", 0)
    assert path.read_bytes() == pattern(0, 4096)


def test_holes_stay_holes(area: Path) -> None:
    """A19"""
    path = area / "disk.img"
    with path.open("wb") as file:
        for offset in (MIB, 64 * MIB - 4096):
            file.seek(offset)
            file.write(pattern(offset, 4096))
        file.truncate(80 * MIB)
    with copied(opened(path)) as memory:
        found = os.fstat(memory.fileno())
        assert found.st_size == 80 * MIB
        assert found.st_blocks * 512 < MIB
        for offset in (MIB, 64 * MIB - 4096):
            assert os.pread(memory.fileno(), 4096, offset) == pattern(offset, 4096)
        assert os.pread(memory.fileno(), 4096, 0) == bytes(4096)


def test_what_does_not_tell_of_its_holes_is_read_whole(
    area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A19"""
    really = os.lseek

    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", lseek)
    path = make_plain(area / "disk.img", MIB + 5)
    with copied(opened(path)) as memory:
        assert content(memory) == pattern(0, MIB + 5)


def test_the_open_file_stays_where_it_was(area: Path) -> None:
    """A19"""
    with make_plain(area / "disk.img").open("rb", buffering=0) as file:
        file.seek(17)
        with copied(OwnedFd(os.dup(file.fileno()))) as memory:
            assert content(memory) == pattern(0, MIB)
        assert file.tell() == 17


def test_a_file_that_is_open_for_direct_io_can_be_copied(area: Path) -> None:
    """A19"""
    path = make_plain(area / "disk.img", MIB + 4096 + 7)
    try:
        source = opened(path, os.O_DIRECT)
    except OSError:
        pytest.skip(f"the filesystem of {area} knows no direct I/O")
    with copied(source) as memory:
        assert content(memory) == pattern(0, MIB + 4096 + 7)


# --- what cannot be copied ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_image_is_refused(area: Path, kind: str) -> None:
    """A19"""
    (area / "directory").mkdir()
    os.mkfifo(area / "fifo")
    (area / "device").symlink_to("/dev/zero")
    with pytest.raises(errors.UnsupportedFile, match="neither a regular one nor a block device"):
        copied(opened(area / kind))


def test_an_error_of_reading_is_told(area: Path, on_read: Callable[[Reading], None]) -> None:
    """A19"""

    def fail(read: Callable[[], int], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_read(fail)
    with pytest.raises(errors.ErrnoError, match=r"^copying the file into memory: Input") as told:
        copied(opened(make_plain(area / "disk.img")))
    assert told.value.errno == errno.EIO


def test_a_bug_in_the_thread_is_not_waited_for(
    area: Path, on_read: Callable[[Reading], None]
) -> None:
    def fail(read: Callable[[], int], offset: int) -> int:
        raise ZeroDivisionError

    on_read(fail)
    with pytest.raises(ZeroDivisionError):
        copied(opened(make_plain(area / "disk.img")))


# --- what changes meanwhile ---------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, MIB // 2, MIB, 2 * MIB + 100])
def test_a_file_that_shrinks_ends_the_copy(
    area: Path, on_read: Callable[[Reading], None], left: int
) -> None:
    """A19"""
    path = make_plain(area / "disk.img", 4 * MIB)
    calls: list[tuple[int, int]] = []

    def shrink(read: Callable[[], int], offset: int) -> int:
        if offset == MIB:
            os.truncate(path, left)
        return read()

    on_read(shrink)
    with copied(opened(path), lambda *call: calls.append(call)) as memory:
        assert content(memory) == pattern(0, left)
    assert calls[-1] == (left, left)


def test_what_a_file_grows_by_is_left_out(area: Path, on_read: Callable[[Reading], None]) -> None:
    """A19"""
    path = make_plain(area / "disk.img", MIB + 100)

    def grow(read: Callable[[], int], offset: int) -> int:
        with path.open("ab") as file:
            file.write(bytes(MIB))
        return read()

    on_read(grow)
    with copied(opened(path)) as memory:
        assert content(memory) == pattern(0, MIB + 100)


# --- giving up ----------------------------------------------------------------------------------


class Hang:
    """Reads that take until they are let go."""

    def __init__(self, on_read: Callable[[Reading], None]) -> None:
        self.begun = threading.Event()
        self._go = threading.Event()
        on_read(self._read)

    def _read(self, read: Callable[[], int], offset: int) -> int:
        self.begun.set()
        assert self._go.wait(30)
        return read()

    def end(self) -> None:
        """Let them go."""
        self._go.set()


async def cancel(copying: asyncio.Future[Any], hang: Hang) -> None:
    """Cancel a copy that has begun to read; it ends while the read still lasts."""
    await asyncio.to_thread(hang.begun.wait, 30)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying


def test_a_copy_that_is_given_up_waits_for_no_filesystem_and_leaves_nothing(
    area: Path, on_read: Callable[[Reading], None]
) -> None:
    """A19"""
    path, hang = make_plain(area / "disk.img", 4 * MIB), Hang(on_read)

    async def give_up() -> None:
        before = open_fds()
        await cancel(asyncio.ensure_future(copy_into_memory(opened(path))), hang)
        assert open_fds() != before  # the read lasts, and has its file
        hang.end()
        wait_threads()
        assert open_fds() == before

    run_async(give_up())


def test_a_copy_that_ends_after_its_loop_leaves_nothing(
    area: Path, on_read: Callable[[Reading], None]
) -> None:
    """A19"""
    path, hang = make_plain(area / "disk.img", 4 * MIB), Hang(on_read)

    async def give_up() -> None:
        await cancel(asyncio.ensure_future(copy_into_memory(opened(path))), hang)

    run_async(give_up())
    hang.end()


def test_a_loop_that_is_closed_under_a_copy_leaves_nothing(
    area: Path, on_read: Callable[[Reading], None]
) -> None:
    """A19"""
    path, hang = make_plain(area / "disk.img", MIB), Hang(on_read)
    loop = asyncio.new_event_loop()
    copying = loop.create_task(copy_into_memory(opened(path)))
    loop.run_until_complete(asyncio.wait([copying], timeout=0))
    assert hang.begun.wait(30)
    loop.close()
    hang.end()
    wait_threads()
    # Nobody has given up, but nobody can be told either; asyncio is not to complain of the task.
    copying.get_coro().close()
    copying._log_destroy_pending = False


def test_a_copy_that_is_there_when_it_is_given_up_is_closed(area: Path) -> None:
    """A19"""

    async def give_up() -> None:
        copying = asyncio.ensure_future(copy_into_memory(opened(make_plain(area / "disk.img"))))
        await asyncio.sleep(0)
        wait_threads()  # while the event loop stands still
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying

    run_async(give_up())


# --- progress -----------------------------------------------------------------------------------


def test_progress_is_told_on_the_event_loop_and_not_too_often(area: Path) -> None:
    """A19"""
    size = 64 * MIB
    path = make_plain(area / "disk.img", MIB)
    with path.open("r+b") as file:
        for offset in range(0, size, MIB):
            file.seek(offset)
            file.write(bytes(MIB))
    calls: list[tuple[int, int]] = []
    threads: set[int] = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.get_ident())

    begun = time.monotonic()
    copied(opened(path), progress).close()
    most = (time.monotonic() - begun) * 20 + 2
    assert len(calls) <= most
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (size, size)
    assert threads == {threading.get_ident()}


def test_progress_is_told_while_a_read_lasts(
    area: Path, on_read: Callable[[Reading], None]
) -> None:
    """A19"""
    path, hang = make_plain(area / "disk.img", 2 * MIB), Hang(on_read)
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 3:
            hang.end()

    copied(opened(path), progress).close()
    assert calls[:3] == [(0, 2 * MIB)] * 3
    assert calls[-1] == (2 * MIB, 2 * MIB)


def test_an_error_of_the_callers_own_ends_the_copy(area: Path) -> None:
    """A19"""

    def progress(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        copied(opened(make_plain(area / "disk.img")), progress)


# --- Attach -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize("direct_io", [None, True])
def test_a_copy_is_attached_never_with_direct_io(
    area: Path, by_path: bool, direct_io: bool | None
) -> None:
    """A19"""
    path = make_plain(area / "disk.img", 4096, mode=0o444)

    async def attach() -> Bus:
        bus = Bus()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        with path.open("rb") as file:
            await client_of(bus).attach(
                path if by_path else file, direct_io=direct_io, in_memory=True
            )
        return bus

    bus = run_async(attach())
    assert bus.passed_names == ["/memfd:disk.img (deleted)"]
    assert bus.passed[0].st_size == 4096
    ((_, options),) = bus.bodies
    assert {key: each.value for key, each in options.items()} == {"direct-io": False}


def test_a_copy_is_read_only_if_that_is_asked_for(area: Path) -> None:
    """A19"""

    async def attach() -> Bus:
        bus = Bus()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        await client_of(bus).attach(make_plain(area / "disk.img"), read_only=True, in_memory=True)
        return bus

    ((_, options),) = run_async(attach()).bodies
    assert {key: each.value for key, each in options.items()} == {
        "direct-io": False,
        "read-only": True,
    }
