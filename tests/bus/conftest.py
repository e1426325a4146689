# SPDX-License-Identifier: LGPL-2.1-or-later
"""One world for the tests of a module, under each D-Bus library in turn."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.harness.bus import PrivateBus
from tests.harness.world import World, make_world


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> str | None:
    """The D-Bus library that daemons use; None leaves it to them."""
    name: str | None = getattr(request, "param", None)
    if name and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    """What `world` and new_world give to make_world(); for modules to override."""
    return {}


@pytest.fixture(scope="module")
def _shared_world(
    library: str | None, bus_type: type[PrivateBus], world_options: dict[str, Any]
) -> Iterator[World]:
    if os.getuid() != 0:
        pytest.skip("only root has loop devices to give")
    with make_world(library=library, bus_type=bus_type, **world_options) as world:
        yield world


@pytest.fixture
def world(_shared_world: World) -> Iterator[World]:
    """The module's bus, polkit and loopd, which each test leaves as it found them."""
    with _shared_world.test() as world:
        yield world


@pytest.fixture
def new_world(
    library: str | None, bus_type: type[PrivateBus], world_options: dict[str, Any]
) -> Iterator[Callable[..., World]]:
    """Start a world of the test's own; the arguments are those of make_world()."""
    if os.getuid() != 0:
        pytest.skip("only root has loop devices to give")
    with ExitStack() as stack:

        def make(**options: Any) -> World:
            given = {"library": library, "bus_type": bus_type} | world_options | options
            return stack.enter_context(stack.enter_context(make_world(**given)).test())

        yield make
