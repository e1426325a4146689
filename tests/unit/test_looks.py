# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks at passed files that never come to be: their fds are closed, and nothing waits for ever."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from loopd.daemon.access import Caller, Client
from loopd.daemon.actions.examine import AttachOptions, Proposals
from loopd.daemon.actions.guard import Manager
from loopd.daemon.config import Config, Deadlines
from loopd.daemon.threads import Threads, Work
from loopd.errors import LimitsExceeded, TimedOut
from loopd.fd import OwnedFd
from tests.unit.test_threads import NoThread

USER = 1000
IMPATIENT = Config(deadlines=Deadlines(operation=0))


class Stand:
    """A manager and proposals, of which threads are all that is used."""

    def __init__(self, config: Config) -> None:
        self.threads = Threads()
        unused: Any = None
        self.manager = Manager(config, self.threads, *[unused] * 6)
        self.proposals = Proposals(config, self.threads)
        left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.caller = Caller(Client(":1.7", USER, left), False)

    def named(self, fd: int) -> Awaitable[object]:
        """Look which device is meant."""
        return self.manager.named(self.caller, OwnedFd(fd))

    def proposed(self, fd: int) -> Awaitable[object]:
        """Look at what is to be attached."""

        async def look() -> None:
            with OwnedFd(fd) as owned:
                await self.proposals.look(USER, owned, AttachOptions())

        return look()


LOOKS = pytest.mark.parametrize("look", [Stand.named, Stand.proposed])


@pytest.fixture
def fds() -> Iterator[None]:
    """Fails if an fd is left."""
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def story(body: Callable[[Stand], Awaitable[None]], config: Config | None = None) -> None:
    async def run() -> None:
        stand = Stand(config or Config())
        try:
            await asyncio.wait_for(body(stand), 20)
        finally:
            # A thread closes what waits to be closed.
            stand.threads.close_fd(os.memfd_create("last"), owner=USER)
            assert stand.threads.stop(20) == 0

    asyncio.run(run())


@LOOKS
@pytest.mark.usefixtures("fds")
def test_where_no_thread_can_be_started_no_fd_is_left(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Stand, int], Awaitable[object]]
) -> None:
    async def body(stand: Stand) -> None:
        with NoThread(monkeypatch), pytest.raises(LimitsExceeded):
            await look(stand, os.memfd_create("file"))

    story(body)


@LOOKS
@pytest.mark.usefixtures("fds")
def test_a_user_whose_looks_hang_waits_for_them_and_no_fd_is_left(
    look: Callable[[Stand, int], Awaitable[object]],
) -> None:
    """Hanging files: and nobody else does."""

    async def body(stand: Stand) -> None:
        end = threading.Event()
        hanging = [
            asyncio.ensure_future(stand.threads.run_in_turn(USER, Work.LOOK, lambda: end.wait(20)))
            for _ in range(Work.LOOK.value)
        ]
        await asyncio.sleep(0)
        with pytest.raises(TimedOut):
            await look(stand, os.memfd_create("file"))
        end.set()
        await asyncio.gather(*hanging)

    story(body, IMPATIENT)


def test_a_question_to_a_device_has_a_deadline() -> None:
    """Hanging files: also where it is asked by itself, as Detach does."""

    async def body(stand: Stand) -> None:
        end = threading.Event()
        device: Any = type("Device", (), {"managed": False})()
        with pytest.raises(TimedOut):
            await stand.manager.in_thread(stand.caller, device, lambda: end.wait(20))
        end.set()

    story(body, IMPATIENT)
