# SPDX-License-Identifier: LGPL-2.1-or-later
"""File descriptors with exactly one owner, closed exactly once."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self


class OwnedFd:
    """An open fd that is closed when its `with` block ends, unless it was moved elsewhere.

    `close` decides how: the default closes at once; fds that a client sent are given to
    helper threads, because closing a file on FUSE may block for ever.
    """

    __slots__ = ("_close", "_fd")

    def __init__(self, fd: int, close: Callable[[int], None] = os.close) -> None:
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd
        self._close = close

    def fileno(self) -> int:
        """The number, for a call that does not keep it."""
        if self._fd < 0:
            raise ValueError("the file descriptor is closed or has moved")
        return self._fd

    def move(self) -> OwnedFd:
        """Give the fd to a new owner and keep nothing."""
        return OwnedFd(self.release(), self._close)

    def release(self) -> int:
        """Give up the ownership: whoever gets the number has to close it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def closed_after(self, step: Callable[[], None]) -> OwnedFd:
        """Give the fd to a new owner whose close does something first."""
        close = self._close

        def closing(fd: int) -> None:
            try:
                step()
            finally:
                close(fd)

        return OwnedFd(self.release(), closing)

    def close(self) -> None:
        """Close it now; closing twice does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<OwnedFd {self._fd}>"
