# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that stand still for a while, and what others do meanwhile."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.harness.deadline import Deadline

_EPOLLOUT = 4


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process, be it our child or not, does nothing until the end of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = Deadline()
        while not _is_stopped(pid):
            assert deadline.remaining, f"process {pid} does not stop"
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    threads = [each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in threads)


def wait_for_want_of_room(pid: int) -> None:
    """Return when a process waits for room in a socket that nobody reads from."""
    deadline = Deadline()
    while not _wants_room(pid):
        assert deadline.remaining, f"process {pid} does not fill any socket"


def _wants_room(pid: int) -> bool:
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            for line in entry.read_text().splitlines():
                # "tfd: 6 events: 1d data: ...", of each fd that an epoll watches
                if line.startswith("tfd:") and int(line.split()[3], 16) & _EPOLLOUT:
                    return True
    return False
