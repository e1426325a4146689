# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two mappings of one file, compared with what bytes they really share, and whose they are."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopd.daemon.access import NOBODY, ROOT
from loopd.daemon.actions.change import ResizeOptions
from loopd.daemon.config import Config, Deadlines
from loopd.daemon.devices.overlap import Mapping
from loopd.daemon.threads import Work
from loopd.errors import Overlap, TimedOut
from loopd.loop.backing_file import FileIdentity
from tests.harness.asynchronous import run_async
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_plain
from tests.harness.inside import Inside, run_inside, scripted_kernel
from tests.harness.script import Script
from tests.harness.scripted import ScriptedKernel

UID, OTHER = 1000, 1001

MAPPINGS = st.builds(
    lambda device, inode, start, length, writable, uid: Mapping(
        device=device, inode=inode, start=start, end=start + length, writable=writable, uid=uid
    ),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 6),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 1),
)


@given(MAPPINGS, MAPPINGS)
def test_a_conflict_is_a_shared_byte_that_can_be_written(one: Mapping, other: Mapping) -> None:
    same_file = (one.device, one.inode) == (other.device, other.inode)
    shared = set(range(one.start, one.end)) & set(range(other.start, other.end))
    writers = [one.writable, other.writable].count(True)
    expected = same_file and bool(shared) and writers >= (1 if one.uid == other.uid else 2)
    assert one.conflicts_with(other) is expected
    assert other.conflicts_with(one) is expected


@pytest.mark.parametrize(
    ("foreign_writes", "owner", "writes", "conflicts"),
    [
        (True, ROOT, True, True),
        (True, ROOT, False, False),
        (False, ROOT, True, False),
        (True, UID, True, True),
        (True, UID, False, False),
        (False, UID, True, False),
    ],
)
def test_what_was_set_up_without_loopd_is_of_another_user(
    foreign_writes: bool, owner: int, writes: bool, conflicts: bool
) -> None:
    """Blocking an image's owner: who may only read a file may have udisks2 attach it."""
    file = FileIdentity(device=1, inode=2)
    foreign = Mapping.of(file, 0, 512, writable=foreign_writes, owner=NOBODY)
    assert Mapping.of(file, 0, 512, writable=writes, owner=owner).conflicts_with(foreign) is (
        conflicts
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_plain(tmp_path / "image", MIB)


# By reader and writer: whose the first device is, and whether it is writable.
IN_THE_WAY = [
    (UID, True, UID, False),
    (UID, False, UID, True),
    (UID, True, UID, True),
    (UID, True, ROOT, True),
    (ROOT, True, UID, True),
]
IN_NO_WAY = [
    (UID, False, UID, False),
    (UID, False, ROOT, True),
    (UID, True, ROOT, False),
    (ROOT, True, UID, False),
    (UID, False, OTHER, True),
]


@pytest.mark.parametrize(
    ("first", "first_writes", "second", "second_writes", "refused"),
    [*((*each, True) for each in IN_THE_WAY), *((*each, False) for each in IN_NO_WAY)],
)
def test_who_is_refused_at_attach_and_resize(
    tmp_path: Path,
    image: Path,
    first: int,
    first_writes: bool,
    second: int,
    second_writes: bool,
    refused: bool,
) -> None:
    """Blocking an image's owner: a user who may only read a file keeps nobody from writing it."""

    async def story(inside: Inside, _script: Script) -> None:
        before = inside.caller(first)
        await inside.attach(before, image, size_limit=MIB // 2, read_only=not first_writes)
        caller = inside.caller(second)
        how = {"read_only": not second_writes}
        with expected(refused):
            whole = await inside.attach(caller, image, **how)
            assert await inside.manager.detach(caller, whole)
        device = await inside.attach(caller, image, offset=MIB // 2, **how)
        with expected(refused):
            await inside.operations.resize(caller, device, ResizeOptions(offset=0))
        # What the text advises is possible there.
        await inside.attach(caller, image, allow_overlap=True, **how)
        device = await inside.attach(caller, image, offset=MIB // 2, allow_overlap=True, **how)
        anyway = ResizeOptions(offset=512, allow_overlap=True)
        assert await inside.operations.resize(caller, device, anyway) == MIB - 512
        inside.leave(before)
        inside.leave(caller)
        await inside.until_none(inside.remains)

    run_inside(tmp_path, story)


@contextmanager
def expected(refused: bool) -> Iterator[None]:
    """Be where Overlap comes up, naming the option that helps, or does not."""
    if refused:
        with pytest.raises(Overlap, match="allow-overlap"):
            yield
    else:
        yield


@pytest.mark.parametrize("writes", [True, False])
def test_a_call_that_hangs_is_in_nobodys_way(tmp_path: Path, image: Path, writes: bool) -> None:
    """Blocking an image's owner: what a user can make hang ends the claim of a call with it."""
    config = Config(deadlines=Deadlines(operation=1))

    async def main(scripted: ScriptedKernel) -> None:
        inside = Inside(tmp_path, scripted, config=config)
        user, root = inside.caller(UID), inside.caller(ROOT)
        turns = [
            await inside.threads.turn(UID, Work.OPERATION, None)
            for _ in range(Work.OPERATION.value)
        ]
        hanging = asyncio.ensure_future(inside.attach(user, image, read_only=not writes))
        deadline = Deadline()
        while not inside.claims._claimed:
            assert deadline.remaining
            await asyncio.sleep(0)
        if writes:  # it is about to write
            with pytest.raises(Overlap, match="allow-overlap"):
                await inside.attach(root, image)
        else:
            device = await inside.attach(root, image)
            assert await inside.manager.detach(root, device)
        with pytest.raises(TimedOut):
            await hanging
        await inside.until_none(lambda: [*map(str, inside.claims._claimed)])
        device = await inside.attach(root, image)
        assert await inside.manager.detach(root, device)
        for give_back in turns:
            give_back()
        await inside.end()

    with scripted_kernel() as (scripted, _):
        run_async(main(scripted))
