# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run by root where systemd has loopd installed: how long a call takes that has the unit started.

Argument: how often. Prints a list of pairs as JSON, the seconds of such a call and those of
`python3 -c 'import asyncio'` there. It stops loopd each time, unless that has devices.
"""

import json
import subprocess
import sys
import time

from gi.repository import Gio

NAME, PATH, UNIT = "org.example.Loop1", "/org/example/Loop1", "loopd.service"


def started(bus):
    """Call it while it does not run."""
    begun = time.perf_counter()
    reply = bus.call_sync(
        NAME, PATH, NAME, "ListDevices", None, None, Gio.DBusCallFlags.NONE, -1, None
    )
    taken = time.perf_counter() - begun
    if any(reply.unpack()[0]):
        raise SystemExit("loopd has devices here, and is left alone")
    subprocess.run(["systemctl", "stop", UNIT], check=True)
    return taken


def bare():
    """Python itself, with what loopd needs at least."""
    begun = time.perf_counter()
    subprocess.run(["/usr/bin/python3", "-I", "-c", "import asyncio"], check=True)
    return time.perf_counter() - begun


def main(count):
    """Take turns."""
    bus = Gio.bus_get_sync(Gio.BusType.SYSTEM, None)
    subprocess.run(["systemctl", "stop", UNIT], check=True)
    started(bus), bare()  # the first ones read from disk
    print(json.dumps([(started(bus), bare()) for _ in range(count)]))


main(int(sys.argv[1]))
