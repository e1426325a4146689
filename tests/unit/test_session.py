# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a connection: for how long it is not heard, and at whose expense it sends."""

import asyncio

import pytest

from loopd.daemon.server.caller_state import Session
from loopd.daemon.server.fair_queue import Account
from tests.harness.asynchronous import run_async


async def session() -> Session:
    return Session(":1.5", asyncio.get_running_loop().create_future())


def test_who_goes_on_is_not_heard_for_longer_each_time_up_to_a_second() -> None:
    async def body() -> None:
        made = await session()
        now, silences = 100.0, []
        for _ in range(6):
            silences.append(made.silence(now))
            now += silences[-1] + 0.9
        assert silences == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
        # A second after the last silence it is forgiven.
        assert made.silence(now + 0.2) == 0.1
        assert made.silence(now + 0.3) == 0.2

    run_async(body())


def test_what_comes_before_it_is_known_whose_it_is_is_charged_later() -> None:
    async def body() -> None:
        made = await session()
        made.charge(0.01)
        made.charge(0.02)
        assert (made.owner, made.spent) == (None, pytest.approx(0.03))
        made.account = Account(1000)
        made.charge(0.05)
        assert made.owner == 1000
        assert made.spent == pytest.approx(0.03)
        assert made.account.used == pytest.approx(0.05)

    run_async(body())
