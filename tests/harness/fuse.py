# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FUSE filesystem of one file, for everyone to see, served by a process of ours.

It can be told not to answer.  Whoever waits for a request that the server has read waits until it
is answered, whatever signal comes; the end of the `with` block ends the server, and so every wait.
"""

import errno
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import area
from tests.harness.deadline import Deadline
from tests.harness.images import MIB
from tests.harness.process import Process

_PROGRAM = Path(__file__).with_name("fuse_program.py")


class Fuse:
    """A mounted filesystem; `file` is its file until the `with` block ends."""

    def __init__(self, size: int = MIB, kind: str = "fuse", *, flushes: bool = True) -> None:
        """Prepare a filesystem of the type `kind`, fuse or fuse.something.

        Without `flushes` the kernel asks it nothing when an fd is closed, so that dbus-daemon, too,
        can close what is passed on while it hangs.
        """
        self._size = size
        self._kind = kind
        self._flush = 0 if flushes else errno.ENOSYS
        self._exit = ExitStack()
        self._kept: list[str] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(area("fuse"))
            self.file = directory / "file"
            # Readable when a request is kept.
            self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(self.orders)
            with theirs:
                numbers = map(str, (self._size, self._flush, theirs.fileno()))
                self.process = stack.enter_context(
                    Process(
                        [sys.executable, "-I", _PROGRAM, directory, self._kind, *numbers],
                        name="fuse",
                        pass_fds=[theirs.fileno()],
                    )
                )
            stack.callback(_unmount, directory)
            self._answer("the mount")
            if self._flush:
                # The kernel learns from the first time.
                os.close(self.open(os.O_RDONLY))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def open(self, flags: int = os.O_RDWR) -> int:
        """Open the file; the fd is the caller's to close, which may hang."""
        return os.open(self.file, flags | os.O_CLOEXEC)

    def hang(self, *requests: str, after: int = 0) -> None:
        """Keep these requests (READ, FLUSH...) without an answer, but for the next `after`."""
        self._order("hang", str(after), *requests)

    def release(self) -> None:
        """Answer all that was kept, and keep nothing any more."""
        self._order("release")

    def seen(self) -> list[str]:
        """Return the requests that came since this was last asked."""
        return self._order("seen").split()

    def wait_kept(self, timeout: float | None = None) -> str:
        """Wait until a request is kept that this has not told of; return what it is."""
        deadline = Deadline(timeout)
        while not self._kept:
            self._read(deadline, "a request that hangs")
        return self._kept.pop(0)

    def _order(self, *words: str) -> str:
        self.orders.send(" ".join(words).encode())
        return self._answer("the filesystem to obey")

    def _answer(self, what: str) -> str:
        deadline = Deadline()
        while (answer := self._read(deadline, what)) is None:
            pass
        return answer

    def _read(self, deadline: Deadline, what: str) -> str | None:
        """Return the answer that comes next, None if it is the news of a request that is kept."""
        deadline.wait_readable([self.orders.fileno()], what)
        kind, _, rest = self.orders.recv(1 << 16).decode().partition(" ")
        if not kind:
            raise RuntimeError(f"the filesystem has ended:\n{self.process.log.text}")
        if kind == "kept":
            self._kept.append(rest)
            return None
        return rest


def _unmount(directory: Path) -> None:
    # Lazily: what is still open there fails from now on, and nothing waits for anybody.
    subprocess.run(["umount", "--lazy", directory], check=False, capture_output=True)
