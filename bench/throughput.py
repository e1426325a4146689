# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.throughput`: reads and writes through a device, beside a device of losetup's.

By fio, with direct I/O on both sides of both devices, which are of the same file: a file in memory,
so that the devices are what is compared, and not a disk. Both at once, so that the machine's moods
meet both alike, each of them first in every other run.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import rig
from bench.results import Cell, Result, Target, alone
from loopd.client import blocking
from tests.harness.daemon import LIBRARIES

ROUNDS = 14
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
    with rig.runtime_directory() as directory, rig.running(LIBRARIES[0]) as (bus, _):
        directory.mkdir()
        image = directory / "disk.img"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
            while file.tell() < SIZE:  # what is not written yet reads faster
                file.write(os.urandom(1 << 20))
        # Of the same file, so that both have the same places on the disk.
        with blocking.Client.connect(bus.address) as client, losetup(image) as theirs:
            ours = client.attach(str(image), direct_io=True, allow_overlap=True).node
            for name, job in JOBS.items():
                found: dict[str, list[tuple[float, float]]] = {theirs: [], ours: []}
                for count in range(ROUNDS):
                    nodes = (theirs, ours) if count % 2 else (ours, theirs)
                    for node, each in zip(nodes, fio(directory, nodes, *job), strict=True):
                        found[node].append(each)
                cells: list[Cell] = []
                ratios = []
                for what in (0, 1):
                    pairs = [
                        (one[what], other[what])
                        for one, other in zip(found[theirs], found[ours], strict=True)
                    ]
                    ratios.append(statistics.median(other / one for one, other in pairs))
                    medians = [statistics.median(each) for each in zip(*pairs, strict=True)]
                    cells += [*medians, ratios[-1]]
                result.rows[name] = cells
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


def fio(
    where: Path, nodes: tuple[str, ...], how: str, size: str, depth: int
) -> list[tuple[float, float]]:
    """MiB a second, and the mean latency in microseconds, of several devices at the same time."""
    options = {
        "rw": how,
        "bs": size,
        "iodepth": str(depth),
        "direct": "1",
        "ioengine": "libaio",
        "time_based": "1",
        "runtime": str(SECONDS),
        "ramp_time": "200ms",
        "output-format": "json",
    }
    # What stands before the first job counts for all.
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
    for node in nodes:
        command += [f"--name={node}", f"--filename={node}"]
    # It writes into the directory where it runs.
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=where)
    told = [each["write" if "write" in how else "read"] for each in json.loads(done.stdout)["jobs"]]
    return [(each["bw_bytes"] / (1 << 20), each["lat_ns"]["mean"] / 1000) for each in told]


if __name__ == "__main__":
    alone(measure)
