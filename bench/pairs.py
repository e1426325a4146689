# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.pairs`: attach and detach once, by each way there is.

Raw ioctls, losetup, udisks2 and loopd, the latter two as root and as an ordinary user whom a real
polkitd is asked about; in turns, with udevd running for all.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from bench import raw, rig
from bench.results import Result, Target, alone, median, percentile
from loopd.fd import OwnedFd
from loopd.loop import attach as loop_attach
from loopd.loop import backing_file, loop_device
from loopd.loop.request import AttachRequest
from tests.harness import udisks
from tests.harness.bus import OUR_POLICY, POLKIT_POLICY, PrivateBus
from tests.harness.daemon import LIBRARIES
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.udev import Udev
from tests.harness.udisks import Udisks

ROUNDS = 5
PAIRS = 40
WARM_UP = 5
UDISKS_ACTION = "org.freedesktop.udisks2.loop-setup"
WHO = (("root", None), ("a user", rig.USER))
RAW, LOSETUP = "raw ioctls", "losetup"

Times = list[tuple[float, float]]
"""Seconds to attach and to detach, pair by pair."""
Contender = Callable[[int], Times]


def measure() -> Result:
    """Run all contenders in turns."""
    times: dict[str, Times] = {}
    with rig.image() as image, Udev():
        for _ in range(ROUNDS):
            for name, contender in contenders(image):
                contender(WARM_UP)
                times.setdefault(name, []).extend(contender(PAIRS))
    return summary(times)


def contenders(image: Path) -> Iterator[tuple[str, Contender]]:
    """Each way to get a loop device, ready to be timed until the next one is asked for."""
    yield RAW, lambda count: [raw.pair(image) for _ in range(count)]
    yield "loopd.loop", lambda count: [library_pair(image) for _ in range(count)]
    yield LOSETUP, lambda count: [losetup_pair(image) for _ in range(count)]
    if udisks.UDISKSD.exists():
        with ExitStack() as stack:
            bus = PrivateBus(policies=[OUR_POLICY, POLKIT_POLICY, udisks.POLICY])
            stack.enter_context(bus)
            rules = rules_allowing(UDISKS_ACTION, users=(rig.USER,))
            stack.enter_context(RealPolkit(bus, rules))
            stack.enter_context(Udisks(bus))
            for who, user in WHO:
                with rig.worker(bus, image, user) as worker:
                    yield f"udisks2, {who}", lambda count: worker.pairs(count, "udisks2")
    for library in LIBRARIES:
        with rig.running(library) as (bus, _):
            for who, user in WHO:
                with rig.worker(bus, image, user) as worker:
                    yield f"loopd, {library}, {who}", worker.pairs


def library_pair(image: Path) -> tuple[float, float]:
    """What loopd does to the kernel, without the bus."""
    with OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as file:
        begun = time.perf_counter()
        examined = backing_file.examine(file.fileno())
        device = loop_attach.attach(file, examined, AttachRequest())
        attached = time.perf_counter()
        if not loop_device.detach(device):
            device.close()  # udev looks at it
        return attached - begun, time.perf_counter() - attached


def losetup_pair(image: Path) -> tuple[float, float]:
    """Two processes, as in a script."""
    begun = time.perf_counter()
    made = subprocess.run(
        ["losetup", "-f", "--show", image], check=True, capture_output=True, text=True
    )
    attached = time.perf_counter()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)
    return attached - begun, time.perf_counter() - attached


def summary(times: dict[str, Times]) -> Result:
    """The table: medians of each half and of the pair, and ratios of the pairs' medians."""
    pairs = {name: [sum(each) for each in found] for name, found in times.items()}
    medians = {name: median(each) for name, each in pairs.items()}
    result = Result(
        title="One attach and one detach, ms",
        columns=["attach", "detach", "pair", "pair p99", "/ raw", "/ losetup", "udisks2 /"],
    )
    for name, found in times.items():
        pair = medians[name]
        other = medians.get(f"udisks2, {name.rpartition(', ')[2]}")
        result.rows[name] = [
            median([attach for attach, _ in found]),
            median([detach for _, detach in found]),
            pair,
            percentile(pairs[name], 99),
            pair / medians[RAW],
            pair / medians[LOSETUP],
            other / pair if other and name.startswith("loopd,") else None,
        ]
    if "udisks2, root" not in medians:
        result.notes.append("udisks2 is not installed")
    for library in LIBRARIES:
        root, user = (medians[f"loopd, {library}, {who}"] for who, _ in WHO)
        above = root - medians[RAW]
        result.targets += [
            Target(what=f"{library}: root above raw", measured=above, limit=1.5, unit=" ms"),
            Target(
                what=f"{library}: a user / losetup", measured=user / medians[LOSETUP], limit=0.7
            ),
        ]
        if other := medians.get("udisks2, a user"):
            what = f"{library}: udisks2 / loopd, a user"
            result.targets.append(Target(what=what, measured=other / user, limit=10, at_least=True))
    return result


if __name__ == "__main__":
    alone(measure)
