# SPDX-License-Identifier: LGPL-2.1-or-later
"""Callers in a booted machine: programs of its users, in login sessions and outside of them."""

import itertools
import shlex
from typing import NamedTuple

from tests.harness.booted import Machine
from tests.harness.caller import PROGRAM, Caller
from tests.harness.process import Process

_PROGRAM = "/run/caller.py"
_numbers = itertools.count(1)


class _SystemBus(NamedTuple):
    address: str = "unix:path=/run/dbus/system_bus_socket"


class Stranger(Caller):
    """A program of a machine's user that is in no login session, as those of services are."""

    def __init__(self, machine: Machine, user: str = "root") -> None:
        """Prepare a caller as `user`."""
        super().__init__(_SystemBus(), user)
        self.machine = machine

    def _start(self, stdin: int) -> Process:
        if not self.machine.path(_PROGRAM).exists():
            self.machine.write(_PROGRAM, PROGRAM.read_text())
        program = ["/usr/bin/python3", "-I", _PROGRAM, self._address]
        return Process(self._within(program), name=self.name, stdin=stdin)

    def _within(self, program: list[str]) -> list[str]:
        """Return the command that runs this one in the machine."""
        return self.machine.command(*program, user=self._user)

    def kill(self) -> None:
        """End it by SIGKILL; what has started it ends by itself."""
        self._signal("KILL")
        self.process.wait()

    def _signal(self, name: str) -> None:
        pid = self.evaluate("os.getpid()")
        self.machine.run("sh", "-c", f"kill -{name} {pid}")


class Login(Stranger):
    """A program that is in a login session of its own, which ends with it."""

    def __init__(self, machine: Machine, user: str, *, seat: bool = True) -> None:
        """Prepare a login as `user`, in front of the machine or, without a `seat`, from afar."""
        super().__init__(machine, user)
        self.unit = f"login-{user}-{next(_numbers)}.service"
        self._seat = seat

    def _within(self, program: list[str]) -> list[str]:
        start = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", f"--unit={self.unit}"]
        start += ["--property=PAMName=login", f"--property=User={self._user}"]
        start += ["--setenv=XDG_SESSION_CLASS=user", "--setenv=XDG_SESSION_TYPE=tty"]
        start += ["--setenv=XDG_SEAT=seat0"] if self._seat else []
        return self.machine.command(*start, *program)

    def run(self, *command: str) -> str:
        """Run a command in the session, which must succeed; return what it printed."""
        status, output = self.evaluate(
            "__import__('subprocess').getstatusoutput(command)", command=shlex.join(command)
        )
        assert status == 0, output
        return str(output)

    @property
    def session(self) -> str:
        """The name that logind has for its session."""
        return str(self.evaluate("os.environ['XDG_SESSION_ID']"))
