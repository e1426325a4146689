# SPDX-License-Identifier: LGPL-2.1-or-later
"""One world for the tests of a module, where the real polkitd decides."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.caller import Caller
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.world import USER, World, make_world


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    """The arguments of make_world() for `shared`; a module overrides them by its own."""
    return {"authority": RULES_ALLOW_ALL}


@pytest.fixture(scope="module")
def shared(world_options: dict[str, Any]) -> Iterator[World]:
    """The module's bus, polkit and loopd."""
    with make_world(**world_options) as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """The module's world, which each test leaves as it found it."""
    with shared.test() as testing:
        yield testing


@pytest.fixture
def owner(world: World) -> Caller:
    """A caller that is the ordinary user."""
    return world.caller(USER)
