# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closes that hang take a few threads of their user's, and nobody else waits for them."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from loopd import errors
from loopd.daemon import closes, threads

SLOW, QUICK = closes._SLOW_AT_A_TIME, closes._QUICK_AT_A_TIME
HOG, VICTIM = 1000, 1001


class Closing:
    """Closes of fds, some of which hang until they are released; threads do it."""

    def __init__(self, threads_: threads.Threads) -> None:
        self.threads = threads_
        self.closes = threads_.closes
        self.hanging: set[int] = set()
        self.begun = 0
        self._real_close = os.close
        self._changed = threading.Condition()
        self._closed: set[int] = set()
        self._released = False

    def close(self, fd: int) -> None:
        """Take the place of os.close."""
        with self._changed:
            if fd in self.hanging:
                self.begun += 1
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._released, 20)
            self._real_close(fd)
            self._closed.add(fd)
            self._changed.notify_all()

    def send(
        self, owner: int | None, count: int, make: Callable[[], int], *, hang: bool
    ) -> list[int]:
        """Have so many new fds closed at the expense of an owner."""
        fds = [make() for _ in range(count)]
        if hang:
            self.hanging.update(fds)
        # Those that may hang are counted by the thread that finds it out, here this one.
        (self.closes.here if make is slow_fd else self.closes.later)(fds, owner)
        return fds

    def wait_begun(self, count: int) -> None:
        """Wait until so many closes hang."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.begun >= count, 20), self.begun

    def wait_closed(self, fds: list[int]) -> None:
        """Wait until fds are closed."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._closed.issuperset(fds), 20)

    def release(self) -> None:
        """Let all that hangs go on."""
        with self._changed:
            self._released = True
            self._changed.notify_all()


@contextmanager
def closing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Closing]:
    """Threads of the test's own; at the end all is released, and all is closed."""
    made = Closing(threads.Threads())
    with monkeypatch.context() as patched:
        patched.setattr(closes.os, "close", made.close)
        try:
            yield made
        finally:
            made.release()
            assert made.threads.stop(20) == 0
    assert not made.closes.crowded


def slow_fd() -> int:
    """An fd whose close may hang, as far as is known."""
    return os.open(os.devnull, os.O_RDONLY)


def quick_fd() -> int:
    """An fd whose close is sure to end, as far as is known."""
    return os.memfd_create("quick")


def test_users_whose_closes_hang_have_a_few_threads_each_and_others_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hanging files: one user with several hundred, and sixteen with 32 each."""
    with closing(monkeypatch) as made:
        made.send(HOG, 300, slow_fd, hang=True)
        crowd = range(2000, 2016)
        for owner in crowd:
            made.send(owner, 32, slow_fd, hang=True)
        made.wait_begun(17 * SLOW)
        made.wait_closed(made.send(VICTIM, 8, slow_fd, hang=False))
        made.wait_closed(made.send(VICTIM, 8, quick_fd, hang=False))
        # The threads of the pool that closes them are as many as hang, and the victim's. One that
        # has just ended its work may not be idle yet when the next comes.
        slow = [each for each in threading.enumerate() if each.name.startswith("slow-close")]
        assert len(slow) <= 19 * SLOW
        assert made.begun == 17 * SLOW
        assert made.closes.is_full(HOG)
        assert not any(map(made.closes.is_full, (*crowd, VICTIM)))


def test_files_that_were_to_close_quickly_and_hang_take_threads_of_their_user_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hanging files: such as one on ext4 over a disk that does not answer."""
    with closing(monkeypatch) as made:
        for _ in range(70):
            made.send(HOG, 1, quick_fd, hang=True)
        made.wait_begun(QUICK)
        made.wait_closed(made.send(VICTIM, 8, quick_fd, hang=False))
        assert made.begun == QUICK


def test_a_user_with_many_fds_to_be_closed_is_full_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hanging files: of any kind of file."""
    for make, limit in ((slow_fd, closes._MAX_SLOW), (quick_fd, closes._MAX_OPEN)):
        with closing(monkeypatch) as made:
            sent = made.send(HOG, limit, make, hang=True)
            made.wait_begun(1)
            assert not made.closes.crowded
            sent += made.send(HOG, 2 * SLOW, slow_fd, hang=True)
            assert made.closes.is_full(HOG)
            assert made.closes.crowded
            assert not made.closes.is_full(VICTIM)
            made.release()
            made.wait_closed(sent)


def test_a_stop_waits_for_no_close_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hanging files: whatever kind of file it is."""
    for make in (slow_fd, quick_fd):
        with closing(monkeypatch) as made:
            made.send(HOG, 1, make, hang=True)
            made.wait_begun(1)
            assert made.threads.stop(0.01) == 1


def test_looks_that_hang_take_threads_of_their_user_only() -> None:
    """Hanging files."""

    async def body() -> None:
        made, end = threads.Threads(), threading.Event()
        look = threads.Work.LOOK
        try:
            hanging = [
                asyncio.ensure_future(made.run_in_turn(HOG, look, lambda: end.wait(20)))
                for _ in range(70)
            ]
            assert await made.run_in_turn(VICTIM, look, lambda: "seen", timeout=20) == "seen"
            used = [each for each in threading.enumerate() if each.name.startswith("file-look")]
            assert len(used) <= look.value + 1
        finally:
            end.set()
        assert all(await asyncio.gather(*hanging))
        assert made.stop(20) == 0

    asyncio.run(body())


def test_what_never_gets_a_thread_or_a_turn_is_told() -> None:
    """So that fds which were to be closed there are closed all the same."""

    async def body() -> None:
        made, end = threads.Threads(), threading.Event()
        unused: list[str] = []

        def scan(name: str, timeout: float | None = None) -> Coroutine[Any, Any, bool]:
            note = partial(unused.append, name)
            work = threads.Work.SCAN  # of which a user has one at a time
            return made.run_in_turn(HOG, work, end.wait, timeout=timeout, unused=note)

        first = asyncio.ensure_future(scan("first"))
        await asyncio.sleep(0)
        with pytest.raises(errors.TimedOut):
            await scan("late", timeout=0.01)
        given_up = asyncio.ensure_future(scan("given up"))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        end.set()
        await first
        await scan("last")
        assert unused == ["late", "given up"]
        assert made.stop(20) == 0

    asyncio.run(body())
