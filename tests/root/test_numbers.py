# SPDX-License-Identifier: LGPL-2.1-or-later
"""The option number: exactly that loop device or none, for root and for who may manage others."""

import fcntl
import itertools
import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.caller import MANAGER, MANAGER_PATH, Attached, Call, Caller, Variant
from tests.harness.deadline import Deadline
from tests.harness.images import pattern
from tests.harness.polkit import rules_allowing
from tests.harness.raw import BUS
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World, make_world

# A number that is free may be taken by anybody.
pytestmark = pytest.mark.alone

DEVICE_BUSY = f"{MANAGER}.Error.DeviceBusy"
INVALID_ARGS = f"{BUS}.Error.InvalidArgs"
SIZE = 64 * 1024

LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81

# Far from what GET_FREE gives out, and from what other test runs take.
_unlikely = itertools.count(471100 + os.getpid() % 50000 * 10)


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    rules = rules_allowing("org.example.loop1.attach", "org.example.loop1.open-device")
    rules += rules_allowing("org.example.loop1.manage-others", users=(OTHER,))
    return {"authority": rules}


@pytest.fixture
def number() -> Iterator[int]:
    """The number of a loop device that does not exist, and does not any more afterwards."""
    wanted = next(each for each in _unlikely if not os.path.exists(f"/sys/block/loop{each}"))
    loops.used_numbers.add(wanted)
    yield wanted
    with suppress(OSError):  # loopd removes what it has made, unless it has ended before
        control(LOOP_CTL_REMOVE, wanted)


@pytest.fixture
def world(shared: World, number: int) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


@pytest.fixture
def root(world: World) -> Caller:
    return world.caller(None)


def control(request: int, number: int) -> None:
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, number)
    finally:
        os.close(fd)


@contextmanager
def bound(number: int, file: Path) -> Iterator[loops.BoundLoop]:
    """Have losetup attach a file to the device of this number."""
    subprocess.run(["losetup", f"/dev/loop{number}", file], check=True)
    loop = loops.look_at(number)
    assert loop
    try:
        yield loop
    finally:
        loops.detach_leaked(loop)
        loops.wait_unbound(loop.number, loop.diskseq)


def content(attached: Attached) -> bytes:
    fd = os.open(attached.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, 2 * SIZE, 0)
    finally:
        os.close(fd)


def over(image: Path) -> list[int]:
    """Return the numbers of the loop devices over a file."""
    return [loop.number for loop in loops.bound_loops().values() if loop.backing_file == str(image)]


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> CallError:
    """Return the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value


def ended(call: Call) -> Attached | CallError:
    """Wait for an Attach; return the device or the error."""
    try:
        return Attached(*call.end())
    except CallError as exc:
        return exc


def test_root_gets_the_number_that_it_wants(world: World, root: Caller, number: int) -> None:
    image = world.image(SIZE)
    attached = root.attach(image, number=number)
    assert attached.node == f"/dev/loop{number}"
    assert attached.path == f"{MANAGER_PATH}/device/loop{number}_{attached.diskseq}"
    assert root.get(attached.path, "Number") == number
    assert over(image) == [number]
    assert content(attached) == pattern(0, SIZE)
    assert root.detach(attached.path) is True
    assert not loops.loop_is_bound(number)


def test_a_number_that_exists_and_is_free_is_taken(world: World, root: Caller, number: int) -> None:
    control(LOOP_CTL_ADD, number)
    attached = root.attach(world.image(SIZE), number=number)
    assert attached.node == f"/dev/loop{number}"
    assert content(attached) == pattern(0, SIZE)


def test_a_number_comes_with_every_other_option(world: World, root: Caller, number: int) -> None:
    attached = root.attach(
        world.image(SIZE),
        number=number,
        read_only=True,
        offset=4096,
        size_limit=8192,
        sector_size=4096,
        partition_scan=True,
        reference="chosen",
        lock="shared",
    )
    assert attached.node == f"/dev/loop{number}"
    properties = root.get_all(attached.path)
    assert (properties["ReadOnly"], properties["Offset"], properties["Size"]) == (True, 4096, 8192)
    assert (properties["SectorSize"], properties["PartitionScan"]) == (4096, True)
    assert (properties["Reference"], properties["Locked"]) == ("chosen", "shared")
    assert content(attached) == pattern(4096, 8192)


def test_a_number_is_free_again_once_it_is_detached(
    world: World, root: Caller, number: int
) -> None:
    first, second = world.image(SIZE), world.image(SIZE)
    seen = set()
    for image in (first, second) * 4:
        attached = root.attach(image, number=number)
        assert (attached.node, over(image)) == (f"/dev/loop{number}", [number])
        seen.add(attached.path)
        assert root.detach(attached.path) is True
    assert len(seen) == 8


def test_a_number_that_is_taken_is_busy_and_no_other_is_given(
    world: World, root: Caller, number: int
) -> None:
    taken, wanting = world.image(SIZE), world.image(SIZE)
    attached = root.attach(taken, number=number)
    for caller in (root, world.caller(OTHER)):
        error = error_of(caller.attach, wanting, "r", number=number)
        assert error.name == DEVICE_BUSY
        assert f"/dev/loop{number}" in error.message
    assert (over(taken), over(wanting)) == ([number], [])
    assert root.get(attached.path, "State") == "attached"
    assert world.device_count() == 1
    # It is not free before it is gone, either.
    fd = root.open_device(attached.path, "r")
    assert root.detach(attached.path) is False
    assert error_of(root.attach, wanting, number=number).name == DEVICE_BUSY
    fd.close()
    loops.wait_unbound(number, attached.diskseq)
    assert root.attach(wanting, number=number).node == f"/dev/loop{number}"


def test_a_number_that_somebody_else_took_is_busy_and_stays_theirs(
    world: World, root: Caller, number: int
) -> None:
    control(LOOP_CTL_ADD, number)
    theirs, wanting = world.image(SIZE), world.image(SIZE)
    with bound(number, theirs) as foreign:
        error = error_of(root.attach, wanting, number=number)
        assert error.name == DEVICE_BUSY
        assert f"/dev/loop{number}" in error.message
        assert loops.look_at(number) == foreign
        assert over(wanting) == []
    assert root.attach(wanting, number=number).node == f"/dev/loop{number}"


def test_an_ordinary_user_has_no_say_in_it(world: World, number: int) -> None:
    caller, image = world.caller(USER), world.image(SIZE)
    for wanted in (number, 0, 1048575):
        error = error_of(caller.attach, image, number=wanted)
        assert error.name == f"{BUS}.Error.InteractiveAuthorizationRequired"
        assert "manage-others" in error.message
    assert over(image) == []
    assert not os.path.exists(f"/sys/block/loop{number}")
    assert caller.attach(image).number != number


def test_who_may_manage_others_gets_it_as_its_own(world: World, number: int) -> None:
    caller = world.caller(OTHER)
    attached = caller.attach(world.image(SIZE, owner=OTHER), number=number)
    properties = caller.get_all(attached.path)
    assert (properties["Node"], properties["Number"]) == (f"/dev/loop{number}", number)
    assert properties["Owner"] == pwd.getpwnam(OTHER).pw_uid
    assert properties["Lifetime"] == "connection"
    caller.kill()
    loops.wait_unbound(number, attached.diskseq)


@pytest.mark.parametrize(
    "wrong",
    [
        *(1 << 20, (1 << 20) + 7, 1 << 31, (1 << 32) - 1),
        *(Variant("t", 7), Variant("i", 7), Variant("s", "7"), Variant("b", True)),
    ],
)
def test_what_is_no_number_is_refused_with_its_key(world: World, root: Caller, wrong: Any) -> None:
    image = world.image(SIZE)
    for caller in (root, world.caller(USER), world.caller(OTHER)):
        error = error_of(caller.attach, image, "r", number=wrong)
        assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "number")
    assert over(image) == []


def test_of_many_who_want_one_number_exactly_one_gets_it(
    world: World, root: Caller, number: int
) -> None:
    callers = [root, *(world.caller(None) for _ in range(3))]
    images = [world.image(SIZE) for _ in range(12)]
    for _ in range(4):
        calls = [
            callers[index % len(callers)].attach_begin(image, number=number)
            for index, image in enumerate(images)
        ]
        answers = [ended(call) for call in calls]
        (winner,) = [each for each in answers if isinstance(each, Attached)]
        assert winner.node == f"/dev/loop{number}"
        losers = [each for each in answers if isinstance(each, CallError)]
        assert {each.name for each in losers} == {DEVICE_BUSY}
        assert all(winner.node in each.message for each in losers)
        assert [over(image) for image in images].count([]) == len(images) - 1
        assert over(images[answers.index(winner)]) == [number]
        assert world.device_count() == 1
        assert root.detach(winner.path) is True


def test_those_who_want_any_are_not_disturbed_by_those_who_want_one(
    world: World, root: Caller, number: int
) -> None:
    other = world.caller(USER)
    for _ in range(5):
        images = [world.image(SIZE) for _ in range(6)]
        chosen = [root.attach_begin(image, number=number) for image in images[:3]]
        free = [other.attach_begin(image) for image in images[3:]]
        got = [ended(call) for call in chosen]
        (winner,) = [each for each in got if isinstance(each, Attached)]
        others = [Attached(*call.end()) for call in free]
        loops.used_numbers.update(each.number for each in others)
        assert len({winner.number, *(each.number for each in others)}) == 4
        assert winner.number == number
        for caller, attached in [(root, winner), *((other, each) for each in others)]:
            assert caller.detach(attached.path) is True


@pytest.fixture(scope="module")
def roomy() -> Iterator[World]:
    """A world where a user may have as many devices as one test wants."""
    with make_world(
        authority=rules_allowing("org.example.loop1.attach"),
        config="[limits]\ndevices_per_user = 64\n",
    ) as made:
        yield made


def attach_all(caller: Caller, image: Path, count: int) -> list[Attached]:
    """Attach so much of a file to each of so many devices."""
    return [caller.attach(image, "r", offset=index * 512) for index in range(count)]


@pytest.mark.parametrize(
    ("former", "following", "count"),
    [
        *((USER, OTHER, count) for count in (1, 3, 6, 12, 64)),
        *((None, USER, count) for count in (1, 12)),
        *((USER, None, count) for count in (1, 12)),
    ],
)
def test_no_number_goes_to_another_user_at_once(
    roomy: World, former: str | None, following: str | None, count: int
) -> None:
    """Numbers of devices: who mounts a device by its name must not find another user's file."""
    with roomy.test() as world:
        first, second = world.caller(former), world.caller(following)
        image = world.image(SIZE, mode=0o644)
        before = attach_all(first, image, count)
        for attached in before:
            first.detach(attached.path)
        after = attach_all(second, image, count)
        assert {each.number for each in before} & {each.number for each in after} == set()
        for attached in after:
            second.detach(attached.path)


@pytest.mark.parametrize("count", [1, 6])
def test_a_number_that_was_removed_goes_to_no_other_user_either(roomy: World, count: int) -> None:
    with roomy.test() as world:
        former, following = world.caller(USER), world.caller(OTHER)
        image = world.image(SIZE)
        before = attach_all(former, image, count)
        for attached in before:
            former.detach(attached.path)
        deadline = Deadline()
        while any(os.path.exists(f"/sys/block/loop{each.number}") for each in before):
            assert deadline.remaining, before
            world.device_count()  # each look is paced by an answer
        after = attach_all(following, image, count)
        assert {each.number for each in before} & {each.number for each in after} == set()
