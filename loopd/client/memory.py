# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies a file into memory, to be attached in its place; in a thread, and to be given up any time.

Of the source it knows an fd only. What nobody waits for any more is closed by whoever has it.
"""

import asyncio
import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from loopd import errors
from loopd.fd import OwnedFd
from loopd.loop import kernel

_T = TypeVar("_T")

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in all."""

_CHUNK = 1 << 20
_INTERVAL = 0.05  # seconds between two calls of a Progress
_BLOCK = 4096
_MAX_NAME = 249  # of a memfd, in bytes


async def copy_into_memory(source: OwnedFd, progress: Progress | None = None) -> OwnedFd:
    """Copy a regular file or a block device into a memfd of its name and size.

    Takes the source over; the position of its open file is kept. Holes stay holes where the
    filesystem tells of them. `progress` is called on the event loop, at most 20 times a second and
    once in the end. What the source grows by meanwhile is left out; where it shrinks, the copy
    ends, too.

    Raises UnsupportedFile for any other kind of file, and ErrnoError.
    """
    copy = _Copy(source)
    copied: asyncio.Future[OwnedFd] = asyncio.get_running_loop().create_future()
    # Not one that the end of the program waits for: the source's filesystem may hang.
    threading.Thread(target=copy.run, args=[copied], name="copy", daemon=True).start()
    try:
        while not copied.done():
            await asyncio.wait([copied], timeout=_INTERVAL if progress else None)
            if progress and copy.total is not None:
                progress(copy.done, copy.total)
        return copied.result()
    except BaseException:
        copy.given_up = True
        copied.add_done_callback(_close)
        raise


def _close(copied: asyncio.Future[OwnedFd]) -> None:
    if copied.exception() is None:
        copied.result().close()


class _Copy:
    """What the thread of one copy does, and what both sides look at."""

    def __init__(self, source: OwnedFd) -> None:
        self._source = source
        self.total: int | None = None
        self.done = 0
        self.given_up = False

    def run(self, copied: asyncio.Future[OwnedFd]) -> None:
        """Copy, and hand over what came of it."""
        try:
            memory = self._copy()
        except Exception as exc:  # noqa: BLE001 - raised again by whoever waits
            self._hand_over(copied, copied.set_exception, exc)
            return
        if not self._hand_over(copied, copied.set_result, memory):
            memory.close()

    def _hand_over(
        self, copied: asyncio.Future[OwnedFd], setter: Callable[[_T], None], outcome: _T
    ) -> bool:
        """Set a result or an error on the event loop; false if nobody is there to get it."""
        if self.given_up:
            return False
        try:
            copied.get_loop().call_soon_threadsafe(setter, outcome)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _copy(self) -> OwnedFd:
        with self._source as source:
            try:
                return self._copy_file(source.fileno())
            except OSError as exc:
                raise errors.from_os_error(exc, "copying the file into memory") from exc

    def _copy_file(self, source_fd: int) -> OwnedFd:
        kind = stat.S_IFMT(os.fstat(source_fd).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFBLK):
            raise errors.UnsupportedFile("the file is neither a regular one nor a block device")
        with OwnedFd(os.memfd_create(_name(source_fd), os.MFD_CLOEXEC)) as memory:
            self.total = size = _size(source_fd, kind)
            os.ftruncate(memory.fileno(), size)
            if kind == stat.S_IFBLK:
                # It cannot tell, and lseek(2) on it would wait for others who read it.
                self._copy_data(source_fd, memory.fileno(), [(0, size)])
            else:
                with _position_kept(source_fd):
                    self._copy_data(source_fd, memory.fileno(), _data(source_fd, size))
            left = _size(source_fd, kind)
            if left < size:
                os.ftruncate(memory.fileno(), left)
            self.done = self.total = min(left, size)
            return memory.move()

    def _copy_data(self, source_fd: int, memory_fd: int, parts: Iterable[tuple[int, int]]) -> None:
        buffer = memoryview(mmap.mmap(-1, _CHUNK))
        for start, end in parts:
            self.done = start
            while self.done < end:
                if self.given_up:
                    return
                # Whole blocks into whole pages: the source may be open with O_DIRECT.
                wanted = min(_CHUNK, -(-(end - self.done) // _BLOCK) * _BLOCK)
                found = os.preadv(source_fd, [buffer[:wanted]], self.done)
                if found == 0:  # it has shrunk
                    break
                found = min(found, end - self.done)
                _write(memory_fd, buffer[:found], self.done)
                self.done += found


def _name(fd: int) -> str:
    """The name of an open file, as far as a memfd can have it."""
    path = os.readlink(b"/proc/self/fd/%d" % fd)
    return os.fsdecode(os.path.basename(path)[:_MAX_NAME])


def _size(fd: int, kind: int) -> int:
    return kernel.blkgetsize64(fd) if kind == stat.S_IFBLK else os.fstat(fd).st_size


@contextlib.contextmanager
def _position_kept(fd: int) -> Iterator[None]:
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        yield
    finally:
        os.lseek(fd, position, os.SEEK_SET)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data, from here to there, as far as its filesystem tells."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole is left
                return
            if exc.errno != errno.EINVAL:  # it cannot tell
                raise
            start, end = end, size
        yield min(start, size), min(end, size)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
