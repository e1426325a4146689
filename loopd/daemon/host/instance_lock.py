# SPDX-License-Identifier: LGPL-2.1-or-later
"""One loopd at a time for a runtime directory: what is recorded there is one daemon's to act upon.

The next one may be started while the last is still letting go, or by hand on another bus.
"""

import fcntl
import os
import time
from pathlib import Path

from loopd.errors import Failed
from loopd.fd import OwnedFd

_INTERVAL = 0.005


def claim(runtime_directory: Path, timeout: float) -> OwnedFd:
    """Wait for the directory, and have it for as long as the returned fd is open; for a thread.

    Raises Failed when another loopd still has it after `timeout` seconds, OSError.
    """
    runtime_directory.mkdir(parents=True, exist_ok=True)
    path = runtime_directory / "lock"
    deadline = time.monotonic() + timeout
    while True:
        with OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as fd:
            if _try_lock(fd.fileno()):
                # Unless its last owner was found dead, and another one has made a new file.
                if _is_at(fd.fileno(), path):
                    os.ftruncate(fd.fileno(), 0)
                    os.pwrite(fd.fileno(), str(os.getpid()).encode(), 0)
                    return fd.move()
            elif _is_dead(owner := os.pread(fd.fileno(), 32, 0)):
                # A thread of it hangs in the kernel, where SIGKILL does not reach it, and keeps its
                # fds open, this one among them.
                path.unlink(missing_ok=True)
            elif time.monotonic() >= deadline:
                pid = owner.decode(errors="replace")
                raise Failed(f"another loopd (process {pid}) uses {runtime_directory}")
            else:
                time.sleep(_INTERVAL)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _is_dead(pid: bytes) -> bool:
    """Whether a process has ended but for threads of it that cannot."""
    if not pid.isdigit():
        return False  # it has the lock since this moment
    try:
        stat = Path(f"/proc/{int(pid)}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")
