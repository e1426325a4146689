# SPDX-License-Identifier: LGPL-2.1-or-later
"""Marks in the runtime directory: which loop devices are loopd's, and which are ordinary users'.

A mark is an empty file named after the device, written before binding and removed after unbinding.
While one is in `unprivileged`, our udev rules give the device no persistent links and let nothing
assemble it. Those in `attached` tell the next loopd what one that was killed has left.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import kernel

Release = Callable[[int | None], None]


class Markers:
    """The directories `attached` and `unprivileged` in the runtime directory."""

    def __init__(self, runtime_directory: Path) -> None:
        self._attached = runtime_directory / "attached"
        self._unprivileged = runtime_directory / "unprivileged"
        self._lock = threading.Lock()
        self._claims: dict[int, _Claim] = {}
        self._left: set[int] = set()
        """Devices that a former daemon has left bound."""

    def prepare(self) -> None:
        """Make the directories."""
        for directory in (self._attached, self._unprivileged):
            directory.mkdir(parents=True, exist_ok=True)

    def prune(self) -> list[int]:
        """Remove marks of devices that are neither bound nor about to be; return their numbers.

        A daemon that was killed leaves its marks, and the next user of the number may be root. Only
        who owns the name may do this: the marks may be another daemon's.
        """
        pruned = set()
        with self._lock:
            for directory in (self._attached, self._unprivileged):
                for path in directory.glob("loop*"):
                    name = path.name.removeprefix("loop")
                    number = int(name) if name.isdecimal() else -1
                    if number in self._claims:
                        continue
                    if kernel.loop_bound(number):
                        self._left.add(number)
                    else:
                        path.unlink(missing_ok=True)
                        pruned.add(number)
        return sorted(pruned - {-1})

    def claim(self, number: int, *, unprivileged: bool) -> Release:
        """Say whose file loopN is about to hold; returns what to call when loopd is done with it.

        That takes the binding (`kernel.loop_binding`) that still waits for a last close, because
        somebody else has the device open: then the mark stays until that is over; else None. The
        number may be in use again, for someone else, before the last user's claim is released:
        only the newest claim counts.
        """
        claim = _Claim()
        with self._lock:
            attached, unprivileged_mark = self._paths(number)
            attached.touch()
            if unprivileged:
                unprivileged_mark.touch()
            else:
                unprivileged_mark.unlink(missing_ok=True)
            self._claims[number] = claim

        def release(waiting: int | None) -> None:
            claim.over, claim.waiting = True, waiting
            if waiting is None:
                self.unbound(number)

        return release

    def unbound(self, number: int) -> None:
        """Note that the kernel has no file bound to loopN."""
        with self._lock:
            claim = self._claims.get(number)
            if claim.over if claim else number in self._left:
                self._claims.pop(number, None)
                self._left.discard(number)
                for path in self._paths(number):
                    path.unlink(missing_ok=True)

    def claimed(self, number: int, binding: int) -> bool:
        """Whether a binding of loopN is ours, is about to be, or was until its last user closes."""
        with self._lock:
            claim = self._claims.get(number)
            if claim is None:
                return False
            if not claim.over or claim.waiting == binding:
                return True
        # Somebody has bound it anew before we saw that it was unbound.
        self.unbound(number)
        return False

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self._attached / f"loop{number}", self._unprivileged / f"loop{number}"


@dataclass(eq=False)
class _Claim:
    over: bool = False
    waiting: int | None = None
