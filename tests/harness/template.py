# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts many a process in the time that one takes: forks of one that has imported what they need.

Importing is most of what a loopd or a caller does until it is ready.  Those that `shared` has are
for everyone, by what they are for.
"""

import array
import json
import os
import pwd
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import CHECKOUT
from tests.harness.deadline import Deadline
from tests.harness.process import Log, Process, login

_PROGRAM = Path(__file__).with_name("template_program.py")

shared: dict[str, "Template"] = {}
"""Those that run now, see all_shared()."""


class Template:
    """The process to fork, from the start of the `with` block."""

    def __init__(
        self, modules: Sequence[str], *, hidden: Sequence[str] = (), python: Sequence[str] = ()
    ) -> None:
        """Prepare one that imports these modules; those that are hidden cannot be imported."""
        self._wants = json.dumps({"modules": [*modules], "hidden": [*hidden]})
        self._python = python or (sys.executable, "-P", "-W", "default::ResourceWarning")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control = stack.enter_context(ours)
            with theirs:
                self._process = stack.enter_context(
                    Process(
                        [*self._python, _PROGRAM, self._wants],
                        name="template",
                        environment={"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"},
                        stdin=theirs.fileno(),
                    )
                )
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def start(
        self,
        name: str,
        code: str,
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: int | None = None,
        fds: Sequence[int] = (),
    ) -> "Forked":
        """Fork a process that runs this code, which has copies of `fds` from 3 on.

        `user`, `environment` and `stdin` are as in Process.
        """
        log = Log(name)
        account = None if user is None else pwd.getpwnam(user)
        request = {
            "code": code,
            "arguments": [name, *map(str, arguments)],
            "environment": dict(environment or {}) | (login(account) if account else {}),
            "anew": account is not None,
            "user": [account.pw_uid, account.pw_gid] if account else None,
            "stdin": stdin is not None,
        }
        passed = array.array("i", [log.fileno(), *([] if stdin is None else [stdin]), *fds])
        self._control.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
        )
        Deadline().wait_readable([self._control.fileno()], f"the pid of a new {name}")
        answer = self._control.recv(64)
        if not answer:
            raise RuntimeError(f"the template ended:\n{self._process.log.text}")
        return Forked(int(answer), log)


@contextmanager
def all_shared(templates: Mapping[str, Template]) -> Iterator[None]:
    """Have these templates shared until the end of the block."""
    with ExitStack() as stack:
        stack.callback(shared.clear)
        for name, each in templates.items():
            shared[name] = stack.enter_context(each)
        yield


class Forked(Process):
    """A process that this one did not start, but has adopted."""

    def __init__(self, pid: int, log: Log) -> None:
        """Watch over a process that prints to `log`."""
        self.name = log.name
        self.log = log
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; return its status."""
        if self.status is None:
            Deadline(timeout).wait_readable([self.pidfd], f"the end of {self.name} ({self.pid})")
        status = self.status
        assert status is not None
        return status

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if self.status is None:
            signal.pidfd_send_signal(self.pidfd, number)
