# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of who may do what, and the quotas."""

import asyncio
from contextlib import suppress

import pytest

from loopd.daemon.access import (
    NOBODY,
    Action,
    Client,
    Operation,
    Relation,
    needed_for,
    needed_to_attach,
    relation,
    require_may_write,
    strongest,
)
from loopd.daemon.devices.leases import Lease, Leases
from loopd.daemon.quota import Quota
from loopd.errors import (
    AccessDenied,
    LimitsExceeded,
    LoopError,
    NotSupported,
    UnsupportedFile,
)

MANAGE = {Action.MANAGE_OTHERS}
OPEN_OTHERS = {Action.OPEN_OTHERS_DEVICE}


@pytest.mark.parametrize(
    ("operation", "owner", "other", "foreign"),
    [
        (Operation.DETACH, set(), MANAGE, MANAGE),
        (Operation.RESIZE, set(), MANAGE, MANAGE),
        (Operation.SYNC, set(), MANAGE, MANAGE),
        (Operation.OPEN, {Action.OPEN_DEVICE}, OPEN_OTHERS, OPEN_OTHERS),
        (
            *(Operation.OPEN_READ_ONLY, {Action.OPEN_READ_ONLY_DEVICE}),
            *(OPEN_OTHERS, OPEN_OTHERS),
        ),
        (Operation.SET_AUTOCLEAR, {Action.KEEP}, MANAGE, MANAGE),
        (Operation.SET_DIRECT_IO, set(), MANAGE, MANAGE),
        (Operation.SET_REFERENCE, set(), MANAGE, MANAGE),
        (Operation.SET_SECTOR_SIZE, set(), MANAGE, MANAGE),
        (Operation.RESCAN_PARTITIONS, set(), MANAGE, MANAGE),
        (Operation.LOCK, set(), AccessDenied, NotSupported),
    ],
)
def test_the_table(
    operation: Operation,
    owner: set[Action],
    other: set[Action] | type[LoopError],
    foreign: set[Action] | type[LoopError],
) -> None:
    for each, needed in zip(Relation, (owner, other, foreign), strict=True):
        if isinstance(needed, set):
            assert needed_for(operation, each) == needed
        else:
            with pytest.raises(needed, match=operation.value):
                needed_for(operation, each)


@pytest.mark.parametrize("operation", Operation)
def test_every_operation_has_its_row(operation: Operation) -> None:
    for each in Relation:
        with suppress(AccessDenied, NotSupported):
            needed_for(operation, each)


def test_a_foreign_device_is_nobodys_own() -> None:
    assert relation(1000, 1000) is Relation.OWNER
    assert relation(1000, 1001) is Relation.OTHER
    assert relation(0, 1000) is Relation.OTHER
    assert relation(NOBODY, NOBODY) is Relation.FOREIGN


@pytest.mark.parametrize(
    ("block_device", "trusted", "wants_number", "keeps", "actions"),
    [
        (False, True, False, False, {Action.ATTACH}),
        (False, False, False, False, {Action.ATTACH_UNTRUSTED_FILESYSTEM}),
        (True, True, False, False, {Action.ATTACH_BLOCK_DEVICE}),
        (
            *(True, False, False, False),
            {Action.ATTACH_BLOCK_DEVICE, Action.ATTACH_UNTRUSTED_FILESYSTEM},
        ),
        (False, True, True, False, {Action.ATTACH, Action.MANAGE_OTHERS}),
        (True, True, True, False, {Action.ATTACH_BLOCK_DEVICE, Action.MANAGE_OTHERS}),
        (False, True, False, True, {Action.KEEP}),
        (True, True, False, True, {Action.ATTACH_BLOCK_DEVICE, Action.KEEP}),
        (False, True, True, True, {Action.MANAGE_OTHERS, Action.KEEP}),
    ],
)
def test_only_the_strongest_actions_are_needed(
    block_device: bool, trusted: bool, wants_number: bool, keeps: bool, actions: set[Action]
) -> None:
    needed = needed_to_attach(
        block_device=block_device, trusted=trusted, wants_number=wants_number, keeps=keeps
    )
    assert needed == actions


def test_an_action_that_nothing_implies_stays() -> None:
    given = {Action.KEEP, Action.ATTACH, Action.OPEN_DEVICE}
    assert strongest(given) == {Action.KEEP, Action.OPEN_DEVICE}


def test_only_root_writes_to_what_is_guarded() -> None:
    """Guarded files."""
    for uid in (0, 1000):
        require_may_write(uid, "")
    require_may_write(0, "immutable")
    with pytest.raises(UnsupportedFile, match="immutable"):
        require_may_write(1000, "immutable")


def test_nothing_is_done_for_a_client_that_has_left() -> None:
    """CVE-2021-3560."""
    loop = asyncio.new_event_loop()
    client = Client(":1.2", 1000, loop.create_future())
    client.require_present()
    client.left.set_result(None)
    with pytest.raises(AccessDenied):
        client.require_present()
    loop.close()


def quota_of(per_user: int, in_all: int) -> Quota:
    return Quota("loop devices", per_user=per_user, in_all=in_all, hint="detach one first")


def test_a_place_is_given_back_once() -> None:
    quota = quota_of(2, 10)
    place = quota.take(1000)
    quota.take(1000)
    with pytest.raises(LimitsExceeded, match="2 loop devices"):
        quota.take(1000)
    place.free()
    place.free()
    assert quota.taken == 1
    quota.take(1000)


def test_a_place_ends_with_its_block_unless_it_is_kept() -> None:
    quota = quota_of(2, 10)
    with quota.take(1000):
        assert quota.taken == 1
    assert quota.taken == 0
    with quota.take(1000) as place:
        kept = place.keep()
    assert quota.taken == 1
    kept.free()
    assert quota.taken == 0


def test_one_user_cannot_take_the_places_of_another() -> None:
    quota = quota_of(1, 2)
    quota.take(1000)
    with pytest.raises(LimitsExceeded):
        quota.take(1000)
    quota.take(1001)


def test_root_is_bound_by_the_limit_in_all_only() -> None:
    quota = quota_of(1, 3)
    for _ in range(3):
        quota.take(0)
    with pytest.raises(LimitsExceeded, match="3 loop devices"):
        quota.take(0)
    with pytest.raises(LimitsExceeded):
        quota.take(1000)


def fill(quota: Quota, uid: int) -> int:
    """Take all that a user gets; return how many that were."""
    for count in range(10_000):
        try:
            quota.take(uid)
        except LimitsExceeded:
            return count
    raise AssertionError("there is no limit")


def test_users_who_take_all_they_get_leave_something_to_the_next_one() -> None:
    """Limits in all."""
    quota = quota_of(64, 256)
    assert [fill(quota, uid) for uid in range(1000, 1006)] == [64, 64, 48, 24, 12, 6]
    # With what is given back the next one has more, and who has most has no more than before.
    assert fill(quota, 1000) == 0
    assert fill(quota, 0) == 256 - 218


def test_some_places_are_roots_alone() -> None:
    """Limits in all."""
    quota = quota_of(64, 256)
    for uid in range(1000, 1100):
        fill(quota, uid)
    assert quota.taken == 256 - 32
    assert fill(quota, 0) == 32


def test_what_root_has_of_its_own_places_takes_none_of_the_others() -> None:
    quota = quota_of(64, 256)
    for _ in range(32):
        quota.take(0)
    assert [fill(quota, uid) for uid in (1000, 1001)] == [64, 64]


def test_where_there_are_few_places_a_user_has_some_all_the_same() -> None:
    quota = quota_of(4, 4)
    assert fill(quota, 1000) == 4


def test_leases_are_found_by_device_and_by_holder() -> None:
    leases = Leases()
    one, two = (Lease(f"/{n}", 1000, ":1.5", "connection") for n in (1, 2))
    other = Lease("/3", 1000, ":1.6", "connection")
    for lease in (one, two, other):
        leases.grant(lease)
    assert leases.held_by(":1.5") == [one, two]
    leases.end("/1")
    leases.end("/1")
    assert leases.of("/1") is None
    assert leases.held_by(":1.5") == [two]
    assert leases.held_by(":1.7") == []
    assert [*leases] == [two, other]
    with pytest.raises(ValueError, match="already"):
        leases.grant(two)


@pytest.mark.parametrize("how", ["end", "over"])
def test_nothing_is_kept_of_a_connection_that_has_left(how: str) -> None:
    leases = Leases()
    for number in range(3):
        lease = Lease(f"/{number}", 1000, f":1.{number}", "connection")
        leases.grant(lease)
        if how == "end":
            leases.end(lease.device)
        else:
            leases.over(lease)
    assert leases._by_holder == {}


def test_leases_of_a_connection_and_of_a_user_end_each_with_its_own() -> None:
    leases = Leases()
    one = Lease("/1", 1000, ":1.5", "connection")
    two, three = (Lease(f"/{n}", uid, "", "user") for n, uid in ((2, 1000), (3, 1001)))
    for lease in (one, two, three):
        leases.grant(lease)
    assert leases.users() == {1000, 1001}
    assert leases.of_user(1000) == [two]
    assert leases.held_by("") == []
    leases.over(two)
    leases.over(one)
    assert (leases.users(), leases.of_user(1000), leases.held_by(":1.5")) == ({1001}, [], [])
    assert (one.holder, one.over, leases.of("/1")) == ("", True, one)
    for device in ("/1", "/2", "/3"):
        leases.end(device)
    assert len(leases) == 0
