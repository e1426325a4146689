# SPDX-License-Identifier: LGPL-2.1-or-later
"""An Attach and a Detach take no more steps than they need: turns in threads, files, questions.

The prelude of bench.steps counts them, so load makes no difference. What the devices of others on
the machine cause as well is left out.
"""

import json
import pwd

import pytest

from tests.harness.area import CHECKOUT, area
from tests.harness.daemon import LIBRARIES
from tests.harness.world import USER, make_world

PRELUDE = (CHECKOUT / "bench" / "steps_prelude.py").read_text()
PAIRS = 10
MOST = {
    "turn: LOOK": 0,  # a file of a local filesystem is looked at on the event loop
    "turn: OPERATION": 2,  # the latter finds whether the device is mounted
    "turn: ENDING": 1,
    "task": 4,  # for each call, for what goes on without the caller, and for the end of the device
    # The file when it is examined, when its size is asked for, and a user's just before it is
    # bound; each node of the device that is opened.
    "look at a file": 6,
    "question: CheckAuthorization": 1,
    "file written": 1,
    "link made": 1,
}
"""Of a pair of a user's."""
MOST_OF_ROOT = MOST | {
    "look at a file": 5,
    "question: CheckAuthorization": 0,
    "file written": 2,  # the description for udev's links is one
    "link made": 0,
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("user", "most"), [(USER, MOST), (None, MOST_OF_ROOT)])
def test_a_pair_takes_no_more_steps(library: str, user: str | None, most: dict[str, int]) -> None:
    before, after = counted(library, user, 1), counted(library, user, 1 + PAIRS)
    # Others may get in the way of a few, which are tried again then.
    found = {step: (after.get(step, 0) - before.get(step, 0)) // PAIRS for step in most}
    assert {step: count for step, count in found.items() if count > most[step]} == {}
    assert found["turn: ENDING"] == 1


def counted(library: str, user: str | None, pairs: int) -> dict[str, int]:
    """The steps of a loopd from its start to its end, the turns those of the user."""
    uid = pwd.getpwnam(user or "root").pw_uid
    with area("steps") as directory:
        counts = directory / "counts"
        environment = {"STEPS": str(counts)}
        with (
            make_world(library=library, prelude=PRELUDE, environment=environment) as made,
            made.test() as world,
        ):
            image, caller = world.image(), world.caller(user)
            for _ in range(pairs):
                assert caller.detach(caller.attach(image).path)
            world.wait_devices(0)
            world.daemon.terminate()
        steps: dict[str, int] = json.loads(counts.read_text())
    return {step.replace(f"turn of {uid}:", "turn:"): count for step, count in steps.items()}
