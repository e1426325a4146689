# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases and places: what is given back is forgotten whole."""

import pytest

from loopd.daemon.devices.leases import CONNECTION, USER, Lease, Leases
from loopd.daemon.quota import Quota
from loopd.errors import LimitsExceeded

HOLDER = ":1.5"


@pytest.mark.parametrize("last", ["end", "over"])
def test_of_a_connection_that_keeps_nothing_nothing_is_remembered(last: str) -> None:
    leases = Leases()
    made = [Lease(f"/{number}", 1000, HOLDER, CONNECTION) for number in range(3)]
    for lease in made:
        leases.grant(lease)
    leases.over(made[1])
    leases.end(made[2].device)
    assert leases.held_by(HOLDER) == [made[0]]
    if last == "end":
        leases.end(made[0].device)
    else:
        leases.over(made[0])
    assert leases.held_by(HOLDER) == []
    assert leases._by_holder == {}  # one for each client that has ever had a device
    assert [*leases] == (made[1:2] if last == "end" else made[:2])
    assert all(lease.over and not lease.holder for lease in leases)


def test_one_without_a_connection_is_held_by_none() -> None:
    leases = Leases()
    leases.grant(Lease("/1", 1000, "", USER))
    assert leases._by_holder == {}
    assert leases.users() == {1000}
    leases.over(leases.of_user(1000)[0])
    assert leases.users() == set()
    assert leases.of_user(1000) == []


def test_a_device_has_one_lease() -> None:
    leases = Leases()
    leases.grant(Lease("/1", 1000, HOLDER, CONNECTION))
    with pytest.raises(ValueError, match="has a lease already"):
        leases.grant(Lease("/1", 1000, "", USER))


def test_a_place_is_given_back_once() -> None:
    quota = Quota("things", per_user=2, in_all=3, hint="")
    first, _ = quota.take(1000), quota.take(1000)
    with pytest.raises(LimitsExceeded, match="this user has 2 things"):
        quota.take(1000)
    kept = first.keep()
    first.free()  # it has been carried away
    with pytest.raises(LimitsExceeded):
        quota.take(1000)
    with pytest.raises(ValueError, match="carried away before"):
        first.keep()
    kept.free()
    kept.free()
    assert quota.taken == 1
    quota.take(1000)
    quota.take(0)
    for uid in (0, 1001):
        with pytest.raises(LimitsExceeded, match="there are 3 things in use"):
            quota.take(uid)


def test_what_is_taken_back_has_a_place_whatever_the_limits() -> None:
    quota = Quota("things", per_user=1, in_all=1, hint="")
    places = [quota.take_back(1000) for _ in range(3)]
    assert quota.taken == 3
    for place in places:
        with pytest.raises(LimitsExceeded):
            quota.take(1000)
        place.free()
    quota.take(1000)
