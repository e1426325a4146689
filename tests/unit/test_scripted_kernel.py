# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd.loop on the scripted kernel, of today and as Debian 12 has it.

tests/root/test_real_kernel.py has the real one, tests/kernel/test_behaviours.py Debian's own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.behaviours import *  # noqa: F403  every test of it is one of ours
from tests.harness.lab import Lab
from tests.harness.lab import lab as make_lab
from tests.harness.scripted import Traits


@pytest.fixture(params=[Traits(), Traits(release=(6, 1), says_partscan=False)], ids=["6.18", "6.1"])
def lab(area: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    with make_lab(area, request.param) as made:
        yield made
