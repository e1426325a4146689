# SPDX-License-Identifier: LGPL-2.1-or-later
"""What hangs in a thread hangs there alone."""

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress

import pytest

from loopd.daemon import closes
from loopd.daemon.threads import Threads, Work
from loopd.errors import LimitsExceeded, TimedOut

OPERATION = Work.OPERATION
USER, OTHER = 1000, 1001


@contextmanager
def hanging() -> Iterator[Callable[[], str]]:
    """A function that returns when the block ends."""
    end = threading.Event()

    def hang() -> str:
        end.wait(20)
        return "late"

    try:
        yield hang
    finally:
        end.set()


def slow_pipe() -> int:
    """An fd whose close may hang, as far as is known."""
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def quick_memfd() -> int:
    """An fd whose close is sure to end, as far as is known."""
    return os.memfd_create("quick")


def story(body: Callable[[Threads], Awaitable[None]]) -> None:
    """Run a test's coroutine with pools of its own."""

    async def run() -> None:
        threads = Threads()
        try:
            await asyncio.wait_for(body(threads), 20)
        finally:
            assert threads.stop(20) == 0

    asyncio.run(run())


def test_a_result_and_an_error_come_back() -> None:
    async def body(threads: Threads) -> None:
        assert await threads.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)

    story(body)


def test_what_takes_too_long_is_left_and_its_late_result_handed_over() -> None:
    async def body(threads: Threads) -> None:
        results: list[str] = []
        ended = asyncio.Event()
        with hanging() as hang:
            with pytest.raises(TimedOut):
                await threads.run(hang, timeout=0.01, late=results.append, ended=ended.set)
            assert not ended.is_set()
        await ended.wait()
        assert results == ["late"]

    story(body)


def test_a_user_who_hangs_all_its_turns_waits_for_itself_and_nobody_else_does() -> None:
    """Hanging files."""

    async def body(threads: Threads) -> None:
        with hanging() as hang:
            for _ in range(OPERATION.value):
                give_back = await threads.turn(1000, OPERATION, 1)
                with pytest.raises(TimedOut):
                    await threads.run(hang, timeout=0.001, ended=give_back)
            with pytest.raises(TimedOut):
                await threads.turn(1000, OPERATION, 0.01)
            other = await threads.turn(1001, OPERATION, 0.01)
            assert await threads.run(lambda: "served", timeout=5, ended=other) == "served"
        # The threads are free again, and so are the turns.
        for _ in range(OPERATION.value):
            await threads.turn(1000, OPERATION, 5)

    story(body)


async def hang_all(threads: Threads, work: Work, uids: range, hang: Callable[[], str]) -> None:
    """Have each of these users hang as much as it may."""
    for uid in uids:
        for _ in range(work.value):
            with suppress(TimedOut):
                await threads.run_in_turn(uid, work, hang, timeout=0.001)


@pytest.mark.parametrize("work", [Work.OPERATION, Work.ENDING, Work.LOOK])
def test_users_who_hang_all_they_may_leave_threads_to_the_next_and_to_root(work: Work) -> None:
    """Limits in all: as one user with many subordinate uids does."""

    async def body(threads: Threads) -> None:
        with hanging() as hang:
            await hang_all(threads, work, range(1000, 1020), hang)
            served = threads.run_in_turn(2000, work, lambda: "served", timeout=10)
            assert await asyncio.wait_for(served, 10) == "served"
            await hang_all(threads, work, range(3000, 3100), hang)
            for _ in range(3):
                served = threads.run_in_turn(0, work, lambda: "served", timeout=10)
                assert await asyncio.wait_for(served, 10) == "served"

    story(body)


def test_who_waits_for_a_turn_gets_it_when_others_give_theirs_back() -> None:
    """Limits in all."""

    async def body(threads: Threads) -> None:
        with hanging() as hang:
            await hang_all(threads, OPERATION, range(1000, 1100), hang)
            waiting = [
                asyncio.ensure_future(threads.run_in_turn(uid, OPERATION, lambda: "served"))
                for uid in range(1000, 1100)
            ]
            given_up = asyncio.ensure_future(threads.turn(1000, OPERATION, None))
            await asyncio.sleep(0)
            given_up.cancel()
            assert not any(each.done() for each in waiting)
        assert set(await asyncio.gather(*waiting)) == {"served"}
        # Nothing is lost on those who gave up, and nothing is kept of those who have gone.
        for _ in range(OPERATION.value):
            await threads.turn(1000, OPERATION, 5)

    story(body)


@pytest.mark.parametrize("make", [slow_pipe, quick_memfd])
def test_closes_that_hang_for_many_users_leave_threads_to_root(
    make: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits in all."""

    async def body(threads: Threads) -> None:
        stuck = {make() for _ in range(4 * 300)}
        roots, closed = make(), threading.Event()
        close = os.close
        with hanging() as hang:

            def closing(fd: int) -> None:
                if fd in stuck:
                    hang()
                close(fd)
                if fd == roots:
                    closed.set()

            monkeypatch.setattr(closes.os, "close", closing)
            for number, fd in enumerate(stuck):
                threads.close_fd(fd, owner=1000 + number // 4)
            threads.close_fd(roots, owner=0)
            assert await asyncio.to_thread(closed.wait, 10)

    story(body)
    monkeypatch.undo()


def test_looks_at_sysfs_do_not_wait_behind_what_hangs() -> None:
    async def body(threads: Threads) -> None:
        with hanging() as hang:
            stuck = [asyncio.ensure_future(threads.run(hang)) for _ in range(80)]
            assert await threads.look(lambda: "seen") == "seen"
        assert set(await asyncio.gather(*stuck)) == {"late"}

    story(body)


def test_a_file_that_closes_at_once_does_not_wait_behind_those_that_may_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hanging files."""

    async def body(threads: Threads) -> None:
        slow, closed = [*os.pipe(), *os.pipe(), *os.pipe()], threading.Event()
        quick = os.memfd_create("quick")
        close = os.close
        with hanging() as hang:

            def closing(fd: int) -> None:
                if fd in slow:
                    hang()
                close(fd)
                if fd == quick:
                    closed.set()

            monkeypatch.setattr(closes.os, "close", closing)
            for fd in slow:
                threads.close_fd(fd, owner=USER)
            threads.close_fd(quick, owner=USER)
            assert await asyncio.to_thread(closed.wait, 10)

    story(body)
    monkeypatch.undo()


def test_what_comes_with_a_cancellation_is_dealt_with_in_a_thread() -> None:
    """It may be a device that has to be detached."""

    async def body(threads: Threads) -> None:
        late: list[tuple[str, bool]] = []
        ended = asyncio.Event()
        begun = threading.Event()

        def note(result: str) -> None:
            late.append((result, threading.current_thread() is threading.main_thread()))

        def work() -> str:
            begun.set()
            return "made"

        task = asyncio.ensure_future(threads.run(work, late=note, ended=ended.set))
        await asyncio.sleep(0)
        begun.wait(10)
        wait([*threads._running], 10)  # done, and the event loop has not heard of it
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended.wait()
        assert late == [("made", False)]

    story(body)


def test_who_is_in_a_thread_already_closes_there() -> None:
    async def body(threads: Threads) -> None:
        quick = os.memfd_create("quick")
        await threads.run(lambda: threads.close_fd(quick, owner=USER))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(quick)

    story(body)


def test_what_is_to_be_closed_at_a_stop_is_closed_and_waited_for() -> None:
    async def run() -> None:
        for _ in range(50):
            threads = Threads()
            fds = [fd for _ in range(20) for fd in os.pipe()]
            threads.close_fds(fds, USER)
            # It is found to be slow, and handed on, while the pools are being shut.
            assert threads.stop(20) == 0
            for fd in fds:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)
            threads.remove(
                lambda number: True, 1, lambda gone: None
            )  # too late, and nothing waits for it
            assert threads.stop(0) == 0

    asyncio.run(run())


def test_a_stop_says_that_something_hangs() -> None:
    """Hanging files."""

    async def run() -> None:
        threads = Threads()
        with hanging() as hang:
            with pytest.raises(TimedOut):
                await threads.run(hang, timeout=0.001)
            assert threads.stop(0.01) == 1

    asyncio.run(run())


# No room for another thread


class NoThread:
    """Makes pools unable to start threads, as at the system's limit of tasks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __enter__(self) -> None:
        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        self._monkeypatch.setattr(threading.Thread, "start", start)

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()


def test_where_no_thread_can_be_started_an_operation_is_refused_and_never_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(threads: Threads) -> None:
        done: list[str] = []
        with NoThread(monkeypatch):
            for _ in range(Work.OPERATION.value + 1):
                with pytest.raises(LimitsExceeded, match="thread"):
                    await threads.run_in_turn(1000, Work.OPERATION, lambda: done.append("refused"))
        # It has its turns again, and what was refused is not done later.
        await threads.run_in_turn(1000, Work.OPERATION, lambda: done.append("done"))
        assert done == ["done"]

    story(body)


def test_where_no_thread_can_be_started_an_end_waits_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(threads: Threads) -> None:
        done: list[str] = []
        closed = threading.Event()
        reading, writing = os.pipe()
        os.close(writing)
        with NoThread(monkeypatch):
            end = asyncio.ensure_future(
                threads.run_in_turn(1000, Work.ENDING, lambda: done.append("first"))
            )
            look = asyncio.ensure_future(threads.look(lambda: done.append("look")))
            threads.close_fd(reading, owner=USER)
            await asyncio.sleep(0)
        await threads.run_in_turn(1000, Work.ENDING, lambda: done.append("second"))
        await end
        await threads.look(lambda: None)
        await look
        assert sorted(done) == ["first", "look", "second"]
        quick = os.memfd_create("quick")
        monkeypatch.setattr(
            closes.os, "close", lambda fd, close=os.close: (close(fd), closed.set())
        )
        threads.close_fd(quick, owner=USER)
        assert await asyncio.to_thread(closed.wait, 10)

    story(body)
    monkeypatch.undo()


def test_a_failure_that_comes_with_a_cancellation_is_nobodys() -> None:
    """As at a stop, where asyncio complains of what nobody has taken."""
    complaints: list[str] = []

    async def body(threads: Threads) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(context["message"])
        )
        failed = threading.Event()

        def fail() -> None:
            try:
                raise ValueError("so")
            finally:
                failed.set()

        for _ in range(20):
            failed.clear()
            task = asyncio.ensure_future(threads.run(fail))
            await asyncio.sleep(0)
            failed.wait(10)
            # The loop hears of the failure in the turn in which the task is cancelled.
            asyncio.get_running_loop().call_soon(task.cancel)
            with suppress(asyncio.CancelledError, ValueError):
                await task
            del task
            gc.collect()

    story(body)
    assert complaints == []
