# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: attach and detach by raw ioctls, by losetup, and by loopd for root and for a user.

All in one run on one machine, in turns, so that its moods meet all alike: compare the ratios, not
the milliseconds. A table goes to the terminal; with a file name as argument, JSON goes there.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loopd import attachment, backing, kernel, loopdev, uapi
from loopd.fd import OwnedFd
from loopd.request import AttachRequest
from tests.harness import images
from tests.harness.area import area
from tests.harness.bus import PrivateBus
from tests.harness.daemon import LIBRARIES, Daemon
from tests.harness.polkit import RealPolkit, rules_allowing

ROUNDS = 5
PAIRS = 40
WARM_UP = 5
USER = "nobody"

Times = list[tuple[float, float]]
"""Seconds to attach and to detach, pair by pair."""
Contender = Callable[[int], Times]

_WORKER = Path(__file__).with_name("worker.py")
# An ordinary user may not be able to enter the checkout; Debian's Python has all it needs.
_PYTHON = getattr(sys, "_base_executable", sys.executable)


def main() -> None:
    """Run all contenders in turns and print the table."""
    times: dict[str, Times] = {}
    with area("bench") as directory:
        image = images.make_sparse(directory / "disk.img", 8 << 20, owner=USER)
        for _ in range(ROUNDS):
            for name, contender in contenders(image):
                contender(WARM_UP)
                times.setdefault(name, []).extend(contender(PAIRS))
    results = {name: summary(each) for name, each in times.items()}
    show(results)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=2) + "\n")


def contenders(image: Path) -> Iterator[tuple[str, Contender]]:
    """Each way to get a loop device, ready to be timed until the next one is asked for."""
    yield "raw ioctls", lambda count: [raw_pair(image) for _ in range(count)]
    yield "loopd.loopdev", lambda count: [library_pair(image) for _ in range(count)]
    yield "losetup", lambda count: [losetup_pair(image) for _ in range(count)]
    for library in LIBRARIES:
        with ExitStack() as stack:
            bus = stack.enter_context(PrivateBus())
            rules = rules_allowing("org.example.loop1.attach", users=(USER,))
            stack.enter_context(RealPolkit(bus, rules))
            stack.enter_context(Daemon(bus, library=library))
            for who, user in (("root", None), ("a user, polkit", USER)):
                with worker(bus.address, image, user) as contender:
                    yield f"loopd, {library}, {who}", contender


def raw_pair(image: Path) -> tuple[float, float]:
    """The least a program can do: no locks, no checks, nothing removed."""
    file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    control = kernel.open_loop_control()
    begun = time.perf_counter()
    number = kernel.loop_ctl_get_free(control)
    loop = kernel.open_loop(number, os.O_RDWR)
    config = uapi.loop_config(fd=file, block_size=512)
    config.info.lo_flags = uapi.LO_FLAGS_AUTOCLEAR
    kernel.loop_configure(loop, config)
    attached = time.perf_counter()
    kernel.loop_clr_fd(loop)
    os.close(loop)
    detached = time.perf_counter()
    os.close(control)
    os.close(file)
    return attached - begun, detached - attached


def library_pair(image: Path) -> tuple[float, float]:
    """What loopd does to the kernel, without the bus."""
    with OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as file:
        begun = time.perf_counter()
        examined = backing.examine(file.fileno())
        device = attachment.attach(file, examined, AttachRequest())
        attached = time.perf_counter()
        if not loopdev.detach(device):
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


@contextmanager
def worker(address: str, image: Path, user: str | None) -> Iterator[Contender]:
    """A Gio program of this user."""
    process = subprocess.Popen(
        [_PYTHON, "-I", "-c", _WORKER.read_text(), address, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=user,
        cwd="/",
    )
    with process:

        def contender(count: int) -> Times:
            assert process.stdin
            assert process.stdout
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            return [(attach, detach) for attach, detach in json.loads(process.stdout.readline())]

        yield contender


def summary(times: Times) -> dict[str, float]:
    """Milliseconds: medians of each half and of the pair, and the pair's 99th percentile."""
    pairs = [attach + detach for attach, detach in times]
    return {
        "attach": statistics.median(attach for attach, _ in times) * 1000,
        "detach": statistics.median(detach for _, detach in times) * 1000,
        "pair": statistics.median(pairs) * 1000,
        "pair_p99": statistics.quantiles(pairs, n=100)[98] * 1000,
        "pairs": len(pairs),
    }


def show(results: dict[str, dict[str, float]]) -> None:
    """Print the table; the last columns are ratios of the pairs' medians."""
    raw, losetup = results["raw ioctls"]["pair"], results["losetup"]["pair"]
    print(f"{'ms, medians':34}{'attach':>8}{'detach':>8}{'pair':>8}{'p99':>8}", end="")
    print(f"{'/ raw':>8}{'/ losetup':>11}")
    for name, row in results.items():
        print(f"{name:34}{row['attach']:8.2f}{row['detach']:8.2f}{row['pair']:8.2f}", end="")
        print(f"{row['pair_p99']:8.2f}{row['pair'] / raw:8.1f}{row['pair'] / losetup:11.2f}")


if __name__ == "__main__":
    main()
