# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds what a test leaves behind: loop devices, partitions, children, threads, fds.

Only what appeared during the test and is its own counts.  A loop device is when its backing file
lies where this test process puts files, or is a memfd of its naming; so those of a developer, or of
another run on the same machine, are neither complained of nor touched.
"""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.harness import loops, udev
from tests.harness.area import MACHINES_PREFIX, PREFIX, TOKEN
from tests.harness.deadline import Deadline

GRACE = 5.0
"""Seconds that the kernel, udev's probe and orphans of the killed may take to let go."""

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make the children of killed children ours, so that they can be seen and waited for."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Return the processes whose parent is this one, the shared udevd left out."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end
            found |= set(map(int, (task / "children").read_text().split()))
    return found - {udev.shared_pid()}


def open_fds() -> dict[int, str]:
    """Return the fds of this process and what each is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the fd of this very listing
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    if "gi.repository.Gio" in sys.modules:
        # GLib's own threads keep theirs for as long as the process lives.
        found = {fd: target for fd, target in found.items() if "[eventfd]" not in target}
    return found


@dataclass(frozen=True)
class Snapshot:
    """What there was before a test."""

    attachments: frozenset[tuple[int, int]]
    children: frozenset[int]
    threads: frozenset[threading.Thread]
    fds: dict[int, str]
    directories: tuple[str, ...]

    @classmethod
    def take(cls, directories: Sequence[Path] = ()) -> "Snapshot":
        """Look, before the test; its files are in `directories`, beside those of area()."""
        loops.used_numbers.clear()
        gc.collect()
        return cls(
            attachments=frozenset(
                (loop.number, loop.diskseq) for loop in loops.bound_loops().values()
            ),
            children=frozenset(children()),
            threads=frozenset(threading.enumerate()),
            fds=open_fds(),
            directories=(
                str(PREFIX),
                str(MACHINES_PREFIX),
                *(f"{each}/" for each in directories),
            ),
        )

    def leaks(self, grace: float = GRACE) -> list[str]:
        """Return what is left over after the test, and take it away."""
        gc.collect()
        found = [*self._children(grace), *self._loops(grace), *self._partitions(grace)]
        new_threads = set(threading.enumerate()) - self.threads
        found += [f"thread {thread.name}" for thread in new_threads if not thread.daemon]
        found += [f"fd {fd} on {it}" for fd, it in open_fds().items() if self.fds.get(fd) != it]
        return found

    def _is_own(self, loop: loops.BoundLoop) -> bool:
        if (loop.number, loop.diskseq) in self.attachments:
            return False
        return loop.backing_file.startswith((*self.directories, f"/memfd:{TOKEN}"))

    def _own_loops(self) -> list[loops.BoundLoop]:
        return [loop for loop in loops.bound_loops().values() if self._is_own(loop)]

    def _loops(self, grace: float) -> list[str]:
        if not self._own_loops():
            return []
        with loops.Uevents() as events, suppress(TimeoutError):
            events.wait_until(lambda: not self._own_loops(), "loop devices to be unbound", grace)
        left = self._own_loops()
        for loop in left:
            loops.used_numbers.add(loop.number)
            loops.detach_leaked(loop)
        return [f"loop device {loop.node} ({loop.diskseq}) on {loop.backing_file}" for loop in left]

    def _partitions(self, grace: float) -> list[str]:
        def strays() -> list[str]:
            return [
                f"partition {partition} of an unbound device"
                for number in sorted(loops.used_numbers)
                if not loops.loop_is_bound(number)
                for partition in loops.partitions(number)
            ]

        if not strays():
            return []
        with loops.Uevents() as events, suppress(TimeoutError):
            events.wait_until(lambda: not strays(), "partitions to go", grace)
        return strays()

    def _children(self, grace: float) -> list[str]:
        left = []
        deadline = Deadline(grace)
        # The end of one may make its children ours.
        while new := children() - self.children:
            for pid in new:
                name = _name(pid)
                if not _reap(pid, deadline):
                    left.append(f"process {pid} ({name})")
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
        return left


def _name(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        return "gone"
    return b" ".join(words).decode(errors="replace").strip()[:100]


def _reap(pid: int, deadline: Deadline) -> bool:
    """Wait for a child's end and take its status; say whether it ended in time."""
    pidfd = os.pidfd_open(pid)
    try:
        deadline.wait_readable([pidfd], f"the end of {pid}")
    except TimeoutError:
        return False
    finally:
        os.close(pidfd)
    os.waitpid(pid, 0)
    return True
