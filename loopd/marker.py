# SPDX-License-Identifier: LGPL-2.1-or-later
"""Marks for our udev rules: which loop devices belong to ordinary users.

A mark is an empty file named after the device. While it is there, the rules give the device no
persistent links and let nothing assemble it, so it is written before binding and removed after
unbinding.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from . import kernel


class Markers:
    """The directory `unprivileged` in the runtime directory."""

    def __init__(self, runtime_directory: Path) -> None:
        self._directory = runtime_directory / "unprivileged"
        self._lock = threading.Lock()
        self._claims: dict[int, object] = {}

    def prepare(self) -> None:
        """Make the directory, and forget marks of devices that are not bound any more.

        A daemon that was killed leaves its marks; the next user of the number may be root.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("loop*"):
            number = path.name.removeprefix("loop")
            if not number.isdecimal() or not kernel.loop_bound(int(number)):
                path.unlink(missing_ok=True)

    def claim(self, number: int, *, unprivileged: bool) -> Callable[[], None]:
        """Say whose file loopN is about to hold; returns what to call when it holds it no more.

        The number may be in use again, for someone else, before the last user's mark is released:
        only the newest claim counts.
        """
        claim = object()
        path = self._directory / f"loop{number}"
        with self._lock:
            self._claims[number] = claim
            if unprivileged:
                path.touch()
            else:
                path.unlink(missing_ok=True)

        def release() -> None:
            with self._lock:
                if self._claims.get(number) is claim:
                    del self._claims[number]
                    path.unlink(missing_ok=True)

        return release

    def claimed(self, number: int) -> bool:
        """Whether loopN is ours, or is about to be."""
        with self._lock:
            return number in self._claims
