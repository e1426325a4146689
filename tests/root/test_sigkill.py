# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd is killed at every point where it changes something, and the next one puts it right.

Each test is a story that is told over and over, and ends each time at another point.  The suite
ends it before each change; with LOOPD_THOROUGH=1 also where loopd only looks.
"""

import errno
import fcntl
import os
import signal
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from loopd.loop import kernel
from loopd.loop.uapi import LO_FLAGS_AUTOCLEAR
from tests.harness import loops
from tests.harness.area import area
from tests.harness.bus import LOOPD
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, options
from tests.harness.deadline import Deadline
from tests.harness.kill_points import KillPoints
from tests.harness.raw import BUS, RawClient
from tests.harness.service import PREFIX, Service, service
from tests.harness.wire import CallError

THOROUGH = bool(os.environ.get("LOOPD_THOROUGH"))
NOBODY = 65534
DEAD = {f"{BUS}.Error.{name}" for name in ("NoReply", "ServiceUnknown", "NameHasNoOwner")}


class Story:
    """What happens once, and may be cut short by the end of loopd."""

    keeps_store = True
    """Whether systemd keeps its fds then."""
    supervised = True
    """Whether there is a systemd."""
    often = 1
    """How many times at most the suite ends it in the same place."""

    def __init__(self, unit: Service) -> None:
        self.unit = unit
        self.client: RawClient
        self.files: dict[bool, list[Path]] = {}

    # --- the parts

    @abstractmethod
    def prepare(self) -> None:
        """Do what nothing is to happen to."""

    @abstractmethod
    def act(self) -> Any:
        """Do what may be cut short; return something if it was answered."""

    @abstractmethod
    def check(self, answer: Any) -> None:
        """Look at what the next loopd has made of it."""

    def leave(self) -> None:
        """Have nothing any more."""
        for label in self.devices():
            with suppress(CallError):  # it has just gone
                self.client.call(PREFIX + label, DEVICE, "Detach", "a{sv}", [{}])

    # --- what they are made of

    def connect(self) -> RawClient:
        return self.unit.bus.connect("nobody")

    def call(self, *call: Any, **how: Any) -> Any:
        """Call loopd; None if it has not lived to answer."""
        path, interface, member, *rest = call
        try:
            return self.client.call(path, interface, member, *rest, **how).body
        except CallError as exc:
            if exc.name not in DEAD:
                raise
            self.unit.daemon.process.wait()
            return None

    def file(self, *, partitions: bool) -> Path:
        """Return a file that is not attached."""
        files = self.files.setdefault(partitions, [])
        free = {*files} - {Path(loop.backing_file) for loop in self.unit.bound().values()}
        if not free:
            free = {self.unit.gpt() if partitions else self.unit.image()}
            files += free
        return free.pop()

    def attach(self, *, partitions: bool = False, **named: Any) -> Any:
        """Attach a file; its label, or None."""
        fd = os.open(self.file(partitions=partitions), os.O_RDWR | os.O_CLOEXEC)
        try:
            given = options(named | {"partition-scan": partitions})
            answer = self.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, given], fds=[fd])
        finally:
            os.close(fd)
        # Also of one whose number we are not told.
        loops.used_numbers.update(self.unit.bound())
        return answer and answer[0].removeprefix(PREFIX)

    def take_hold(self, label: str) -> int | None:
        """Hold a device; the fd, or None."""
        path = PREFIX + label
        try:
            reply = self.client.call(path, DEVICE, "Hold", "a{sv}", [{}])
        except CallError as exc:
            if exc.name not in DEAD:
                raise
            self.unit.daemon.process.wait()
            return None
        return reply.fds[0]

    def devices(self) -> dict[str, dict[str, Any]]:
        return self.unit.devices(self.client)

    def killed(self) -> bool:
        return self.unit.daemon.process.status is not None

    def ping(self) -> None:
        """Give loopd time for what it does after an answer."""
        self.call(MANAGER_PATH, f"{BUS}.Peer", "Ping", destination=LOOPD)

    def wait_while(self, true: Callable[[], bool]) -> None:
        """Wait for what is done when all has been answered, or for the end."""
        deadline = Deadline()
        while not self.killed() and true():
            assert deadline.remaining
            self.ping()

    # --- telling it

    def tell(self, points: KillPoints, point: str = "") -> bool:
        """Tell it, with this end if any; return whether it came to it."""
        self.client = self.connect()
        try:
            self.prepare()
            with points.armed(point):
                answer = self.act()
            process = self.unit.daemon.process
            status = process.wait() if point in points.reached() else process.status
            if status is not None:
                assert self.unit.daemon.wait() in (0, -signal.SIGKILL), self.unit.daemon.log
                if not self.keeps_store:
                    self.unit.store.settle()
                    self.unit.store.drop()
                self.unit.start()
            self.check(answer)
            self.unit.wait_right(self.client)
            require_no_lock(self.unit, self.client)
            self.leave()
            self.unit.wait_nothing(self.client)
        finally:
            self.client.close()
        assert self.unit.store.complaints == []
        return status == -signal.SIGKILL


def require_no_lock(unit: Service, client: RawClient) -> None:
    """Fail if anything but a device that says so is locked."""
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    wait_lockable(fd)
    os.close(fd)
    for it in unit.devices(client).values():
        with suppress(FileNotFoundError):
            try:
                fd = os.open(it["Node"], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as exc:
                if exc.errno in (errno.ENXIO, errno.ENODEV):  # it is being removed
                    continue
                raise
            try:
                if it["Locked"] == "none":
                    wait_lockable(fd)
                    continue
                with pytest.raises(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if it["Locked"] == "exclusive":
                    with pytest.raises(BlockingIOError):
                        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            finally:
                os.close(fd)


def wait_lockable(fd: int) -> None:
    """Wait until others, such as udev, have let go of a lock, too."""
    deadline = Deadline()
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert deadline.remaining
        else:
            return


READS = (
    "kernel.statx",
    "kernel.dup",
    "kernel.release",
    "kernel.preadv",
    "kernel.partition_node_exists",
    "kernel.loop_get",
    "kernel.loop_attribute",
    "kernel.loop_bound",
    "kernel.loop_binding",
    "kernel.loop_partitions",
    "kernel.loop_of",
    "kernel.blkget",
    "kernel.blkssz",
    "kernel.block_",
)


def is_change(point: str) -> bool:
    """Whether an end there is another one than an end at the next point."""
    return not point.startswith(READS)


def often(point: str) -> int:
    """For which time it comes by there."""
    return int(point.rpartition("#")[2])


def sweep(kind: type[Story], fewest: int) -> None:
    """Tell a story with its ends, of which there are so many at the least."""
    with ExitStack() as stack:
        unit = stack.enter_context(service())
        points = KillPoints(stack.enter_context(area("points")), unit.runtime_directory)
        stack.callback(points.close)
        unit.prelude = points.prelude
        if not kind.supervised:
            unit.environment = {}
        unit.start()
        story = kind(unit)
        story.tell(points)  # what is done the first time only
        assert not story.tell(points)
        wanted = points.reached()
        if not THOROUGH:
            wanted = [point for point in wanted if is_change(point) and often(point) <= kind.often]
        missed = []
        for point in wanted:
            try:
                if not story.tell(points, point):
                    missed.append(point)
            except BaseException as exc:
                exc.add_note(f"killed at {point}")
                raise
        # Now and then udev has a part in it, or another's device, and another time it has not.
        ended = len(wanted) - len(missed)
        print(f"{kind.__name__}: {ended} ends; not come to: {missed}")
        assert ended >= fewest, (missed, wanted)


class Attaching(Story):
    """Somebody attaches a file and goes."""

    lifetime = "connection"
    lock = "exclusive"

    def prepare(self) -> None:
        """Everything is said at once."""

    def act(self) -> Any:
        label = self.attach(partitions=True, lock=self.lock, lifetime=self.lifetime)
        self.ping()
        return label

    def check(self, answer: Any) -> None:
        devices = self.devices()
        if self.lifetime == "system" or self.keeps_store:
            assert {*devices} >= ({answer} if answer else set())
        assert len(devices) <= 1
        for it in devices.values():
            if it["State"] == "attached":
                self.check_device(it, answered=bool(answer))

    def check_device(self, it: dict[str, Any], *, answered: bool) -> None:
        lasts = self.lifetime == "system"
        assert it["Owner"] == NOBODY
        assert it["Lifetime"] == self.lifetime
        assert it["Holder"] == ("" if lasts else self.client.unique_name)
        assert it["Autoclear"] is not lasts
        # Without a store the lock goes with loopd.  So do the partitions, where a udevd has the
        # kernel read a table of which it knows nothing.
        sure = answered and self.keeps_store
        assert it["Locked"] in {self.lock, self.lock if sure else "none"}
        assert len(it["Partitions"]) in {2, 2 if self.keeps_store else 0}

    def leave(self) -> None:
        if self.lifetime == "system":
            super().leave()
        self.client.close()
        self.client = self.connect()


class AttachingForEver(Attaching):
    lifetime = "system"


class AttachingAlone(Attaching):
    """Without systemd the kernel cleans up."""

    supervised = keeps_store = False


class AttachingForEverAlone(AttachingForEver):
    supervised = keeps_store = False


class Detaching(Story):
    """Somebody detaches a device that is partitioned, locked and held."""

    lifetime = "connection"

    def prepare(self) -> None:
        self.label = self.attach(partitions=True, lock="shared", lifetime=self.lifetime)
        self.hold = self.take_hold(self.label)

    def act(self) -> Any:
        answer = self.call(PREFIX + self.label, DEVICE, "Detach", "a{sv}", [{}])
        self.wait_while(lambda: bool(self.unit.marks() or self.unit.records()))
        return answer

    def check(self, answer: Any) -> None:
        devices = self.devices()
        assert {*devices} <= {self.label}
        for it in devices.values():
            assert it["Owner"] == NOBODY
            assert it["Lifetime"] in (self.lifetime, "")
            assert not answer or it["State"] == "detaching"
            if it["State"] == "attached" and self.keeps_store:
                assert (it["Holds"], it["Locked"]) in {(1, "shared"), (1, "none"), (0, "none")}

    def leave(self) -> None:
        super().leave()
        os.close(self.hold)


class DetachingWhatStays(Detaching):
    """Somebody has turned autoclear off by an fd of its own, and the kernel cleans up nothing."""

    supervised = keeps_store = False

    def prepare(self) -> None:
        super().prepare()
        fd = os.open(self.devices()[self.label]["Node"], os.O_RDWR | os.O_CLOEXEC)
        info = kernel.loop_get_status64(fd)
        info.lo_flags &= ~LO_FLAGS_AUTOCLEAR
        kernel.loop_set_status64(fd, info)
        os.close(fd)


class DetachingForEver(Detaching):
    lifetime = "system"


class DetachingForEverAlone(DetachingForEver):
    supervised = keeps_store = False


class Leaving(Story):
    """Somebody goes who has a device that somebody holds and one that nobody does."""

    def prepare(self) -> None:
        self.holder = self.connect()
        mine, self.client = self.client, self.holder
        self.lost = self.attach(partitions=True, lock="exclusive")
        self.held = self.attach()
        self.client = mine
        self.hold = self.take_hold(self.held)

    def act(self) -> None:
        self.holder.close()
        self.wait_while(lambda: len(self.unit.marks()) > 2 or len(self.unit.records()) > 1)

    def check(self, answer: Any) -> None:
        deadline = Deadline()
        while self.lost in (devices := self.devices()):
            assert deadline.remaining
        it = devices[self.held]
        assert (it["State"], it["Holder"], it["Holds"]) == ("attached", "", 1)

    def leave(self) -> None:
        os.close(self.hold)


class Changing(Story):
    """Somebody changes much about a device."""

    often = 3

    def prepare(self) -> None:
        self.label = self.attach(partitions=True)
        self.before = self.after = {"Holds": 0, "Locked": "none", "Reference": ""} | self.lasts()
        self.holds: list[int] = []

    def lasts(self, lifetime: str = "connection") -> dict[str, Any]:
        holder = self.client.unique_name if lifetime == "connection" else ""
        return {"Lifetime": lifetime, "Holder": holder, "Autoclear": lifetime != "system"}

    def act(self) -> None:
        for member, argument, then in (
            ("Lock", "exclusive", {"Locked": "exclusive"}),
            ("Lock", "shared", {"Locked": "shared"}),
            ("Hold", None, {"Holds": 1}),
            ("SetReference", "name", {"Reference": "name"}),
            ("SetLifetime", "system", self.lasts("system")),
            ("SetAutoclear", True, {"Autoclear": True}),
            ("SetAutoclear", False, {"Autoclear": False}),
            ("Lock", "none", {"Locked": "none"}),
            ("RescanPartitions", None, {}),
            ("SetLifetime", "connection", self.lasts()),
            ("Hold", None, {"Holds": 2}),
        ):
            self.after = self.before | then
            if not self.change(member, argument):
                break
            self.before = self.after

    def change(self, member: str, argument: Any) -> bool:
        """Make a change; return whether it was answered."""
        if member == "Hold":
            self.holds += [hold] if (hold := self.take_hold(self.label)) else []
            return bool(hold)
        kind = {str: "s", bool: "b", type(None): ""}[type(argument)]
        arguments = [argument] if kind else []
        call = (PREFIX + self.label, DEVICE, member, f"{kind}a{{sv}}", [*arguments, {}])
        deadline = Deadline()
        while True:
            try:
                return self.call(*call) is not None
            except CallError as exc:
                # No lock waits, and udev has one while it looks at what is new.
                if "DeviceBusy" not in exc.name or not deadline.remaining:
                    raise

    def check(self, answer: Any) -> None:
        it = self.devices()[self.label]
        assert it["State"] == "attached"
        assert len(it["Partitions"]) == 2
        for name in self.before:
            if name == "Holds":  # who has had no answer holds nothing
                assert it[name] in (len(self.holds), self.after[name])
            else:
                assert it[name] in (self.before[name], self.after[name]), name

    def leave(self) -> None:
        super().leave()
        for hold in self.holds:
            os.close(hold)


class Restarting(Story):
    """loopd itself is started while there is everything that there can be."""

    def prepare(self) -> None:
        self.lost_client, mine = self.connect(), self.client
        self.client = self.lost_client
        self.lost = self.attach(partitions=True)
        self.held = self.attach()
        self.client = mine
        self.locked = self.attach(partitions=True, lock="exclusive")
        self.lasting = self.attach(lifetime="system")
        self.hold = self.take_hold(self.held)
        self.before = self.devices()

    def act(self) -> None:
        self.unit.kill()
        self.lost_client.close()
        self.unit.store.settle()
        self.unit.store.said.clear()
        self.unit.start(wait_ready=False)
        deadline = Deadline()
        while "READY=1" not in self.unit.store.said and not self.killed():
            self.unit.store.settle()
            assert deadline.remaining

    def check(self, answer: Any) -> None:
        deadline = Deadline()
        while self.lost in (devices := self.devices()):
            assert deadline.remaining
        assert devices[self.held]["Holder"] == ""
        self.before[self.held]["Holder"] = ""
        del self.before[self.lost]
        assert devices == self.before

    def leave(self) -> None:
        super().leave()
        os.close(self.hold)


class EndingForRestart(Restarting):
    """systemd restarts loopd."""

    job = "restart"

    def act(self) -> None:
        self.lost_client.close()
        self.unit.systemd.job = self.job
        self.unit.daemon.process.signal(signal.SIGTERM)
        self.unit.daemon.process.wait()
        self.unit.systemd.job = None


class Stopping(EndingForRestart):
    """systemd stops loopd."""

    keeps_store = False
    job = "stop"

    def check(self, answer: Any) -> None:
        deadline = Deadline()
        while {*(devices := self.devices())} != {self.lasting}:
            assert deadline.remaining, [*devices]
        assert devices == {self.lasting: self.before[self.lasting]}


class StoppingAlone(Stopping):
    supervised = False


STORIES = {
    Attaching: 14,
    AttachingForEver: 14,
    AttachingAlone: 13,
    AttachingForEverAlone: 14,
    Detaching: 13,
    DetachingWhatStays: 10,
    DetachingForEver: 10,
    DetachingForEverAlone: 8,
    Leaving: 8,
    Changing: 20,
    Restarting: 10,
    EndingForRestart: 4,
    Stopping: 8,
    StoppingAlone: 7,
}
"""How many ends each has at the least in the suite."""


@pytest.mark.parametrize("kind", STORIES, ids=lambda it: it.__name__)
def test_the_next_loopd_puts_right_what_one_that_is_killed_leaves(kind: type[Story]) -> None:
    """Killed at any point."""
    sweep(kind, STORIES[kind])
