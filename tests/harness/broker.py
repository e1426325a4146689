# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private system bus served by dbus-broker, which newer systems have in dbus-daemon's place."""

import os
import shutil
import sys
from pathlib import Path

from tests.harness.bus import PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.process import Process, children_of

_PROGRAM = Path(__file__).with_name("broker_program.py")


def installed() -> bool:
    """Whether there is a dbus-broker to start."""
    return shutil.which("dbus-broker-launch") is not None


class PrivateBroker(PrivateBus):
    """As PrivateBus, by dbus-broker; it needs root, for a mount namespace of its own."""

    def _start(self, config: Path) -> Process:
        read_end, write_end = os.pipe()
        try:
            process = Process(
                [sys.executable, "-I", _PROGRAM, self.socket_path, config, str(write_end)],
                name="dbus-broker",
                pass_fds=[write_end],
            )
        finally:
            os.close(write_end)
        try:
            Deadline().wait_readable([read_end], "the socket of the bus")
            if not os.read(read_end, 1):
                process.stop()
                raise RuntimeError(f"dbus-broker did not start:\n{process.log.text}")
        finally:
            os.close(read_end)
        self.address = f"unix:path={self.socket_path}"
        return process

    @property
    def pid(self) -> int:
        """The process id of the broker itself, which its launcher starts."""
        children = children_of(self.process.pid)
        (broker,) = (pid for pid in children if _name(pid) == "dbus-broker")
        return broker


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


BUSES: dict[str, type[PrivateBus]] = {"dbus-daemon": PrivateBus, "dbus-broker": PrivateBroker}
