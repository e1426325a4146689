# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.changes`: 1,000 changes of a device a second, for loopd and for who listens.

The size of somebody else's device is changed that often, which the kernel tells each time. A client
listens by loopd.client; another one calls ListDevices meanwhile.
"""

import json
import os
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from bench import raw, rig
from bench.flood import as_victim, list_devices
from bench.results import Result, alone, median, percentile
from loopd.client import blocking
from loopd.loop import kernel
from tests.harness.bus import PrivateBus
from tests.harness.daemon import LIBRARIES

SECONDS = 3.0
RATE = 1000
BASE = 8 << 20


def measure() -> Result:
    """Change a device and listen, under each library."""
    result = Result(
        title=f"{RATE} changes of a device a second, ms",
        columns=[
            *("changes/s", "heard/s", "latency", "p99", "loopd CPU", "client CPU"),
            *("ListDevices", "p99", "quiet", "p99"),
        ],
    )
    for library in LIBRARIES:
        with rig.image(BASE) as image, rig.running(library) as (bus, daemon):
            quiet = as_victim(lambda: list_devices(bus, 1.0))
            with raw.opened(image) as (control, file):
                number, loop = raw.attach(control, file)
                bound = raw.Bound.now(number)
                listener = Child(partial(listen, bus, number, loop))
                changing = Child(partial(change, file, loop))
                before = rig.cpu_seconds(daemon.pid)
                lists = as_victim(lambda: list_devices(bus, SECONDS))
                share = (rig.cpu_seconds(daemon.pid) - before) / SECONDS
                made = changing.result()
                raw.detach(loop)
                told = listener.result()
                raw.wait_unbound([bound])
                raw.remove(bound)
            at = {size: when for when, size in made}
            late = [when - at[size] for when, size in told["changes"] if size in at]
            seconds = made[-1][0] - made[0][0]
            result.rows[library] = [
                *(len(made) / seconds, len(late) / seconds, median(late), percentile(late, 99)),
                *(f"{share:.0%}", f"{told['cpu'] / seconds:.0%}"),
                *(median(lists), percentile(lists, 99), median(quiet), percentile(quiet, 99)),
            ]
    return result


def change(file: int, loop: int, ready: Callable[[], None]) -> list[tuple[float, int]]:
    """Change the size of a device; when it was which."""
    changes = []
    ready()
    begun = time.monotonic()
    for count in range(1, int(SECONDS * RATE)):
        time.sleep(max(begun + count / RATE - time.monotonic(), 0))
        size = BASE + 512 * count
        os.ftruncate(file, size)
        changes.append((time.monotonic(), size))
        kernel.loop_set_capacity(loop)
    return changes


def listen(bus: PrivateBus, number: int, loop: int, ready: Callable[[], None]) -> dict[str, Any]:
    """Write down when a client hears of which size, until the device is gone."""
    os.close(loop)  # our copy, which would keep it
    changes = []
    with blocking.Client.connect(bus.address) as client, client.changes() as heard:
        ready()
        begun = time.process_time()
        for change in heard:
            if change.device.node == f"/dev/loop{number}":
                if change.kind == "detached":
                    break
                changes.append((time.monotonic(), change.properties.size))
        return {"changes": changes, "cpu": time.process_time() - begun}


class Child:
    """Something done in a process of its own, to be waited for."""

    def __init__(self, work: Callable[[Callable[[], None]], Any]) -> None:
        """Begin it; it calls what it is given once it is ready."""
        reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                with os.fdopen(writing, "w") as out:
                    print(json.dumps(work(lambda: print(file=out, flush=True))), file=out)
            except Exception:  # noqa: BLE001  whoever waits for a result sees that there is none
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        self._told = os.fdopen(reading)
        self._told.readline()

    def result(self) -> Any:
        """Wait for its end."""
        with self._told as told:
            text = told.read()
        os.waitpid(self._pid, 0)
        return json.loads(text)


if __name__ == "__main__":
    alone(measure)
