# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: what loopd costs beside what a user might take instead, in one run on one machine.

    python -m bench [-o RESULTS.json] [MODULE...]

Contenders take turns, so that a machine's moods meet all alike: compare the ratios, not the
milliseconds. Tables go to the terminal, and with -o everything goes to a file, as JSON.
`python -m bench.document RESULTS.json` puts that into docs/performance.md.
"""

import argparse
import importlib
import os
import platform
import time
from pathlib import Path

from bench.results import Result, dumped
from loopd.bus import codec

MODULES = (
    "pairs",
    "floor",
    "steps",
    "clients",
    "killed",
    "many",
    "changes",
    "start",
    "rest",
    "throughput",
)


def main() -> None:
    """Run the modules one after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("-o", dest="output", type=Path, metavar="RESULTS.json")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(MODULES))
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(MODULES):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    results: dict[str, Result] = {}
    begun, load = time.monotonic(), os.getloadavg()[0]
    for name in arguments.modules or MODULES:
        results[name] = importlib.import_module(f"bench.{name}").measure()
        print(results[name].text(), flush=True)
    machine = about_the_machine(load)
    print(f"{machine['processors']} processors, {machine['kernel']}; load before: {load:.1f}")
    print(f"{time.monotonic() - begun:.0f} s in all")
    if arguments.output:
        arguments.output.parent.mkdir(exist_ok=True, parents=True)
        arguments.output.write_text(dumped(results, machine))


def about_the_machine(load: float) -> dict[str, str]:
    """What a reader has to know to compare."""
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "library": codec.LIBRARY,
        "load before": f"{load:.1f}",
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
