# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd.service of a booted machine: what systemd knows of it, and what systemd does to it."""

import os
from collections.abc import Callable

from tests.harness.booted import Machine
from tests.harness.deadline import Deadline

NAME = "loopd.service"
CONFIG = "/etc/loopd.toml"
_DROP_INS = f"/run/systemd/system/{NAME}.d"

_RESET = f"""
systemctl kill --signal=CONT {NAME}
systemctl stop {NAME}
systemctl reset-failed {NAME}
rm -f {CONFIG}
[ ! -e {_DROP_INS} ] || {{ rm -r {_DROP_INS}; systemctl daemon-reload; }}
"""


class Unit:
    """The unit, and the process of it that runs."""

    def __init__(self, machine: Machine) -> None:
        """Look at nothing yet."""
        self._machine = machine

    # What systemd knows

    def show(self, name: str) -> str:
        """Return one property."""
        return self._machine.run("systemctl", "show", "--value", f"--property={name}", NAME).strip()

    @property
    def pid(self) -> int:
        """The main process, as the machine counts them; 0 if there is none."""
        return int(self.show("MainPID"))

    @property
    def stored(self) -> int:
        """How many fds systemd keeps for it."""
        return int(self.show("NFileDescriptorStore"))

    def log(self, *options: str) -> list[str]:
        """Return the messages of its processes, the newest last."""
        self._machine.run("journalctl", "--sync")
        return self._machine.run(
            "journalctl", "--quiet", "--output=cat", f"--unit={NAME}", *options
        ).splitlines()

    # What systemd does

    def do(self, verb: str) -> None:
        """Have systemctl start, stop, restart it, and wait for that."""
        self._machine.run("systemctl", verb, NAME)

    def kill(self, name: str = "KILL") -> None:
        """Send a signal to the main process."""
        self._machine.run("systemctl", "kill", f"--signal={name}", "--kill-whom=main", NAME)

    def change(self, text: str) -> None:
        """Lay settings over those of the unit, until reset(); they count from the next start on."""
        names = os.listdir(path) if (path := self._machine.path(_DROP_INS)).exists() else []
        self._machine.write(f"{_DROP_INS}/{len(names)}.conf", text)
        self._machine.run("systemctl", "daemon-reload")

    def configure(self, text: str) -> None:
        """Write the administrator's settings, until reset(); they count from the next start on."""
        self._machine.write(CONFIG, text)

    def reset(self) -> None:
        """Stop it, and take away what change() and configure() have made."""
        # One that is suspended would not hear of the stop; and it may not be installed any more.
        self._machine.run("sh", "-c", _RESET)

    # Waiting

    def wait(self, true: Callable[[], bool], what: str) -> None:
        """Ask systemd until it is so: each question takes its time to be answered."""
        deadline = Deadline()
        while not true():
            if not deadline.remaining:
                raise TimeoutError(f"{what}: {self.show('ActiveState')}, {self.log('--lines=5')}")

    def wait_successor(self, pid: int) -> int:
        """Wait until another process than `pid` serves, and return that."""

        def serves() -> bool:
            state = self._machine.run(
                "systemctl", "show", "--property=MainPID,ActiveState", NAME
            ).split()
            return "ActiveState=active" in state and f"MainPID={pid}" not in state

        self.wait(serves, f"another loopd than {pid}")
        return self.pid

    def wait_end(self) -> None:
        """Wait until the process that runs now has ended, and systemd knows."""
        for pid in self._machine.processes_of(NAME):
            _wait_process(pid)
        self.wait(lambda: self.pid == 0, "the end of loopd")


def _wait_process(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        Deadline().wait_readable([pidfd], f"the end of {pid}")
    finally:
        os.close(pidfd)
