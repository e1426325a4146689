# SPDX-License-Identifier: LGPL-2.1-or-later
"""Child processes: started, waited for by pidfd, never left behind, their output kept.

What a child printed stands in its Log, and the logs of a test are shown when it fails.
"""

import os
import pwd
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Self

from tests.harness.deadline import Deadline

logs: list["Log"] = []
"""The logs of all children since the list was last cleared, which happens before each test."""


class Log:
    """What one child printed, readable while it runs and after its file is closed."""

    def __init__(self, name: str) -> None:
        """Begin an empty log and register it."""
        self.name = name
        self._file: IO[bytes] | None = TemporaryFile()  # noqa: SIM115 - closed by close()
        self._text = ""
        logs.append(self)

    def fileno(self) -> int:
        """Return the fd to print to."""
        if self._file is None:
            raise ValueError(f"the log of {self.name} is closed")
        return self._file.fileno()

    @property
    def text(self) -> str:
        """Everything printed so far."""
        if self._file is None:
            return self._text
        fd = self._file.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        """Keep the text, give up the file."""
        self._text = self.text
        if self._file is not None:
            self._file.close()
            self._file = None


def login(account: pwd.struct_passwd) -> dict[str, str]:
    """Return a user's environment, as from a login."""
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "USER": account.pw_name,
        "HOME": account.pw_dir,
    }


class Process:
    """A child process that ends, at the latest, with its `with` block."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        name: str,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start `arguments` in the root directory, as `user` (this process's own when None).

        Without a `user` the environment is that of the test with `environment` laid over it;
        a user gets a fresh one, as from a login.
        """
        self.name = name
        self.log = Log(name)
        account = None if user is None else pwd.getpwnam(user)
        if account is None:
            variables = dict(os.environ)
            # Nothing of a service manager above the tests may reach a child.
            for inherited in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
                variables.pop(inherited, None)
        else:
            variables = login(account)
        variables.update(environment or {})
        no_groups: list[int] = []
        changes_user = account is not None and account.pw_uid != os.getuid()
        if changes_user and os.getuid() != 0:
            raise PermissionError(f"only root can start a program as {user}")
        self._popen: subprocess.Popen[bytes] = subprocess.Popen(
            [str(argument) for argument in arguments],
            env=variables,
            cwd="/",
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=self.log.fileno(),
            stderr=self.log.fileno(),
            pass_fds=pass_fds,
            user=account.pw_uid if account and changes_user else None,
            group=account.pw_gid if account and changes_user else None,
            extra_groups=no_groups if changes_user else None,
        )
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._popen.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; return its status."""
        if self._popen.poll() is None:
            Deadline(timeout).wait_readable([self.pidfd], f"the end of {self.name} ({self.pid})")
        return self._popen.wait()

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if self._popen.poll() is None:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End it by SIGKILL and wait for that."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self, timeout: float | None = None) -> int:
        """End it by SIGTERM, by SIGKILL past the deadline; return its status."""
        try:
            self.signal(signal.SIGTERM)
            try:
                return self.wait(timeout)
            except TimeoutError:
                self.kill()
                raise
        finally:
            self.release()

    def release(self) -> None:
        """Give up the pidfd and the log's file of a process that has ended."""
        self.log.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def children_of(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found
