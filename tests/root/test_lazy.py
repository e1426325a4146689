# SPDX-License-Identifier: LGPL-2.1-or-later
"""A lazy detach ends with the last user, and the file can be attached again at once."""

from typing import Any

import pytest

from tests.harness import loops
from tests.harness.images import make_ext4
from tests.harness.world import World
from tests.root.test_detach import mounted


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    return {}


def test_a_file_can_be_attached_again_once_it_is_unmounted(world: World) -> None:
    caller = world.caller()
    image = make_ext4(world.new_path(), owner="nobody")
    attached = caller.attach(image, "r")
    with mounted(attached.node):
        assert caller.detach(attached.path, lazy=True) is False
    again = caller.attach(image)
    assert again.path != attached.path
    caller.detach(again.path)
    loops.wait_unbound(attached.number, attached.diskseq)
