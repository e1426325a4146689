# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.clients`: 256 attaches by 16 clients at a time, beside the raw rate."""

import os
import statistics
import time

from bench import raw, rig
from bench.results import Result, Target, alone
from tests.harness.daemon import LIBRARIES

ROUNDS = 3
DEVICES = 256
CLIENTS = 16
RAW = "raw ioctls, one after the other"


def measure() -> Result:
    """Attach that many in turns with the kernel by itself."""
    times: dict[str, list[float]] = {}
    with rig.image() as image:
        for _ in range(ROUNDS):
            times.setdefault(RAW, []).append(raw.many(image, DEVICES).attach)
            for library in LIBRARIES:
                for who, user in (("root", None), ("a user", rig.USER)):
                    file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
                    with rig.running(library, rig.ROOM) as (bus, _):
                        with rig.clients(bus, CLIENTS, user) as clients:
                            rig.attach_many(clients, file, CLIENTS, 1)  # imports, threads
                            begun = time.perf_counter()
                            made = rig.attach_many(clients, file, DEVICES, 1)
                            taken = time.perf_counter() - begun
                        raw.wait_removed(made)
                    os.close(file)
                    times.setdefault(f"loopd, {library}, {who}", []).append(taken)
    rates = {name: DEVICES / statistics.median(each) for name, each in times.items()}
    result = Result(
        title=f"{DEVICES} attaches by {CLIENTS} clients", columns=["attaches/s", "of the raw rate"]
    )
    for name, rate in rates.items():
        result.rows[name] = [rate, rate / rates[RAW]]
        if name != RAW:
            target = Target(what=name, measured=rate / rates[RAW], limit=0.7, at_least=True)
            result.targets.append(target)
    return result


if __name__ == "__main__":
    alone(measure)
