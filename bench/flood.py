# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.flood [SECONDS]`: what one client's flood costs another, on both buses.

While one user floods loopd with calls of a kind, another calls ListDevices over and over for so
many seconds, and then attaches and detaches by loopd.client. Shown are the median and the 99th
percentile of its answers, in milliseconds, and the most memory that loopd has had.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from loopd.client import blocking
from tests.harness import broker, images
from tests.harness.area import area
from tests.harness.broker import BUSES, PrivateBroker
from tests.harness.bus import PrivateBus
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.daemon import LIBRARIES, Daemon
from tests.harness.flood import KINDS, flood
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.raw import RawClient

FLOODER = "nobody"
VICTIM = "games"
ATTACHES = 120
AS_THE_UNIT = ("nice", "--adjustment=-10")
"""The priority that loopd.service gives."""

Times = list[float]
"""Seconds."""


def main() -> None:
    """Run every kind of flood on every bus under every library, and print the table."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    chosen = sys.argv[2:]
    print(
        f"{'bus':12} {'library':10} {'flood':17} {'ListDevices':>17} {'Attach':>15}"
        f" {'memory':>8} {'loopd':>6}"
    )
    print(
        f"{'':12} {'':10} {'':17} {'p50':>8} {'p99':>8} {'p50':>7} {'p99':>7} {'MiB':>8} {'CPU':>6}"
    )
    for bus_name, bus_type in BUSES.items():
        if bus_type is PrivateBroker and not broker.installed():
            print(f"{bus_name:12} is not installed")
            continue
        for library in LIBRARIES:
            for kind in ("none", *KINDS):
                if chosen and not {bus_name, library, kind} >= set(chosen):
                    continue
                result = measure(bus_type, library, kind, seconds)
                print(f"{bus_name:12} {library:10} {kind:17} {result}", flush=True)


def measure(bus_type: type[PrivateBus], library: str, kind: str, seconds: float) -> str:
    """One row of the table."""
    with ExitStack() as stack:
        directory = stack.enter_context(area("flood"))
        image = images.make_sparse(directory / "disk.img", 8 << 20, owner=VICTIM)
        bus = stack.enter_context(bus_type())
        rules = rules_allowing("org.example.loop1.attach", users=(VICTIM, FLOODER))
        stack.enter_context(RealPolkit(bus, rules))
        daemon = stack.enter_context(Daemon(bus, library=library, within=AS_THE_UNIT))
        if kind != "none":
            stack.enter_context(flood(bus, kind, FLOODER))
        # What the flood takes to fill every queue on the way.
        as_victim(lambda: list_devices(bus, 1.0))
        before, begun = cpu_seconds(daemon.pid), time.monotonic()
        lists = as_victim(lambda: list_devices(bus, seconds))
        share = (cpu_seconds(daemon.pid) - before) / (time.monotonic() - begun)
        attaches = as_victim(lambda: attach(bus, image))
        return (
            f"{percentiles(lists, 8)} {percentiles(attaches, 7)}"
            f" {peak_memory(daemon.pid) / (1 << 20):8.1f} {share:6.0%}"
        )


def as_victim(work: Callable[[], Times]) -> Times:
    """Do something in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with os.fdopen(writing, "w") as out:
                json.dump(work(), out)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as result:
        text = result.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the victim failed")
    times: Times = json.loads(text)
    return times


def list_devices(bus: PrivateBus, seconds: float) -> Times:
    """The victim's calls of ListDevices, one after the other."""
    times = []
    end = time.monotonic() + seconds
    with RawClient(bus.address, user=VICTIM) as client:
        while (begun := time.monotonic()) < end:
            client.call(MANAGER_PATH, MANAGER, "ListDevices", timeout=60)
            times.append(time.monotonic() - begun)
    return times


def attach(bus: PrivateBus, image: Path) -> Times:
    """The victim's calls of Attach."""
    times = []
    uid = os.stat(image).st_uid
    os.setresgid(uid, uid, uid)
    os.setgroups([])
    os.setresuid(uid, uid, uid)
    with blocking.Client.connect(bus.address) as client:
        for _ in range(ATTACHES):
            begun = time.monotonic()
            device = client.attach(str(image))
            times.append(time.monotonic() - begun)
            device.detach(lazy=True)
    return times


def percentiles(times: Times, width: int) -> str:
    """The median and the 99th percentile in milliseconds, the worst where they are few."""
    worst = statistics.quantiles(times, n=100)[98] if len(times) >= 100 else max(times)
    return f"{statistics.median(times) * 1000:{width}.1f} {worst * 1000:{width}.1f}"


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """The most bytes that a process has had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
