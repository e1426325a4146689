# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads of a pool come as they are needed, and go when they are not."""

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from loopd.daemon import pool
from loopd.daemon.pool import Pool
from tests.harness.deadline import Deadline


@pytest.fixture
def one() -> Iterator[Pool]:
    made = Pool(4, "test-pool")
    yield made
    made.close()
    wait_threads(0)


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("test-pool")]


def wait_threads(count: int) -> None:
    """Wait for the end of all but so many."""
    deadline = Deadline()
    while len(left := threads()) > count:
        assert deadline.remaining, left
        left[0].join(0.01)


def test_so_many_work_at_a_time_and_the_rest_waits(one: Pool) -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def work() -> str:
        begun.release()
        go_on.wait(20)
        return "done"

    futures = [one.submit(work) for _ in range(10)]
    for _ in range(4):
        assert begun.acquire(timeout=20)
    assert len(threads()) == 4
    assert not any(each.done() for each in futures)
    assert sum(not each.running() for each in futures) == 6
    go_on.set()
    assert {each.result(20) for each in futures} == {"done"}


def test_threads_without_work_end_and_come_again(
    one: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the limits: a load leaves no threads behind."""
    monkeypatch.setattr(pool, "_IDLE", 0.01)
    meet = threading.Barrier(4)
    for _ in range(3):
        for each in [one.submit(lambda: meet.wait(20)) for _ in range(4)]:
            each.result(20)
        wait_threads(0)
    assert one._threads == 0


def test_a_light_load_keeps_one_thread_and_lets_the_others_end(
    one: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_IDLE", 0.2)
    meet = threading.Barrier(4)
    for each in [one.submit(lambda: meet.wait(20)) for _ in range(4)]:
        each.result(20)
    deadline = Deadline()
    while len(threads()) > 1:
        assert one.submit(lambda: "done").result(20) == "done"
        assert deadline.remaining
    assert one.submit(lambda: "done").result(20) == "done"


def test_work_that_comes_when_threads_end_is_done(
    one: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_IDLE", 0.0001)
    for number in range(3000):
        assert one.submit(partial(int, number)).result(20) == number


def test_a_failure_is_for_those_who_wait_and_costs_no_thread(one: Pool) -> None:
    for _ in range(8):
        failed = one.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failed.result(20)
    assert one.submit(lambda: "done").result(20) == "done"


def test_what_waits_when_it_closes_is_done_or_dropped() -> None:
    for drop in (False, True):
        closing = Pool(1, "test-pool")
        begun, go_on = threading.Event(), threading.Event()

        def work(begun: threading.Event = begun, go_on: threading.Event = go_on) -> str:
            begun.set()
            go_on.wait(20)
            return "first"

        first = closing.submit(work)
        assert begun.wait(20)
        second = closing.submit(lambda: "second")
        closing.close(drop=drop)
        go_on.set()
        assert first.result(20) == "first"
        assert second.cancelled() if drop else second.result(20) == "second"
        assert closing.submit(lambda: "late").cancelled()
        with pytest.raises(RuntimeError):
            closing.submit(lambda: "late", gives_up=True)
        wait_threads(0)
