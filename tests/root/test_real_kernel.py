# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd.loop on the real kernel; tests/unit/test_scripted_kernel.py has the other one."""

from collections.abc import Iterator

import pytest

from loopd.loop import mounts
from tests.harness.area import area
from tests.harness.behaviours import *  # noqa: F403  every test of it is one of ours
from tests.harness.lab import Lab
from tests.harness.lab import lab as make_lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    # Nothing of conftest.py is there where tests/kernel/test_behaviours.py runs this.
    mounts.prepare()
    with area("lab") as directory, make_lab(directory, real=True) as made:
        yield made
