# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd.loop on the real kernel; tests/unit/test_scripted_kernel.py has the other one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.behaviours import *  # noqa: F403  every test of it is one of ours
from tests.harness.lab import Lab
from tests.harness.lab import lab as make_lab


@pytest.fixture
def lab(area: Path) -> Iterator[Lab]:
    with make_lab(area, real=True) as made:
        yield made
