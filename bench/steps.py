# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.steps`: what a pair consists of: threads, events, looks, signals, questions.

Counted, not timed, so that it is the same on every machine, as long as nobody else attaches and
detaches meanwhile.
"""

import json
from pathlib import Path

from bench import rig
from bench.results import Result, alone
from tests.harness.bus import PrivateBus
from tests.harness.daemon import LIBRARIES, Daemon
from tests.harness.polkit import RealPolkit, rules_allowing

PAIRS = 50
PRELUDE = Path(__file__).with_name("steps_prelude.py")
WHO = (("root", None), ("a user", rig.USER))


def measure() -> Result:
    """Count with pairs and without, as root and as a user."""
    counts = {}
    for who, user in WHO:
        without, with_pairs = counted(user, 0), counted(user, PAIRS)
        counts[who] = {
            what: (count - without.get(what, 0)) / PAIRS for what, count in with_pairs.items()
        }
    result = Result(title="The steps of a pair", columns=[who for who, _ in WHO])
    for what in sorted({what for found in counts.values() for what in found}):
        row = [found.get(what, 0.0) for found in counts.values()]
        if max(row) >= 0.1:
            result.rows[what] = [f"{each:.1f}" for each in row]
    return result


def counted(user: str | None, pairs: int) -> dict[str, int]:
    """What loopd does from its start to its end, with so many pairs in between."""
    with (
        rig.image() as image,
        rig.runtime_directory() as directory,
        PrivateBus() as bus,
        RealPolkit(bus, rules_allowing(rig.ATTACH, users=(rig.USER,))),
    ):
        counts = directory.parent / "counts"
        with Daemon(
            bus,
            library=LIBRARIES[0],
            prelude=PRELUDE.read_text(),
            runtime_directory=directory,
            environment={"STEPS": str(counts)},
        ) as daemon:
            with rig.worker(bus, image, user) as worker:
                worker.pairs(pairs)
            daemon.terminate()
        return dict(json.loads(counts.read_text()))


if __name__ == "__main__":
    alone(measure)
