# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for file descriptors, with an end.

A Deadline is made once and handed down, so that several waits in a row share one limit.
"""

import select
import time
from collections.abc import Iterable

DEFAULT_TIMEOUT = 20.0
"""Seconds that any one step of a test may take on a slow, busy machine."""


class Deadline:
    """A point in time after which waiting is a failure."""

    def __init__(self, timeout: float | None = None) -> None:
        """Expire `timeout` seconds from now."""
        self._timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        self._end = time.monotonic() + self._timeout

    @property
    def remaining(self) -> float:
        """Seconds left, never less than none."""
        return max(0.0, self._end - time.monotonic())

    def wait_readable(self, fds: Iterable[int], what: str) -> set[int]:
        """Return those of `fds` that are readable or hung up; TimeoutError names `what`."""
        return self._wait(fds, select.POLLIN, what)

    def wait_writable(self, fds: Iterable[int], what: str) -> set[int]:
        """Return those of `fds` that take bytes; TimeoutError names `what`."""
        return self._wait(fds, select.POLLOUT, what)

    def _wait(self, fds: Iterable[int], events: int, what: str) -> set[int]:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, events)
        ready = poll.poll(self.remaining * 1000)
        if not ready:
            raise TimeoutError(f"{what}: nothing within {self._timeout:g} s")
        return {fd for fd, _ in ready}
