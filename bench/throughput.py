# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.throughput`: reads and writes through a device, beside a device of losetup's.

By fio, with direct I/O on both sides of both devices, which are of the same file, in turns.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import rig
from bench.results import Result, Target, alone
from loopd.client import blocking
from tests.harness.area import area
from tests.harness.daemon import LIBRARIES

ROUNDS = 9
SECONDS = 1
SIZE = 256 << 20
JOBS = {
    "random reads, 4 KiB, 16 at a time": ("randread", "4k", 16),
    "random writes, 4 KiB, 16 at a time": ("randwrite", "4k", 16),
    "random reads, 4 KiB, one by one": ("randread", "4k", 1),
    "reads in a row, 1 MiB": ("read", "1m", 4),
}
Found = dict[str, list[tuple[float, float]]]


def measure() -> Result:
    """Run each job on each device."""
    result = Result(
        title="Through the device",
        columns=["MiB/s losetup", "loopd", "ratio", "us losetup", "loopd", "ratio"],
    )
    with area("throughput") as directory, rig.running(LIBRARIES[0]) as (bus, _):
        image = directory / "disk.img"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
            while file.tell() < SIZE:  # extents that are not written yet read faster
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        # Of the same file, so that both have the same places on the disk.
        with blocking.Client.connect(bus.address) as client, losetup(image) as theirs:
            ours = client.attach(str(image), direct_io=True, allow_overlap=True).node
            for name, job in JOBS.items():
                found: dict[str, list[tuple[float, float]]] = {theirs: [], ours: []}
                for count in range(ROUNDS):
                    for node in (theirs, ours) if count % 2 else (ours, theirs):
                        found[node].append(fio(directory, node, *job))
                rates = [statistics.median(each[0] for each in found[n]) for n in (theirs, ours)]
                waits = [statistics.median(each[1] for each in found[n]) for n in (theirs, ours)]
                ratios = rates[1] / rates[0], waits[1] / waits[0]
                result.rows[name] = [*rates, ratios[0], *waits, ratios[1]]
                result.targets.append(
                    Target(
                        what=f"{name}: loopd / losetup",
                        measured=ratios[0],
                        limit=0.98,
                        at_least=True,
                    )
                )
    return result


@contextmanager
def losetup(image: Path) -> Iterator[str]:
    """A device that losetup has made."""
    command = ["losetup", "-f", "--show", "--direct-io=on", image]
    node = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "-d", node], check=True)


def fio(where: Path, node: str, how: str, size: str, depth: int) -> tuple[float, float]:
    """MiB a second, and the mean latency in microseconds."""
    options = {
        "name": "bench",
        "filename": node,
        "rw": how,
        "bs": size,
        "iodepth": str(depth),
        "direct": "1",
        "ioengine": "libaio",
        "time_based": "1",
        "runtime": str(SECONDS),
        "ramp_time": "0.2",
        "output-format": "json",
    }
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
    # It writes into the directory where it runs.
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=where)
    (job,) = json.loads(done.stdout)["jobs"]
    told = job["write" if "write" in how else "read"]
    return told["bw_bytes"] / (1 << 20), told["lat_ns"]["mean"] / 1000


if __name__ == "__main__":
    alone(measure)
