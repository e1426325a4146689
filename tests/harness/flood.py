# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that floods loopd with calls until it is stopped."""

import sys

from tests.harness.area import CHECKOUT
from tests.harness.bus import PrivateBus
from tests.harness.flood_program import KINDS
from tests.harness.process import Process

__all__ = ["KINDS", "flood"]


def flood(bus: PrivateBus, kind: str, user: str) -> Process:
    """Start a client of this user; it floods from its first call to the end of the `with` block."""
    return Process(
        [sys.executable, "-m", "tests.harness.flood_program", bus.address, kind, user],
        name=f"flood of {kind}",
        environment={"PYTHONPATH": str(CHECKOUT)},
    )
