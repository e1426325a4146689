# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random operations on the scripted kernel, of today and of before Linux 6.11."""

import pytest

from tests.harness import machine
from tests.harness.scripted import Traits


@pytest.mark.parametrize("release", [(6, 18), (6, 1)], ids=["6.18", "6.1"])
def test_whatever_happens_all_is_as_it_should_be(release: tuple[int, int]) -> None:
    machine.run(real=False, examples=40, traits=Traits(release=release))
