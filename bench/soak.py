# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.soak [STEPS]`: random operations on the real kernel, 10,000 by default.

Attach, detach, lazy detach, open, close, resize, partitions, locks, clears by others and errors in
the midst of an attach, compared with what should be after each step. Ends with a failure at the
first difference, with the steps that lead to it.
"""

import argparse
import time

import hypothesis

from tests.harness import leaks, machine

_RUNS = 20


def main() -> None:
    """Run for so many steps and say how many there were."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("steps", type=int, nargs="?", default=10_000)
    wanted = parser.parse_args().steps
    hypothesis.settings.register_profile("soak", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("soak")
    leaks.adopt_orphans()
    begun, taken, shown = time.monotonic(), 0, 0
    while taken < wanted:
        taken += machine.run(real=True, examples=_RUNS)
        if taken - shown >= 1000 or taken >= wanted:
            print(f"{taken} steps in {time.monotonic() - begun:.0f} s", flush=True)
            shown = taken


if __name__ == "__main__":
    main()
