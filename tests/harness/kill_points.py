# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every point at which loopd changes something, and its end by SIGKILL right before one of them.

Such a point is a call of a function of loopd.loop.kernel, a message to the bus or to systemd, and
what happens to a file in the runtime directory.  It is named after what is done, where in loopd,
and for which time: `kernel.loop_configure@configure.py:96#1`.
"""

import mmap
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tests.harness.area import CHECKOUT

_SIZE = 4096
_OURS = f"{CHECKOUT}/loopd/"
_FILES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.link", "os.truncate"}
_MESSAGES = {"socket.sendmsg", "socket.sendto", "socket.send"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class KillPoints:
    """The test's side: says when to count, and where to end."""

    def __init__(self, directory: Path, runtime_directory: Path) -> None:
        """Keep what the two sides share in a directory."""
        # Not by loopd, which would import mocks at each of its many starts.
        from tests.harness.scripted import FUNCTIONS

        self._control = directory / "control"
        self._record = directory / "record"
        self._control.write_bytes(bytes(_SIZE))
        self._record.touch()
        self._shared = _share(self._control)
        self.prelude = (
            "from tests.harness import kill_points; kill_points.install("
            f"{str(self._control)!r}, {str(self._record)!r}, {str(runtime_directory)!r}, "
            f"{FUNCTIONS!r})"
        )
        """What has loopd take part."""

    def close(self) -> None:
        """Give up what is shared."""
        self._shared.close()

    @contextmanager
    def armed(self, point: str = "") -> Iterator[None]:
        """Count from now on, and end loopd at this point, until the end of the block."""
        name = point.encode()
        self._record.write_bytes(b"")
        self._shared[1 : 3 + len(name)] = len(name).to_bytes(2, "little") + name
        self._shared[0] = (self._shared[0] + 1) | 1
        try:
            yield
        finally:
            self._shared[0] = (self._shared[0] + 1) & ~1 & 0xFF

    def reached(self) -> list[str]:
        """Return the points that have been reached since they were last counted."""
        return self._record.read_text().splitlines()


def install(control: str, record: str, runtime_directory: str, functions: tuple[str, ...]) -> None:
    """Take part, as loopd, with these functions of loopd.loop.kernel."""
    from loopd.loop import kernel

    shared = _share(Path(control))
    log = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    counting = threading.Lock()
    seen: Counter[str] = Counter()
    round_ = 0

    def reach(what: str, frame: FrameType | None) -> None:
        nonlocal round_
        if not shared[0] & 1:
            return
        where = f"{what}@{_place(frame)}"
        with counting:
            if round_ != shared[0]:
                round_ = shared[0]
                seen.clear()
            seen[where] += 1
            point = f"{where}#{seen[where]}"
            os.write(log, f"{point}\n".encode())
            length = int.from_bytes(shared[1:3], "little")
            if point.encode() == shared[3 : 3 + length]:
                os.kill(os.getpid(), signal.SIGKILL)

    def wrap(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            reach(what, sys._getframe(1))
            return function(*args, **named)

        return call

    for name in functions:
        setattr(kernel, name, wrap(f"kernel.{name}", getattr(kernel, name)))
    try:
        from systemd import daemon
    except ImportError:
        pass
    else:
        daemon.notify = wrap("notify", daemon.notify)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event in _MESSAGES:
            reach(event, sys._getframe(1))
        elif event in _FILES or (event == "open" and args[2] & _WRITING):
            path = args[0]
            if isinstance(path, str | bytes | os.PathLike):
                path = os.fsdecode(path)
                if not path.startswith("/") or path.startswith(f"{runtime_directory}/"):
                    reach(event, sys._getframe(1))

    sys.addaudithook(hear)


def _share(path: Path) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, _SIZE)
    finally:
        os.close(fd)


def _place(frame: FrameType | None) -> str:
    """Return the nearest place in loopd from which this was called."""
    while frame and (
        not (name := frame.f_code.co_filename).startswith(_OURS) or "kernel.py" in name
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(_OURS)}:{frame.f_lineno}" if frame else "?"
