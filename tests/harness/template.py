# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts many a loopd in the time that one takes: forks of a process that has imported it."""

import array
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import CHECKOUT
from tests.harness.deadline import Deadline
from tests.harness.process import Log, Process

_PROGRAM = Path(__file__).with_name("template_program.py")


class Template:
    """The process to fork, from the start of the `with` block."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control = stack.enter_context(ours)
            with theirs:
                self._process = stack.enter_context(
                    Process(
                        [sys.executable, "-P", "-W", "default::ResourceWarning", _PROGRAM],
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
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        prelude: str = "",
        fds: Sequence[int] = (),
    ) -> "Forked":
        """Fork a loopd with these arguments, which has copies of `fds` from 3 on."""
        log = Log("loopd")
        request = {
            "arguments": [str(each) for each in arguments],
            "environment": dict(environment),
            "prelude": prelude,
        }
        passed = array.array("i", [log.fileno(), *fds])
        self._control.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
        )
        Deadline().wait_readable([self._control.fileno()], "the pid of a new loopd")
        answer = self._control.recv(64)
        if not answer:
            raise RuntimeError(f"the template ended:\n{self._process.log.text}")
        return Forked(int(answer), log)


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
