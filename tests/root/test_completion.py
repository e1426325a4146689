# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion of devices, whose files have names that users chose."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import loops
from tests.harness.images import make_plain
from tests.unit.test_completion import (
    DIRECTORY,
    environment_of,
    fish,
    need,
    require_harmless,
    typed,
)

NAME = "disk\n/dev/forged\x1b]0;forged\x07\u009b31m\u202e.img"


@pytest.fixture
def attached(area: Path) -> Iterator[loops.BoundLoop]:
    """A device of a file that has such a name."""
    directory = area / NAME.rpartition("/")[0]
    directory.mkdir(parents=True)
    node = loops.losetup(make_plain(area / NAME))
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    yield loop
    loops.detach_leaked(loop)


def test_fish_offers_devices_and_no_lines_of_names(
    attached: loops.BoundLoop, tmp_path: Path
) -> None:
    """Names in a terminal."""
    offered = fish("loopctl detach ", tmp_path)
    assert attached.node in offered
    assert not [each for each in offered if "forged" in each]


def test_fish_shows_the_name_of_a_devices_file_without_what_a_terminal_obeys(
    attached: loops.BoundLoop, tmp_path: Path
) -> None:
    """Names in a terminal."""
    setup = f"cd {tmp_path}; source {DIRECTORY / 'loopctl.fish'}"
    environment = environment_of(tmp_path) | {"TERM": "xterm", "COLUMNS": "200"}
    command = [need("fish"), "--no-config", "-i"]
    seen = typed(command, setup, "loopctl detach /dev/lo\t\t", "0;forged", environment)
    require_harmless(seen)
    # readline and zsh leave these to the terminal, in names of files; this list is ours.
    assert not {"\u009b", "\u202e"} & {*seen}
