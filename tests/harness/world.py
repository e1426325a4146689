# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bus, an authority and a loopd that several tests may share, and what each must leave behind.

Whatever a test does to a World, afterwards loopd has no device and exactly the fds that it had when
it was idle for the first time.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.harness import process
from tests.harness.area import area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import MANAGER, MANAGER_PATH, PROPERTIES, Caller
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_plain
from tests.harness.polkit import RULES_ALLOW_ALL, Answer, PolkitDouble, RealPolkit
from tests.harness.raw import RawClient

USER = "nobody"
OTHER = "games"
"""Another ordinary user."""

_LOOP_CONTROL = "/dev/loop-control"
_REMOVALS = 16
"""Loop devices that loopd removes at a time."""


@dataclass(kw_only=True)
class World:
    """A running loopd and whom it talks to."""

    bus: PrivateBus
    authority: PolkitDouble | RealPolkit
    daemon: Daemon
    files: Path
    idle_fds: dict[int, str]
    """The fds of the daemon while nobody asks anything of it."""
    _answer: Answer = Answer.ALLOW
    _test: ExitStack = field(default_factory=ExitStack)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def polkit(self) -> PolkitDouble:
        """The authority, where it is a double."""
        assert isinstance(self.authority, PolkitDouble)
        return self.authority

    def caller(self, user: str | None = USER) -> Caller:
        """Start a caller that ends with the test."""
        return self._test.enter_context(Caller(self.bus, user))

    def raw(self, user: str | int | None = USER) -> RawClient:
        """Return a raw connection that closes with the test."""
        return self._test.enter_context(self.bus.connect(user))

    def image(self, size: int = MIB, *, owner: str | None = USER, mode: int = 0o644) -> Path:
        """Return a new patterned file of a user's."""
        return make_plain(self.new_path(), size, owner=owner, mode=mode)

    def new_path(self) -> Path:
        """Return the name of a file that is not there yet."""
        return self.files / f"file{next(self._numbers)}"

    def device_count(self) -> int:
        """Return the property DeviceCount."""
        with self.bus.connect() as client:
            return _device_count(client)

    def wait_devices(self, count: int, timeout: float | None = None) -> None:
        """Wait until loopd has so many devices, each look being paced by its answer."""
        deadline = Deadline(timeout)
        with self.bus.connect() as client:
            while (found := _device_count(client)) != count:
                if not deadline.remaining:
                    raise TimeoutError(f"DeviceCount stays {found}, not {count}")

    def wait_fds(self, wanted: Callable[[dict[int, str]], bool], what: str) -> dict[int, str]:
        """Wait until the daemon's fds are as `wanted`; return them.

        Those that remove loop devices are left out: that is done in threads of its own, long after
        the devices are gone, and takes the time that the kernel likes.
        """

        def holds(fds: dict[int, str]) -> bool:
            removals = [target for target in fds.values() if target == _LOOP_CONTROL]
            rest = {fd: target for fd, target in fds.items() if target != _LOOP_CONTROL}
            return wanted(rest) and len(removals) <= _REMOVALS

        found = self.daemon.wait_fds(holds, what)
        return {fd: target for fd, target in found.items() if target != _LOOP_CONTROL}

    def wait_idle_fds(self) -> None:
        """Wait until the daemon has exactly the fds it had when it was idle."""
        self.wait_fds(
            lambda fds: fds == self.idle_fds, f"loopd to have its fds again ({self.idle_fds})"
        )

    @contextmanager
    def test(self) -> Iterator["World"]:
        """Be a test's world, and find what it left behind."""
        process.logs.append(_Since(self.daemon.process.log))
        if isinstance(self.authority, PolkitDouble):
            self.authority.reset(self._answer)
        with ExitStack() as self._test:
            yield self
        if self.daemon.process.status is None and self.bus.process.status is None:
            self.wait_devices(0)
            self.wait_idle_fds()


class _Since(process.Log):
    """What is printed from now on, to be shown when the test fails."""

    def __init__(self, log: process.Log) -> None:
        self.name = log.name
        self._log = log
        self._start = len(log.text)

    @property
    def text(self) -> str:
        return self._log.text[self._start :]


@contextmanager
def make_world(
    *,
    bus_type: type[PrivateBus] = PrivateBus,
    authority: Answer | str | None = Answer.ALLOW,
    policies: list[Path] | None = None,
    accounts: Sequence[int] = (),
    **daemon: Any,
) -> Iterator[World]:
    """Start a world: `authority` is a double's answer or rules for the real polkitd.

    `policies` and `accounts` go to the bus and what else there is to Daemon.
    """
    with ExitStack() as stack:
        files = stack.enter_context(area("files"))
        bus = stack.enter_context(bus_type(policies=policies, accounts=accounts))
        polkit: PolkitDouble | RealPolkit
        if isinstance(authority, str):
            polkit = RealPolkit(bus, authority)
        else:
            polkit = PolkitDouble(bus, authority or Answer.DENY)
        # Without an authority nobody owns polkit's name.
        if authority is not None:
            stack.enter_context(polkit)
        running = stack.enter_context(Daemon(bus, **daemon))
        with bus.connect() as client:
            _device_count(client)
        world = World(
            bus=bus,
            authority=polkit,
            daemon=running,
            files=files,
            idle_fds=_lasting(running.fds()),
        )
        if isinstance(polkit, PolkitDouble):
            world._answer = polkit.default
        yield world


def _lasting(fds: dict[int, str]) -> dict[int, str]:
    """Leave out what an idle loopd opens for a glance, at others' devices or at its marks."""
    return {
        fd: target
        for fd, target in fds.items()
        if not target.startswith(("/dev/loop", "/sys/"))
        and (not target.startswith("/proc/") or target.endswith("/mountinfo"))
        and not target.endswith(("/attached", "/unprivileged", "/links"))
    }


def real_world(**options: Any) -> Any:
    """Start a world where the real polkitd allows everything."""
    return make_world(authority=RULES_ALLOW_ALL, **options)


def _device_count(client: RawClient) -> int:
    reply = client.call(
        MANAGER_PATH, PROPERTIES, "Get", "ss", [MANAGER, "DeviceCount"], destination=LOOPD
    )
    return int(reply.body[0].value)
