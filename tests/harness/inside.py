# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases of loopd in this process, over a scripted kernel: no bus, and no root.

The daemon's assembly puts them together.  What the kernel changes is told as its uevents tell it,
polkit is a function, and a client is a name that may leave at any moment.
"""

import asyncio
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from loopd.daemon import closes
from loopd.daemon.access import Caller, Client
from loopd.daemon.actions import detach
from loopd.daemon.actions.examine import AttachOptions
from loopd.daemon.assembly import Host, Upwards, put_use_cases_together
from loopd.daemon.config import Config
from loopd.daemon.devices import registry
from loopd.daemon.devices.device import Device
from loopd.daemon.host.logind import Logind
from loopd.daemon.host.polkit import Authority
from loopd.daemon.threads import Threads, Work
from loopd.errors import PeerError
from loopd.fd import OwnedFd
from loopd.loop import partition_table
from tests.harness import leaks
from tests.harness.asynchronous import run_async
from tests.harness.deadline import Deadline
from tests.harness.script import Script
from tests.harness.scripted import ScriptedKernel, Traits

TABLE = b"1 2048 2048 0\n2 4096 2048 0\n"
"""What the child that reads partition tables says of images.make_gpt()'s."""


_PATIENCE = 5.0
"""Seconds for what takes no time at all."""


async def no_logind(*_: Any, **__: Any) -> list[Any]:
    """Be a bus without logind."""
    raise PeerError("there is none", "org.freedesktop.DBus.Error.ServiceUnknown")


async def says_yes(*_: Any, **__: Any) -> list[Any]:
    """Be a bus on which polkit allows everything."""
    return [[True, False, {}]]


class _Announced:
    """Notes what the announcer would tell."""

    def __init__(self, told: list[tuple[str, str]], on_change: Callable[[Device], None]) -> None:
        self._told = told
        self._on_change = on_change

    def added(self, device: Device) -> None:
        self._told.append(("added", device.path))

    def changed(self, device: Device) -> None:
        self._told.append(("changed", device.path))
        self._on_change(device)

    def removed(self, device: Device) -> None:
        self._told.append(("removed", device.path))


class _Idle:
    """A daemon that stays."""

    def touch(self) -> None:
        """Do nothing."""


class Inside:
    """What the daemon is made of, on the running event loop."""

    def __init__(
        self,
        directory: Path,
        scripted: ScriptedKernel,
        *,
        config: Config | None = None,
        polkit: Callable[..., Coroutine[Any, Any, list[Any]]] = says_yes,
    ) -> None:
        """`directory` becomes the runtime directory."""
        self.scripted = scripted
        self.told: list[tuple[str, str]] = []
        """What happened to which object path."""
        self._directory = directory
        self._loop = asyncio.get_running_loop()
        self._names = itertools.count(1)
        config = config or Config()
        self.threads = Threads()
        authority = Authority(polkit, timeout=1, interactive_timeout=1, max_questions=4)
        host = Host(
            directory,
            self.threads,
            authority=authority,
            logind=Logind(no_logind),
            numbers=scripted.numbers,
        )
        self.markers, self.records, self.store = host.markers, host.records, host.store
        self.markers.prepare()
        self.records.load()
        up = Upwards()
        up.announcer, up.idle = _Announced(self.told, self._changed), _Idle()  # type: ignore[assignment]
        cases = put_use_cases_together(config, host, up)
        self.registry, self.leases, self.lifetimes = cases.registry, cases.leases, cases.lifetimes
        self.locks, self.claims, self.spares = cases.locks, cases.claims, cases.spares
        self.quota, self.ending, self.manager = cases.quota, cases.ending, cases.manager
        self.operations, self.attaching = cases.operations, cases.attaching
        scripted.uevent = self._uevent
        self._fds = {*leaks.open_fds()}

    def _changed(self, device: Device) -> None:
        """A device that the registry knows has changed."""

    def _uevent(self, number: int, seqnum: int) -> None:
        self._loop.call_soon_threadsafe(self.registry.heard, number, seqnum)

    # Clients

    def caller(self, uid: int) -> Caller:
        """Be a new connection of a user's, in a call."""
        name = f":1.{next(self._names)}"
        return Caller(Client(name, uid, self._loop.create_future()), interactive=False)

    def leave(self, caller: Caller) -> None:
        """Have its connection end, as the bus tells it; a second time does nothing."""
        if not caller.client.gone:
            caller.client.left.set_result(None)
            self.manager.client_left(caller.client)

    async def attach(self, caller: Caller, image: Path, **options: Any) -> Device:
        """Attach a file; the options are those of AttachOptions."""
        fd = OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC))
        return await self.attaching.attach(caller, fd, AttachOptions(**options))

    # What there is

    def unrecorded(self) -> list[str]:
        """Return what is bound and no record of loopd's."""
        recorded = {device.number for device in self.registry if device.managed}
        return [f"loop{number}" for number in self.scripted.bound() if number not in recorded]

    def remains(self, others: tuple[int, ...] = ()) -> list[str]:
        """Return all that should go when nobody has a device; `others` are fds of the test's."""
        found = [f"loop{number} is bound" for number in self.scripted.bound()]
        found += [
            f"fd {fd} is open on {target}"
            for fd, target in leaks.open_fds().items()
            if fd not in self._fds and fd not in others
        ]
        found += [f"{device.node} is recorded" for device in self.registry]
        found += [f"a lease on {lease.device}" for lease in self.leases]
        found += [f"leases held by {holder}" for holder in self.leases._by_holder]
        found += [f"a lock on {held}" for held in self.locks._held]
        found += [f"a claim of {claimed}" for claimed in self.claims._claimed]
        found += [f"a claim of loop{number}" for number in self.markers._claims]
        found += [str(mark) for mark in self._directory.glob("*/loop*")]
        if taken := self.quota.taken:
            found.append(f"{taken} places are taken")
        return found

    async def until_none(self, what: Callable[[], list[str]]) -> None:
        """Wait until a list is empty, which threads and tasks in the background see to."""
        deadline = Deadline(_PATIENCE)
        while left := what():
            assert deadline.remaining, left
            if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(
                    tasks, timeout=deadline.remaining, return_when=asyncio.FIRST_COMPLETED
                )
            else:
                await asyncio.sleep(0)  # threads are at it: a look for each turn of the loop

    async def require_turns(self, *uids: int) -> None:
        """Fail unless all turns of these users can be had."""
        for uid, work in itertools.product(uids, Work):
            taken = [await self.threads.turn(uid, work, 5) for _ in range(work.value)]
            for give_back in taken:
                give_back()

    async def quiet(self) -> None:
        """Wait until no task is under way."""
        deadline = Deadline(_PATIENCE)
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            _, late = await asyncio.wait(tasks, timeout=deadline.remaining)
            assert not late, f"tasks that do not end: {late}"

    async def end(self) -> None:
        """Wait for all that goes on."""
        self.scripted.uevent = lambda *_: None
        await asyncio.sleep(0)  # what was told already is looked at
        await self.quiet()
        assert self.threads.stop(_PATIENCE) == 0
        await asyncio.sleep(0)
        await self.quiet()
        self.lifetimes.close()


@contextmanager
def scripted_kernel(traits: Traits | None = None) -> Iterator[tuple[ScriptedKernel, Script]]:
    """Be on a scripted kernel, where waiting takes no time; nothing may stay open or run."""
    scripted, script = ScriptedKernel(traits), Script()
    before, running = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    interval = sys.getswitchinterval()
    with ExitStack() as stack:
        # Else whoever looks for an end keeps the threads from it that work at it.
        stack.callback(sys.setswitchinterval, interval)
        sys.setswitchinterval(0.0001)
        for place, name, value in (
            (time, "sleep", lambda _: None),
            (registry, "_LOOK_AGAIN", 0),
            (detach, "_CLEAR_PAUSES", (0.001,)),
            # A child of its own takes longer than all the rest.
            (partition_table, "_ask", lambda _: TABLE),
            # Clients' fds may be on devices of the script.
            (closes, "_close", scripted.close),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(scripted.installed())
        stack.enter_context(script.running())
        yield scripted, script
        for thread in set(threading.enumerate()) - running:
            thread.join(20)
            assert not thread.is_alive(), thread
    assert scripted.bound() == [], "left bound"
    assert scripted.open_fds() == [], f"left open: {scripted.open_fds()}"
    assert set(os.listdir("/proc/self/fd")) == before, "left open"


def run_inside(
    directory: Path,
    story: Callable[[Inside, Script], Coroutine[Any, Any, None]],
    traits: Traits | None = None,
) -> Script:
    """Run a story with the parts of a daemon, and look for what it has left."""

    async def main() -> None:
        inside = Inside(directory, scripted)
        await story(inside, script)
        await inside.end()
        assert not (left := inside.remains()), left

    with scripted_kernel(traits) as (scripted, script):
        run_async(main())
    return script
