# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.killed`: a client with 256 devices is killed; how long until they are gone.

Unbound: the kernel has let go of each file. Gone: there is no node any more either. Beside it the
kernel by itself: CLR_FD and close one after the other, CTL_REMOVE by sixteen threads; and the same
where each device is written back first.
"""

import json
import os
import signal
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import raw, rig
from bench.raw import Bound
from bench.results import Result, Target, alone
from loopd.fd import OwnedFd
from loopd.loop import attach, backing_file, loop_device
from loopd.loop.request import AttachRequest
from tests.harness.bus import PrivateBus
from tests.harness.daemon import LIBRARIES

ROUNDS = 3
DEVICES = 256
RAW, SYNCED = "raw ioctls", "raw ioctls and fsync"
LIBRARY = "loopd.loop"


def measure() -> Result:
    """Kill one for each library, in turns with the kernel by itself."""
    times: dict[str, list[tuple[float, float]]] = {}
    with rig.image() as image:
        for _ in range(ROUNDS):
            for name in (RAW, SYNCED):
                by_kernel = raw.many(image, DEVICES, sync=name == SYNCED)
                times.setdefault(name, []).append((by_kernel.unbind, by_kernel.remove))
            times.setdefault(LIBRARY, []).append(by_itself(image))
            for library in LIBRARIES:
                with rig.running(library, rig.ROOM) as (bus, _):
                    times.setdefault(f"loopd, {library}", []).append(kill(bus, image))
    result = Result(
        title=f"{DEVICES} devices of a client that is killed, ms",
        columns=["unbound after", "/ raw", "gone after", "/ raw removal"],
    )
    medians = {
        name: [statistics.median(each) * 1000 for each in zip(*found, strict=True)]
        for name, found in times.items()
    }
    for name, (unbound, gone) in medians.items():
        ratios = [unbound / medians[RAW][0], gone / medians[RAW][1]]
        result.rows[name] = [unbound, ratios[0], gone, ratios[1]]
        if name.startswith("loopd,"):
            result.targets += [
                Target(what=f"{name}: unbound / raw", measured=ratios[0], limit=5),
                Target(what=f"{name}: gone / raw removal", measured=ratios[1], limit=2),
            ]
    return result


def by_itself(image: Path) -> tuple[float, float]:
    """What loopd does to the kernel, one device after the other, without the bus."""
    devices = []
    for _ in range(DEVICES):
        with OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as file:
            examined = backing_file.examine(file.fileno())
            devices.append(attach.attach(file, examined, AttachRequest()))
    bound = [Bound.now(each.number) for each in devices]
    begun = time.perf_counter()
    for each in devices:
        if not loop_device.detach(each):
            each.close()  # udev looks at it
    raw.wait_unbound(bound)
    unbound = time.perf_counter() - begun
    raw.remove_all(bound)
    return unbound, time.perf_counter() - begun


def kill(bus: PrivateBus, image: Path) -> tuple[float, float]:
    """Seconds from the kill until all are unbound, and until all are gone."""
    with victim(bus, image) as (pid, devices):
        begun = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        raw.wait_unbound(devices)
        unbound = time.perf_counter() - begun
        raw.wait_removed(devices)
        return unbound, time.perf_counter() - begun


@contextmanager
def victim(bus: PrivateBus, image: Path) -> Iterator[tuple[int, list[Bound]]]:
    """A process with that many devices."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with rig.clients(bus, 1, rig.USER) as clients:
                file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
                made = rig.attach_many(clients, file, DEVICES, rig.PARALLEL)
                with os.fdopen(writing, "w") as out:
                    json.dump([each.number for each in made], out)
                signal.pause()
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(1)
    os.close(writing)
    try:
        with os.fdopen(reading) as told:
            yield child, [Bound.now(number) for number in json.loads(told.read())]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    alone(measure)
