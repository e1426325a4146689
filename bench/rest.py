# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.rest`: what loopd takes at rest, and what it keeps after work.

Memory idle, with 512 devices, and after 100,000 calls; processor time and wake-ups in half a minute
with 512 devices. The watchdog, which is systemd's, does not run here.
"""

import os
import select
import socket
import time

from bench import raw, rig
from bench.results import Result, Target, alone
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.daemon import LIBRARIES

DEVICES = 512
CALLS = 100_000
SECONDS = 30.0
MIB = 1 << 20


def measure() -> Result:
    """Let it rest and work, under each library."""
    result = Result(
        title=f"At rest, MiB; in {SECONDS:.0f} s with {DEVICES} devices",
        columns=["idle", f"{DEVICES} devices", f"{CALLS} calls", "CPU ms", "wake-ups", "of others"],
    )
    for library in LIBRARIES:
        with rig.image() as image, rig.running(library) as (bus, daemon):
            with rig.clients(bus, 1) as (client,):
                client.call(MANAGER_PATH, MANAGER, "ListDevices")
                idle = daemon.rss()
                file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
                made = rig.attach_many([client], file, DEVICES, rig.PARALLEL)
                os.close(file)
                full = daemon.rss()
                time.sleep(2)  # udevd has looked at them
                cpu, woken, events = at_rest(daemon.pid)
            raw.wait_removed(made)
            with rig.clients(bus, 1) as (client,):
                rig.call_often(client, CALLS)
                worked = daemon.rss()
        result.rows[library] = [idle / MIB, full / MIB, worked / MIB, cpu * 1000, woken, events]
        idle_target = Target(what=f"{library}: idle", measured=idle / MIB, limit=32, unit=" MiB")
        result.targets.append(idle_target)
        if events:
            result.notes.append(
                f"{library}: {events} events of others woke it up: no telling what else did"
            )
        else:
            what = f"{library}: wake-ups but for the watchdog's"
            result.targets.append(Target(what=what, measured=woken, limit=0))
    return result


def at_rest(pid: int) -> tuple[float, int, int]:
    """Processor time, wake-ups, and events about others' devices that it had to hear."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 15) as kernel:
        kernel.bind((0, 1))
        poll = select.poll()
        poll.register(kernel, select.POLLIN)
        events = 0
        cpu, woken = rig.cpu_seconds(pid), rig.switches(pid)
        end = time.monotonic() + SECONDS
        while (left := end - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                events += b"SUBSYSTEM=block" in kernel.recv(1 << 16)
        return rig.cpu_seconds(pid) - cpu, rig.switches(pid) - woken, events


if __name__ == "__main__":
    alone(measure)
