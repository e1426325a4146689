# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's fd store: copies of our fds that outlive us, so that no device goes while we are dead.

A loop device goes when its last opener closes. What is in the store is one more, so it is taken out
before our own last close, which then is the one that waits for the device and not systemd's.
"""

import itertools
import logging
import os
import re
import select
import threading
from functools import partial

from loopd import notify
from loopd.fd import OwnedFd

from . import systemd

log = logging.getLogger(__name__)

# How long systemd may take to close what it was told to.
_BARRIER_TIMEOUT = 5.0


class FdStore:
    """The store; without systemd it is there all the same and keeps nothing.

    Whatever sends may wait for systemd, so it is for threads.
    """

    def __init__(self) -> None:
        self.room = 0
        """How many fds it takes."""
        self._names: set[str] = set()
        self._leaving: set[str] = set()
        """Those of them that are being taken out."""
        self._due: set[str] = set()
        """What systemd should have had when it was last asked."""
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()

    def compare(self, kept: int) -> None:
        """Warn if systemd keeps less than it should, for it says nothing when it drops an fd."""
        with self._changed:
            due = self._names - self._leaving
        # An fd that was not there at the last comparison may still be on its way. While many come
        # and go there is one at each comparison.
        missing = len(due & self._due) - kept
        if missing > 0:
            log.warning("systemd has lost %d fds: devices may go when loopd does", missing)
        self._due = due

    def passed(self) -> dict[str, OwnedFd]:
        """What it has kept for us, by name: to be called once, and first."""
        found = {}
        used = 0
        for name, (fd, *copies) in systemd.passed_fds().items():
            for copy in copies:
                os.close(copy)
            found[name] = OwnedFd(fd).closed_after(partial(self._take_out, name))
            used = max(used, number_in(name))
        with self._changed:
            self._names.update(found)
        self._numbers = itertools.count(used + 1)
        return found

    def keeps(self, name: str) -> bool:
        """Whether a copy of something is kept."""
        with self._changed:
            return name in self._names

    def name(self, of: str, what: str) -> str:
        """A new name for something of a device."""
        return f"{of}.{what}{next(self._numbers)}"

    def keep(self, name: str, fd: OwnedFd) -> OwnedFd:
        """Have a copy kept under a name; takes the fd over and returns it.

        When that is closed, the copy is taken out first.
        """
        if not self.room:
            return fd.move()
        with self._changed:
            # What was closed may still be in it, and what does not fit is dropped without a word.
            self._changed.wait_for(lambda: len(self._names) < self.room, _BARRIER_TIMEOUT)
            self._names.add(name)
        # Not watched: that the client has closed its end of a Hold is ours to notice.
        if not notify.tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd.fileno()]):
            self._forget(name)
            return fd.move()
        return fd.closed_after(partial(self._take_out, name))

    def _take_out(self, name: str) -> None:
        with self._changed:
            self._leaving.add(name)
        notify.tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
        _barrier()
        self._forget(name)

    def _forget(self, name: str) -> None:
        with self._changed:
            self._names.discard(name)
            self._leaving.discard(name)
            self._changed.notify_all()


def number_in(name: str) -> int:
    """The number at the end of a name that `FdStore.name` made; else 0."""
    found = re.search(r"\.[a-z]+(\d+)$", name)
    return int(found[1]) if found else 0


def _barrier() -> None:
    """Return when systemd has dealt with all that it was told, see sd_notify_barrier(3)."""
    reading, writing = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
    with reading:
        with writing:
            told = notify.tell("BARRIER=1", [writing.fileno()])
        if not told:
            return
        poll = select.poll()
        poll.register(reading.fileno(), 0)
        if not poll.poll(_BARRIER_TIMEOUT * 1000):
            log.warning("systemd did not take fds out of its store in %g s", _BARRIER_TIMEOUT)
