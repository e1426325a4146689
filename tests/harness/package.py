# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd, put into a booted machine as its users get it."""

import subprocess

from tests.harness.area import CHECKOUT
from tests.harness.booted import Machine


def install(machine: Machine) -> None:
    """Install loopd."""
    subprocess.run(
        ["make", "install", f"DESTDIR={machine.path('/')}", "PREFIX=/usr"],
        cwd=CHECKOUT,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    machine.run("systemctl", "daemon-reload")
    machine.run("udevadm", "control", "--reload")
    machine.run("busctl", "call", *["org.freedesktop.DBus"] * 1, "/org/freedesktop/DBus", "org.freedesktop.DBus", "ReloadConfig")
