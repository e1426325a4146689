# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd hears of a service over its notify socket, and the fds that it keeps for it.

The rules are systemd's: what does not fit is dropped without a word, so is a second fd on the same
open file; an fd that hangs up is let go of unless FDPOLL=0 came with it; a BARRIER=1 is answered
when all before it has been dealt with, and what was taken out is closed a little after that.
"""

import array
import ctypes
import errno
import os
import platform
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.harness.area import area
from tests.harness.deadline import Deadline

# Linux' own number for it: the C library has no wrapper.
_KCMP = {"x86_64": 312, "aarch64": 272}[platform.machine()]
_KCMP_FILE = 0
_MAX_FDS = 253
_LATE = 0.003
"""Seconds after a barrier that newer systemds were seen to close what had been taken out."""
_NOTICE = "X-LOOPD-TESTS-NOTICE="

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(eq=False)
class Stored:
    """One fd in the store."""

    name: str
    fd: int
    polled: bool = True


class FdStore:
    """A notify socket with an fd store behind it, served by a thread in a `with` block."""

    def __init__(self, maximum: int = 4096) -> None:
        """Keep so many fds (FileDescriptorStoreMax)."""
        self.maximum = maximum
        self.said: list[str] = []
        """What was said that has nothing to do with fds, in its order."""
        self.complaints: list[str] = []
        """What systemd would have warned of, dropped fds among it."""
        self._stored: list[Stored] = []
        self._closing: list[int] = []
        self._close_at = 0.0
        self._changed = threading.Condition()
        self._noticed = 0
        self._notices = 0

    def __enter__(self) -> Self:
        self._area = area("notify")
        path = self._area.__enter__() / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self._wake = os.pipe()
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)
        self._epoll.register(self._wake[0], select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name="fd store")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.write(self._wake[1], b"x")
        self._thread.join()
        self.drop()
        self._close_taken_out()
        self._epoll.close()
        self._socket.close()
        for fd in self._wake:
            os.close(fd)
        self._area.__exit__(None, None, None)

    # --- the test's side

    def names(self) -> list[str]:
        """Return the names of the fds in it, oldest first, when all that was sent is dealt with."""
        self.settle()
        with self._changed:
            return [stored.name for stored in self._stored]

    def __len__(self) -> int:
        with self._changed:
            return len(self._stored)

    def fds(self) -> list[tuple[str, int]]:
        """Return what a service that is started now gets: systemd passes the newest first."""
        self.settle()
        with self._changed:
            return [(stored.name, stored.fd) for stored in reversed(self._stored)]

    def put(self, name: str, fd: int) -> None:
        """Store a copy of an fd, as if the service had."""
        with self._changed:
            self._store(name, os.dup(fd), polled=False)

    def lose(self, name: str) -> None:
        """Close what has this name, as if it had never been stored."""
        with self._changed:
            self._remove(name)
            self._close_taken_out()

    def drop(self) -> None:
        """Close all, as systemd does when a unit has stopped for good."""
        with self._changed:
            for stored in [*self._stored]:
                self._unlink(stored)
            self._close_taken_out()

    def settle(self) -> None:
        """Wait until all that was sent has been dealt with, and what was taken out is closed."""
        with self._changed:
            self._notices += 1
            mine = self._notices
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(f"{_NOTICE}{mine}".encode(), self.environment["NOTIFY_SOCKET"])
        deadline = Deadline()
        with self._changed:
            while self._noticed < mine or self._closing:
                if not self._changed.wait(deadline.remaining):
                    raise TimeoutError("the fd store's thread does nothing")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have systemd deal with nothing until the end of the block."""
        with self._changed:
            yield

    def wait_said(self, what: str) -> None:
        """Wait until this has been said; it and what came before is taken out of `said`."""
        deadline = Deadline()
        with self._changed:
            while what not in self.said:
                if not self._changed.wait(deadline.remaining):
                    raise TimeoutError(f"{what} was not said, but {self.said}")
            del self.said[: self.said.index(what) + 1]

    # --- systemd's side

    def _serve(self) -> None:
        while True:
            timeout = max(0.0, self._close_at - time.monotonic()) if self._closing else None
            ready = self._epoll.poll(timeout)
            with self._changed:
                for fd, _ in ready:
                    if fd == self._wake[0]:
                        return
                    if fd == self._socket.fileno():
                        self._receive()
                        continue
                    for stored in [each for each in self._stored if each.fd == fd]:
                        self._unlink(stored)
                if self._closing and time.monotonic() >= self._close_at:
                    self._close_taken_out()
                self._changed.notify_all()

    def _receive(self) -> None:
        data, control, _, _ = self._socket.recvmsg(
            1 << 16, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
        )
        fds = [fd for _, _, payload in control for fd in array.array("i", payload)]
        tags = data.decode().splitlines()
        if tags and tags[0].startswith(_NOTICE):
            self._noticed = int(tags[0].removeprefix(_NOTICE))
            return
        if "BARRIER=1" in tags:
            if len(tags) != 1 or len(fds) != 1:
                self.complaints.append(f"a barrier that is none: {tags} with {len(fds)} fds")
            self._close(fds)
            return
        names = [tag.removeprefix("FDNAME=") for tag in tags if tag.startswith("FDNAME=")]
        name = names[0] if names else None
        if name is not None and not _is_valid(name):
            self.complaints.append(f"the name {name!r}")
            name = None
        if "FDSTOREREMOVE=1" in tags:
            if name is not None:
                self._remove(name)
            else:
                self.complaints.append("a removal of what has no name")
        elif "FDSTORE=1" in tags:
            for fd in fds:
                self._store("stored" if name is None else name, fd, polled="FDPOLL=0" not in tags)
            fds = []
        else:
            self.said += tags
        if fds:
            self.complaints.append(f"{len(fds)} fds for nothing: {tags}")
            self._close(fds)

    def _store(self, name: str, fd: int, *, polled: bool) -> None:
        if len(self._stored) >= self.maximum:
            self.complaints.append(f"no room for {name}")
            os.close(fd)
            return
        if any(same_file(stored.fd, fd) for stored in self._stored):
            self.complaints.append(f"{name} is in it already")
            os.close(fd)
            return
        stored = Stored(name, fd)
        if polled:
            try:
                self._epoll.register(fd, 0)
            except OSError as exc:
                if exc.errno != errno.EPERM:
                    raise
                polled = False
        stored.polled = polled
        self._stored.append(stored)

    def _remove(self, name: str) -> None:
        for stored in [each for each in self._stored if each.name == name]:
            self._unlink(stored)

    def _unlink(self, stored: Stored) -> None:
        self._stored.remove(stored)
        if stored.polled:
            self._epoll.unregister(stored.fd)
        self._closing.append(stored.fd)
        self._close_at = time.monotonic() + _LATE

    def _close_taken_out(self) -> None:
        self._close(self._closing)
        self._closing.clear()

    @staticmethod
    def _close(fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)


def _is_valid(name: str) -> bool:
    return len(name) <= 255 and all(" " <= each < "\x7f" and each != ":" for each in name)


def same_file(first: int, second: int) -> bool:
    """Say whether two fds of this process are copies of one."""
    pid = os.getpid()
    order = _libc.syscall(
        _KCMP, pid, pid, _KCMP_FILE, ctypes.c_ulong(first), ctypes.c_ulong(second)
    )
    if order < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return bool(order == 0)
