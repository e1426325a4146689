# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where memory runs out, the kernel ends the child that reads a partition table and not loopd."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loopd.loop import partition_table
from tests.harness.area import TOKEN
from tests.harness.images import MIB, make_gpt
from tests.harness.wire import CallError
from tests.harness.world import USER, World, make_world

LIMIT = 128 * MIB

# It gives up its rights as ever, and then takes more memory than there is.
GREEDY = """
import runpy, sys
reader = runpy.run_path({original!r})
reader["lock_in"]([int(request) for request in sys.argv[1:]])
taken = [b"x" * (1 << 20) for _ in range(220)]
"""
# loopd is larger than the child can get, and what it has by then counts elsewhere: by its size the
# kernel would take it.
PRELUDE = """
from pathlib import Path
from loopd.loop import partition_table as table
table._READER = Path({reader!r})
table.ballast = b"x" * (150 << 20)
"""


class Group:
    """A cgroup with little memory, of whichever version has the controller."""

    def __init__(self, top: Path, limit: str, events: str) -> None:
        self.path = top / TOKEN.rstrip("-")
        self.path.mkdir()
        (self.path / limit).write_text(str(LIMIT))
        # Without this, swap would be taken instead.
        for swap in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
            with suppress(OSError):
                (self.path / swap).write_text("0" if "max" in swap else str(LIMIT))
        self._events = self.path / events

    def killed(self) -> int:
        """How many processes the kernel has ended for memory."""
        lines = dict(line.split() for line in self._events.read_text().splitlines())
        return int(lines["oom_kill"])


@pytest.fixture
def group() -> Iterator[Group]:
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        made = Group(v1, "memory.limit_in_bytes", "memory.oom_control")
    elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
        made = Group(v2, "memory.max", "memory.events")
    else:
        pytest.skip("no memory controller for cgroups")
    yield made
    made.path.rmdir()


@pytest.fixture
def world(group: Group, tmp_path: Path) -> Iterator[World]:
    reader = tmp_path / "reader.py"
    reader.write_text(GREEDY.format(original=str(partition_table._READER)))
    with make_world(prelude=PRELUDE.format(reader=str(reader))) as made:
        (group.path / "cgroup.procs").write_text(str(made.daemon.pid))
        with made.test() as testing:
            yield testing


def test_a_table_reader_without_memory_goes_alone(world: World, group: Group) -> None:
    """Killed for memory."""
    caller = world.caller(USER)
    attached = caller.attach(world.image())
    assert LIMIT < world.daemon.rss() < 2 * LIMIT
    with pytest.raises(CallError, match="partition table"):
        caller.attach(make_gpt(world.new_path(), owner=USER), partition_scan=True)
    assert group.killed() == 1
    assert caller.get(attached.path, "State") == "attached"
    assert caller.detach(attached.path)
    world.wait_devices(0)
