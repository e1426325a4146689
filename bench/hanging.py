# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.hanging`: how long others wait while files of one user hang.

An administrator has allowed the filesystem. As many of its files as may be under way at a time are
being attached, and none of their reads is answered. Shown are the median and the 99th percentile of
another user's answers, in milliseconds, before that and meanwhile.
"""

from contextlib import ExitStack, suppress
from pathlib import Path

from bench.flood import VICTIM, as_victim, attach, list_devices, percentiles
from tests.harness import images
from tests.harness.daemon import LIBRARIES
from tests.harness.fuse import Fuse
from tests.harness.polkit import rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import USER, World, make_world

CONFIG = 'trusted_filesystems = ["fuse"]\n[deadlines]\noperation = 60\n'
HANGING = 16
SECONDS = 3.0


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


def measured(world: World, image: Path) -> str:
    """The other user's answers."""
    lists = as_victim(lambda: list_devices(world.bus, SECONDS))
    attaches = as_victim(lambda: attach(world.bus, image))
    return f"{percentiles(lists, 8)} {percentiles(attaches, 7)}"


if __name__ == "__main__":
    main()
