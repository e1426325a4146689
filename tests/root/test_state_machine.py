# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random operations on the real kernel; bench/soak.py takes as many steps as one likes."""

from tests.harness import machine


def test_whatever_happens_all_is_as_it_should_be() -> None:
    machine.run(real=True, examples=12, steps=30)
