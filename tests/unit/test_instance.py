# SPDX-License-Identifier: LGPL-2.1-or-later
"""One loopd at a time has a runtime directory, and none waits for one that cannot end."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd.daemon.host import instance_lock
from loopd.errors import Failed

PATIENCE = 20.0
"""Seconds for what takes none."""
OWNER = """
import sys
from pathlib import Path
from loopd.daemon.host import instance_lock as instance
fd = instance.claim(Path(sys.argv[1]), 0)
print("mine", flush=True)
sys.stdin.read()
"""


@contextmanager
def owner(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the directory until its stdin ends."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"mine\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_first_one_has_it_and_the_pid_tells_who(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "loopd"
    with instance_lock.claim(directory, 0):
        assert (directory / "lock").read_text() == str(os.getpid())
    with instance_lock.claim(directory, 0):
        pass


def test_another_one_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        with pytest.raises(Failed, match=rf"another loopd \(process {process.pid}\) uses"):
            instance_lock.claim(tmp_path, 0.05)


def test_another_one_waits_for_the_end_of_the_first(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        got = threading.Event()

        def wait() -> None:
            with instance_lock.claim(tmp_path, PATIENCE):
                got.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.05)
        process.kill()
        waiting.join(PATIENCE)
        assert got.is_set()


def test_one_that_is_dead_but_for_what_hangs_in_the_kernel_is_not_waited_for(
    tmp_path: Path,
) -> None:
    """Hanging files: their threads outlive SIGKILL, and keep the fds of their process open."""
    with owner(tmp_path) as process, open(tmp_path / "lock", "rb") as copy:
        # The open file description that has the lock outlives its process, as in such a thread.
        kept = os.pidfd_open(process.pid)
        ours = _copy_of_lock(kept, process.pid, copy.fileno())
        os.close(kept)
        try:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
            with instance_lock.claim(tmp_path, 0):
                assert (tmp_path / "lock").read_text() == str(os.getpid())
                with pytest.raises(Failed):
                    instance_lock.claim(tmp_path, 0)
        finally:
            os.close(ours)


def _copy_of_lock(pidfd: int, pid: int, lock: int) -> int:
    """An fd of ours on the open file that a process has locked (pidfd_getfd)."""
    import ctypes

    inode = os.fstat(lock).st_ino
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.stat(f"/proc/{pid}/fd/{name}").st_ino == inode:
            fd: int = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, int(name), 0)
            assert fd >= 0, os.strerror(ctypes.get_errno())
            return fd
    raise LookupError("it has no lock")
