# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.hanging`: how long others wait while files of one user hang.

An administrator has allowed the filesystem. As many of its files as may be under way at a time are
being attached, and none of their reads is answered. Shown are the median and the 99th percentile of
another user's answers, in milliseconds, before that and meanwhile.

Then files of seventeen users hang when they are closed, with one of them as many as are taken of
one user. Shown is how long newcomers, root among them, wait for a device that their first message
asks for, and for its end.
"""

import statistics
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from bench.flood import VICTIM, as_victim, attach, list_devices, percentiles
from tests.harness import images
from tests.harness.daemon import LIBRARIES
from tests.harness.fuse import Fuse
from tests.harness.hanging import CROWD, hang_fds, opened, serve_newcomer
from tests.harness.polkit import rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import USER, World, make_world

CONFIG = 'trusted_filesystems = ["fuse"]\n[deadlines]\noperation = 60\n'
HANGING = 16
SECONDS = 3.0
NEWCOMERS = 60


def main() -> None:
    """Measure under each library, and print the table."""
    rules = rules_allowing("org.example.loop1.attach", users=(VICTIM, USER))
    print(f"{'library':10} {'':10} {'ListDevices':>17} {'Attach':>15}")
    print(f"{'':10} {'':10} {'p50':>8} {'p99':>8} {'p50':>7} {'p99':>7}")
    for library in LIBRARIES:
        with ExitStack() as stack:
            world = stack.enter_context(make_world(library=library, config=CONFIG, authority=rules))
            stack.enter_context(world.test())
            image = images.make_sparse(world.new_path(), 8 << 20, owner=VICTIM)

            print(f"{library:10} {'quiet':10} {measured(world, image)}", flush=True)
            with Fuse() as fuse:
                owner = world.caller()
                file = owner.open(fuse.file)
                fuse.hang("READ")
                options = {"sector_size": 0, "allow_overlap": True}  # its partition table is read
                calls = [owner.attach_begin(file, **options) for _ in range(HANGING)]
                fuse.wait_kept()
                print(f"{library:10} {'hanging':10} {measured(world, image)}", flush=True)
                fuse.release()
                for call in calls:
                    with suppress(CallError):
                        call.end()
                file.close()
                owner.close()
        closes(library)


def closes(library: str) -> None:
    """Measure newcomers, among them root, while closes hang."""
    # Without our policy, so that a call of no method brings its fd.
    options = {"library": library, "policies": [], "accounts": CROWD}
    with make_world(**options) as made, made.test() as world, ExitStack() as stack:
        fuses = [stack.enter_context(Fuse()) for _ in range(1 + len(CROWD) // 2)]
        fds = [stack.enter_context(opened(fuse)) for fuse in fuses]
        image = world.image()
        print(f"{library:10} {'quiet':10} {newcomers(world, image)}", flush=True)
        hang_fds(world, fuses[0], fds[0], USER, USER)
        print(f"{library:10} {'one user':10} {newcomers(world, image)}", flush=True)
        for number, fuse in enumerate(fuses[1:]):
            hang_fds(world, fuse, fds[1 + number], *CROWD[2 * number : 2 * number + 2])
        print(f"{library:10} {'17 users':10} {newcomers(world, image)}", flush=True)
        for fuse in fuses:
            fuse.release()
        world.wait_idle_fds()


def newcomers(world: World, image: Path) -> str:
    """The median and the longest time from connecting to a device, which is detached again."""
    times = []
    for number in range(NEWCOMERS):
        begun = time.monotonic()
        serve_newcomer(world, (None, VICTIM)[number % 2], image, 60)
        times.append((time.monotonic() - begun) * 1000)
    return f"newcomers: {statistics.median(times):6.1f} {max(times):6.1f}"


def measured(world: World, image: Path) -> str:
    """The other user's answers."""
    lists = as_victim(lambda: list_devices(world.bus, SECONDS))
    attaches = as_victim(lambda: attach(world.bus, image))
    return f"{percentiles(lists, 8)} {percentiles(attaches, 7)}"


if __name__ == "__main__":
    main()
