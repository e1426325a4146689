# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.many`: what it costs to have 512 devices: lists of them, and one pair more."""

import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack

from bench import raw, rig
from bench.results import Result, Target, alone, median
from tests.harness.caller import MANAGER, OBJECT_MANAGER
from tests.harness.daemon import LIBRARIES

CYCLE = (0, 64, 512, 64)
"""How many devices there are, up and down; each count is compared with none of the same cycle, as a
machine's moods change within a minute."""
CYCLES = 3
STEPS = (*CYCLE * CYCLES, 0)
PAIRS = 60
LISTS = 20


def measure() -> Result:
    """Attach and detach one while there are so many others."""
    result = Result(
        title="With many devices, ms; bytes of the answers",
        columns=["pair", "/ without", "ListDevices", "bytes", "GetManagedObjects", "bytes"],
    )
    most = max(STEPS)
    for library in LIBRARIES:
        pairs: dict[int, list[float]] = {}
        medians: list[float] = []
        lists = {}
        for count, worker in with_devices(library):
            worker.pairs(5)
            found = [sum(pair) for pair in worker.pairs(PAIRS)]
            pairs.setdefault(count, []).extend(found)
            medians.append(median(found))
            if count not in lists:
                lists[count] = [
                    worker.do("calls", MANAGER, "ListDevices", LISTS),
                    worker.do("calls", OBJECT_MANAGER, "GetManagedObjects", LISTS),
                ]
        for count, found in pairs.items():
            ratio = growth(medians, count)
            told = [cell for times, size in lists[count] for cell in (median(times), str(size))]
            result.rows[f"{library}, {count}"] = [median(found), ratio, *told]
            if count:
                what = f"{library}: a pair with {count} devices / without"
                result.targets.append(Target(what=what, measured=ratio, limit=1.2))
    with rig.image() as image, raw.opened(image) as (control, file):
        without = median([sum(raw.pair(image)) for _ in range(PAIRS)])
        loops = [raw.attach(control, file)[1] for _ in range(most)]
        found = median([sum(raw.pair(image)) for _ in range(PAIRS)])
        devices = [raw.Bound.now(number_of(loop)) for loop in loops]
        for loop in loops:
            raw.detach(loop)
        raw.remove_all(devices)
    result.rows["raw, 0"] = [without, 1.0, None, None, None, None]
    result.rows[f"raw, {most}"] = [found, found / without, None, None, None, None]
    return result


def growth(medians: list[float], count: int) -> float:
    """How much longer a pair took with so many devices, by the medians of all steps."""
    ratios = []
    for first in range(0, len(STEPS) - 1, len(CYCLE)):
        cycle = slice(first, first + len(CYCLE) + 1)
        by_count: dict[int, list[float]] = {}
        for step, each in zip(STEPS[cycle], medians[cycle], strict=True):
            by_count.setdefault(step, []).append(each)
        ratios.append(statistics.mean(by_count[count]) / statistics.mean(by_count[0]))
    return statistics.median(ratios)


def with_devices(library: str) -> Iterator[tuple[int, rig.Worker]]:
    """A program of root's while there are so many devices of others."""
    with ExitStack() as stack:
        # The worker's own, and one that is attached many times over.
        images = [stack.enter_context(rig.image()) for _ in range(2)]
        bus, _ = stack.enter_context(rig.running(library))
        worker = stack.enter_context(rig.worker(bus, images[0]))
        file = os.open(images[1], os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, file)
        held: list[tuple[int, ExitStack, list[raw.Bound]]] = []
        there = 0
        for count in STEPS:
            if count > there:
                more = ExitStack()
                clients = more.enter_context(rig.clients(bus, 1))
                made = rig.attach_many(clients, file, count - there, rig.PARALLEL)
                held.append((there, more, made))
            elif count < there:
                before, less, gone = held.pop()
                assert before == count
                less.close()
                raw.wait_removed(gone)
            there = count
            yield count, worker


def number_of(loop: int) -> int:
    """The number of an open device."""
    return int(os.readlink(f"/proc/self/fd/{loop}").removeprefix("/dev/loop"))


if __name__ == "__main__":
    alone(measure)
