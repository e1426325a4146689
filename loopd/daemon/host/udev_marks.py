# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files in the runtime directory: which loop devices are loopd's, and which are ordinary users'.

A mark is a file named after the device, written before binding and removed after unbinding. Those
in `attached` tell the next loopd what one that was killed has left. By those in `unprivileged` our
udev rules know a user's device. Once it is bound, such a mark says whose it is and which binding is
meant, and a link to it has the diskseq in its name. A file in `links` tells udev of one attachment
of root's, which its diskseq is part of the name of (see `host.udev_links`).
"""

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loopd.loop import kernel

from . import udev_links

Release = Callable[[int | None], None]


class Markers:
    """The directories `attached`, `unprivileged` and `links` in the runtime directory."""

    def __init__(self, runtime_directory: Path) -> None:
        self._attached = runtime_directory / "attached"
        self._unprivileged = runtime_directory / "unprivileged"
        self._links = runtime_directory / "links"
        self._lock = threading.Lock()
        self._published: dict[int, str] = {}
        """The names with a diskseq, by the numbers of their devices."""
        self._claims: dict[int, _Claim] = {}
        self._left: set[int] = set()
        """Devices that a former daemon has left bound."""

    def prepare(self) -> None:
        """Make the directories."""
        for directory in (self._attached, self._unprivileged, self._links):
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob("loop*_*"):
                self._published[_number_of(path)] = str(path)
        # polkit's rule reads a mark without being root.
        for directory in (self._unprivileged.parent, self._unprivileged):
            directory.chmod(0o711)

    def prune(self) -> list[int]:
        """Remove marks of devices that are neither bound nor about to be; return their numbers.

        A daemon that was killed leaves its marks, and the next user of the number may be root. A
        mark of another binding goes, too, which udev's rule has not heeded.
        """
        left: defaultdict[int, list[Path]] = defaultdict(list)
        pruned = []
        with self._lock:
            for directory in (self._attached, self._unprivileged, self._links):
                for path in directory.glob("loop*"):
                    left[_number_of(path)].append(path)
            for number in sorted(left.keys() - self._claims.keys()):
                binding = kernel.loop_binding(number)
                if binding is not None and not self._is_of_another(number, binding):
                    self._left.add(number)
                    continue
                for path in left[number]:
                    path.unlink()
                self._published.pop(number, None)
                if binding is None and number >= 0:
                    pruned.append(number)
        return pruned

    def _is_of_another(self, number: int, binding: int) -> bool:
        """Whether a user's mark tells of a binding, and that is another one."""
        _, mark = self._marks(number)
        try:
            lines = Path(mark).read_text().splitlines()
        except FileNotFoundError:
            return False
        return bool(lines) and f"LOOPD_BINDING={binding}" not in lines

    def claim(self, number: int, *, unprivileged: bool) -> Release:
        """Say whose file loopN is about to hold; returns what to call when loopd is done with it.

        That takes the binding (`kernel.loop_binding`) that still waits for a last close, because
        somebody else has the device open: then the mark stays until that is over; else None. The
        number may be in use again, for someone else, before the last user's claim is released:
        only the newest claim counts.
        """
        with self._lock:
            attached, unprivileged_mark = self._marks(number)
            _make(attached)
            self._unpublish(number)
            if unprivileged:
                _make(unprivileged_mark)
            else:
                _remove(unprivileged_mark)
            return self._claim(number)

    def take_back(self, number: int) -> Release:
        """The same of what loopN held for a former loopd, whose files stay as they are."""
        with self._lock:
            return self._claim(number)

    def _claim(self, number: int) -> Release:
        claim = self._claims[number] = _Claim()

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
                for mark in self._marks(number):
                    _remove(mark)
                self._unpublish(number)

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

    def publish(self, number: int, diskseq: int, description: str) -> None:
        """Have udev make links to loopN, which is claimed, bound, and still locked against udev."""
        with self._lock:
            self._published[number] = f"{self._links}/loop{number}_{diskseq}"
            self._write(number, description)

    def sign(self, number: int, diskseq: int, owner: int) -> None:
        """Tell in a user's mark which binding it is of; loopN is still locked against udev."""
        with self._lock:
            _, mark = self._marks(number)
            binding = kernel.loop_binding(number)
            text = f"LOOPD_OWNER={owner}\nLOOPD_DISKSEQ={diskseq}\nLOOPD_BINDING={binding}\n"
            _make(mark, text.encode(), mode=0o644)
            self._published[number] = f"{mark}_{diskseq}"
            os.symlink(f"loop{number}", self._published[number])

    def rename(self, number: int, reference: bytes) -> None:
        """Have the links to loopN go by another reference, if it has any, when udev looks again."""
        with self._lock:
            path = Path(self._published.get(number, ""))
            if path.parent == self._links:
                self._write(number, udev_links.renamed(path.read_text(), reference))

    def _write(self, number: int, description: str) -> None:
        # At once, because udev may be reading it.
        new = f"{self._links}/new"
        _make(new, description.encode())
        os.replace(new, self._published[number])

    def _unpublish(self, number: int) -> None:
        if path := self._published.pop(number, None):
            _remove(path)

    def _marks(self, number: int) -> tuple[str, str]:
        return f"{self._attached}/loop{number}", f"{self._unprivileged}/loop{number}"


# By os: pathlib took most of the time of a claim, a twentieth of an attach, and as much of root's.
def _make(path: str, content: bytes = b"", mode: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        if mode is not None:
            os.fchmod(fd, mode)
        if content:
            os.write(fd, content)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _number_of(path: Path) -> int:
    """The number of the device that a file here is about; -1 if it is none of ours."""
    name = path.name.removeprefix("loop").partition("_")[0]
    return int(name) if name.isdecimal() else -1


@dataclass(eq=False)
class _Claim:
    over: bool = False
    waiting: int | None = None
