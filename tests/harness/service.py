# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd as systemd runs it: one after the other on a bus, with what the former has left behind.

The test is systemd: it starts, restarts and stops loopd, and keeps its fds meanwhile.
"""

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.harness import loops, wire
from tests.harness.area import area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import DEVICE, MANAGER_PATH, OBJECT_MANAGER, Caller
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.fd_store import FdStore
from tests.harness.images import MIB, make_gpt, make_plain
from tests.harness.logind import LogindDouble
from tests.harness.polkit import Answer, PolkitDouble
from tests.harness.raw import RawClient
from tests.harness.systemd import SystemdDouble

PREFIX = "/org/example/Loop1/device/"
MARKS = ("attached", "unprivileged")
RECORDS = "leases"
_LOOP = re.compile(r"loop\d+_\d+")


class Service:
    """A unit, and the machine around it, until `close`."""

    def __init__(self, *, maximum: int = 4096, users: tuple[int, ...] = ()) -> None:
        """Have everything ready but loopd; the store has room for so many fds, and logind knows
        these users.
        """
        self._exit = ExitStack()
        self._users = users
        self._numbers = itertools.count()
        self.daemon: Daemon
        self.prelude = ""
        """What every loopd from now on does before it starts."""
        self.environment: dict[str, str]
        """What every loopd from now on is told by systemd; nothing if there is none."""
        with ExitStack() as stack:
            self.files = stack.enter_context(area("files"))
            self.runtime_directory = stack.enter_context(area("run"))
            self.store = stack.enter_context(FdStore(maximum))
            self.environment = dict(self.store.environment)
            self._exit = stack.pop_all()
        try:
            self.new_bus()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it all."""
        self._exit.close()

    def new_bus(self) -> None:
        """Have another bus from now on, as when it was started anew."""
        self.bus = self._exit.enter_context(PrivateBus())
        self.polkit = self._exit.enter_context(PolkitDouble(self.bus, Answer.ALLOW))
        self.systemd = self._exit.enter_context(SystemdDouble(self.bus, self.store))
        self.logind = self._exit.enter_context(LogindDouble(self.bus, *self._users))

    # --- the life of loopd

    def start(self, **options: Any) -> Daemon:
        """Start loopd with what is in the store."""
        given: dict[str, Any] = {
            "prelude": self.prelude,
            "runtime_directory": self.runtime_directory,
            "stored": self.store.fds(),
            "environment": self.environment,
        }
        self.daemon = self._exit.enter_context(Daemon(self.bus, **given | options))
        return self.daemon

    def kill(self) -> None:
        """Be the OOM killer."""
        self.daemon.kill()

    def stop(self) -> None:
        """Be `systemctl stop`."""
        self.systemd.job = "stop"
        assert self.daemon.terminate() == 0
        self.systemd.job = None
        self.store.settle()
        self.store.drop()

    def end_for_restart(self) -> None:
        """Be the first half of `systemctl restart`."""
        self.systemd.job = "restart"
        assert self.daemon.terminate() == 0
        self.systemd.job = None

    def restart(self, **options: Any) -> Daemon:
        """Be `systemctl restart`."""
        self.end_for_restart()
        return self.start(**options)

    def crash(self, **options: Any) -> Daemon:
        """Be the OOM killer, and then systemd with Restart=on-failure."""
        self.kill()
        return self.start(**options)

    # --- clients and their files

    def caller(self, user: str | None = "nobody") -> Caller:
        """Start a caller that ends with the service."""
        return self._exit.enter_context(Caller(self.bus, user))

    def image(self, size: int = MIB, owner: str | None = "nobody") -> Path:
        """Return a new patterned file of a user's."""
        return make_plain(self.new_path(), size, owner=owner)

    def gpt(self, owner: str | None = "nobody") -> Path:
        """Return a new image with two partitions."""
        return make_gpt(self.new_path(), owner=owner)

    def new_path(self) -> Path:
        """Return the name of a file that is not there yet."""
        return self.files / f"file{next(self._numbers)}"

    # --- what there is

    def bound(self) -> dict[int, loops.BoundLoop]:
        """Return what is bound to files of this service's clients."""
        return {
            number: loop
            for number, loop in loops.bound_loops().items()
            if loop.backing_file.startswith(f"{self.files}/")
        }

    def devices(self, client: RawClient) -> dict[str, dict[str, Any]]:
        """Return the managed devices that a client sees, by label, with their properties."""
        reply = client.call(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects", destination=LOOPD)
        found = wire.plain(reply.body[0])
        return {
            path.removeprefix(PREFIX): interfaces[DEVICE]
            for path, interfaces in found.items()
            if interfaces.get(DEVICE, {}).get("Managed")
        }

    def marks(self) -> list[str]:
        """Return the marks in the runtime directory; a link beside one has the diskseq, too."""
        return sorted(
            f"{directory}/{name}"
            for directory in MARKS
            for name in _list(self.runtime_directory / directory)
            if "_" not in name
        )

    def records(self) -> list[str]:
        """Return the labels that have a record, and what else lies there."""
        return sorted(_list(self.runtime_directory / RECORDS))

    def wrong(self, client: RawClient) -> list[str]:
        """Return what is there and should not be, or the other way round, if nothing goes on."""
        devices, bound = self.devices(client), self.bound()
        numbers = {it["Number"] for label, it in devices.items() if _LOOP.fullmatch(label)}
        found = [
            f"{loop.node} is bound to {loop.backing_file}"
            for number, loop in bound.items()
            if number not in numbers
        ]
        found += [
            f"partition {partition} of nothing"
            for number in loops.used_numbers
            if not loops.loop_is_bound(number)
            for partition in loops.partitions(number)
        ]
        found += [
            f"{name} is in the store" for name in self.store.names() if _label(name) not in devices
        ]
        found += [f"a record of {each}" for each in self.records() if _label(each) not in devices]
        found += [
            f"the mark {mark}"
            for mark in self.marks()
            if (number := int(mark.partition("/loop")[2])) not in numbers
            # While another run has the number, nobody can tell whose the mark is.
            and (number in bound or not loops.loop_is_bound(number))
        ]
        return found

    def wait_right(self, client: RawClient, timeout: float | None = None) -> None:
        """Wait until nothing is `wrong`, each look being paced by loopd's answer."""
        deadline = Deadline(timeout)
        while wrong := self.wrong(client):
            assert deadline.remaining, wrong

    def wait_nothing(self, client: RawClient | None = None, timeout: float | None = None) -> None:
        """Wait until there is no device, and nothing of one either."""
        deadline = Deadline(timeout)
        with ExitStack() as stack:
            client = client or stack.enter_context(self.bus.connect())
            while self.devices(client):
                assert deadline.remaining, self.devices(client)
            self.wait_right(client, deadline.remaining)
        assert self.store.names() == []
        assert self.bound() == {}


def _label(name: str) -> str:
    """Return the device's label in the name of what is stored for it, or of its record."""
    return name.partition(".")[0]


def _list(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


@contextmanager
def service(**options: Any) -> Iterator[Service]:
    """A service, which at the end has left nothing behind."""
    made = Service(**options)
    try:
        yield made
        if made.daemon.process.status is None:
            made.wait_nothing()
    finally:
        made.close()
