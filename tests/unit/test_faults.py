# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases when anything fails in the midst, or their caller leaves.

Each kernel call and each await of a use case is hit in turn.  Whatever it was: the caller has its
answer or one of our errors, nothing is bound that has no record, nothing at all is when the client
has left, and the next one is served.
"""

import asyncio
import errno
import os
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest

from loopd.daemon.access import Caller
from loopd.daemon.actions import guard
from loopd.daemon.actions.change import ResizeOptions
from loopd.daemon.actions.examine import AttachOptions
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.leases import CONNECTION, SYSTEM
from loopd.errors import BusError, Failed, LoopError, TimedOut
from loopd.fd import OwnedFd
from loopd.loop import kernel
from loopd.loop.block_device import Lock
from tests.harness.images import MIB, make_gpt
from tests.harness.inside import Inside, run_inside
from tests.harness.script import Script
from tests.harness.scripted import Traits
from tests.harness.suspension import Suspensions

UID = 1000
NEXT = 1001
"""The uid of the client that comes next."""

LEGACY = Traits(configure=False, release=(5, 7), diskseq=False, says_partscan=False)
OLD = Traits(release=(6, 1))
"""A kernel where CLR_FD by the only opener unbinds at once."""


@dataclass
class Stage:
    """A use case that is about to begin."""

    inside: Inside
    caller: Caller
    image: Path
    device: Device | None = None
    openers: list[int] = field(default_factory=list)
    """Fds on the device of somebody else's."""
    succeeded: bool = False
    """Whether the use case has come to an end without an error."""

    def open(self, number: int, partition: int | None = None) -> int:
        """Be somebody else who has the device open."""
        if partition is None:
            fd = kernel.open_loop(number, os.O_RDONLY)
        else:
            fd = kernel.open_partition(number, partition, os.O_RDONLY)
        self.openers.append(fd)
        return fd

    def close(self) -> None:
        """Be somebody else who closes what it has open."""
        while self.openers:
            kernel.close(self.openers.pop())


Act = Callable[[Stage], Awaitable[Any]]


@dataclass(kw_only=True)
class Scenario:
    """A use case, and what there is before it."""

    act: Act
    attached: dict[str, Any] | None = None
    """With which options the device is attached that it is about; None if there is none."""
    opened: bool = False
    """Whether somebody else has the device open."""
    traits: Traits = field(default_factory=Traits)
    thorough: bool = False
    """Whether it is seen with all errnos that may make a difference."""


def attach(**options: Any) -> Act:
    async def act(stage: Stage) -> Device:
        stage.device = await stage.inside.attach(stage.caller, stage.image, **options)
        return stage.device

    return act


def detach(*, lazy: bool = False) -> Act:
    async def act(stage: Stage) -> bool:
        assert stage.device
        return await stage.inside.manager.detach(stage.caller, stage.device, lazy=lazy)

    return act


def resize(**options: Any) -> Act:
    async def act(stage: Stage) -> int:
        assert stage.device
        return await stage.inside.operations.resize(
            stage.caller, stage.device, ResizeOptions(**options)
        )

    return act


def resize_by(what: Callable[[Stage], int], **options: Any) -> Act:
    async def act(stage: Stage) -> int:
        fd = OwnedFd(what(stage), kernel.close)
        with fd:
            return await stage.inside.operations.resize_by_fd(
                stage.caller, fd, ResizeOptions(**options)
            )

    return act


def operate(name: str, *args: Any, **named: Any) -> Act:
    """Do one of the operations on the device."""

    async def act(stage: Stage) -> Any:
        method = getattr(stage.inside.operations, name)
        return await method(stage.caller, stage.device, *args, **named)

    return act


def hold_with_a_store() -> Act:
    """As under systemd, which is given a copy of what keeps a device."""

    async def act(stage: Stage) -> OwnedFd:
        device, store = stage.device, stage.inside.store
        assert device
        with (
            mock.patch.object(store, "keeps", lambda name: name == device.label),
            mock.patch.object(store, "keep", lambda _, fd: fd.move()),
        ):
            return await stage.inside.operations.hold(stage.caller, device)

    return act


def look_up() -> Act:
    async def act(stage: Stage) -> Device:
        fd = OwnedFd(image_fd(stage), kernel.close)
        with fd:
            return await stage.inside.manager.device_by_fd(stage.caller, fd)

    return act


def pass_through() -> Act:
    """Attach a block device that needs no loop device: the device itself."""

    async def act(stage: Stage) -> Device:
        assert stage.device
        assert stage.device.number is not None
        fd = OwnedFd(kernel.open_loop(stage.device.number, os.O_RDWR), kernel.close)
        return await stage.inside.attaching.attach(stage.caller, fd, AttachOptions())

    return act


def image_fd(stage: Stage) -> int:
    return os.open(stage.image, os.O_RDONLY | os.O_CLOEXEC)


def partition_fd(stage: Stage) -> int:
    assert stage.device
    assert stage.device.number is not None
    return kernel.open_partition(stage.device.number, 2, os.O_RDONLY)


PARTITIONS = {"partition_scan": True}
SCENARIOS = {
    "attach": Scenario(act=attach()),
    "attach with partitions": Scenario(act=attach(**PARTITIONS), thorough=True),
    "attach locked": Scenario(act=attach(lock=Lock.EXCLUSIVE)),
    "attach a number": Scenario(act=attach(number=5), thorough=True),
    "attach and find the sector size": Scenario(act=attach(probe_sector_size=True)),
    "attach by the legacy driver": Scenario(
        act=attach(offset=4096, partition_scan=True), traits=LEGACY, thorough=True
    ),
    "attach before 6.11": Scenario(act=attach(number=5), traits=OLD),
    "detach": Scenario(act=detach(), attached=PARTITIONS | {"lock": Lock.SHARED}, thorough=True),
    "lazy detach": Scenario(act=detach(lazy=True), attached={}),
    "detach with another opener": Scenario(act=detach(), attached={}, opened=True),
    "detach before 6.11": Scenario(act=detach(), attached={}, opened=True, traits=OLD),
    "resize": Scenario(act=resize(size_limit=MIB), attached={}, thorough=True),
    "resize to the file": Scenario(act=resize(), attached={}),
    "resize by file": Scenario(act=resize_by(image_fd, offset=4096), attached={}),
    "resize by partition": Scenario(
        act=resize_by(partition_fd, size_limit=MIB // 2), attached=PARTITIONS
    ),
    "open": Scenario(act=operate("open", writable=True, partition=None), attached={}),
    "open a partition": Scenario(
        act=operate("open", writable=False, partition=1), attached=PARTITIONS
    ),
    "hold": Scenario(act=operate("hold"), attached={}),
    "hold under systemd": Scenario(act=hold_with_a_store(), attached={}),
    "keep for ever": Scenario(act=operate("set_lifetime", SYSTEM), attached={}),
    "keep no longer": Scenario(
        act=operate("set_lifetime", CONNECTION), attached={"lifetime": SYSTEM}
    ),
    "lock": Scenario(act=operate("lock", Lock.EXCLUSIVE), attached={}),
    "change the lock": Scenario(
        act=operate("lock", Lock.EXCLUSIVE), attached={"lock": Lock.SHARED}
    ),
    "set autoclear": Scenario(act=operate("set_autoclear", True), attached={"lifetime": SYSTEM}),
    "set direct I/O": Scenario(act=operate("set_direct_io", False), attached={}),
    "set the reference": Scenario(act=operate("set_reference", b"name"), attached={}),
    "set the sector size": Scenario(act=operate("set_sector_size", 1024), attached=PARTITIONS),
    "rescan partitions": Scenario(act=operate("rescan_partitions"), attached={}),
    "sync": Scenario(act=operate("sync"), attached={}),
    "look up": Scenario(act=look_up(), attached={}),
    "pass a block device through": Scenario(act=pass_through(), attached={}),
}
EACH = pytest.mark.parametrize("name", SCENARIOS)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk, to which nobody writes."""
    return make_gpt(tmp_path_factory.mktemp("faults") / "image")


Fault = Callable[[Stage, Script], Any]
"""Something that will happen from now on; a context manager."""


def play(
    tmp_path: Path, image: Path, scenario: Scenario, fault: Fault, *, kinds: tuple[type, ...] = ()
) -> Script:
    """Have a fault during a use case, and see that all is as it should be after it.

    The caller may be told an OSError, which has a name on the bus, one of our errors or `kinds`.
    """

    async def story(inside: Inside, script: Script) -> None:
        stage = Stage(inside, inside.caller(UID), image)
        if scenario.attached is not None:
            stage.device = await inside.attach(stage.caller, image, **scenario.attached)
        if scenario.opened and stage.device:
            assert stage.device.number is not None
            stage.open(stage.device.number)
        succeeded = False
        with ExitStack() as meanwhile:
            if scenario.opened:
                # The answer is that it will go at the last close.
                meanwhile.enter_context(mock.patch.object(guard, "_DETACH_WAIT", 0.01))
            meanwhile.enter_context(fault(stage, script))
            script.calls.clear()
            task = asyncio.ensure_future(scenario.act(stage))
            await asyncio.wait([task])
            if not task.cancelled() and (exc := task.exception()) is not None:
                if not isinstance(exc, (LoopError, OSError, *kinds)):
                    raise exc
            else:
                succeeded = stage.succeeded = not task.cancelled()
            await _settle(stage, scenario, succeeded)
            if succeeded:
                await _give_back(stage, task.result())
        script.clear()
        await _serve_again(stage, scenario, succeeded)
        stage.close()
        inside.leave(stage.caller)
        for device in inside.registry:
            if device.lifetime == SYSTEM:
                await inside.manager.detach(inside.caller(UID), device)
        await inside.until_none(inside.remains)
        # Whoever comes next takes the same file, for writing.
        others = inside.caller(NEXT)
        device = await inside.attach(others, image)
        assert await inside.manager.detach(others, device)
        await inside.until_none(inside.remains)
        await inside.require_turns(UID, NEXT)

    # Its runtime directory, in memory as /run is: what one run leaves there is not another's.
    with TemporaryDirectory(dir="/dev/shm") as directory:
        return run_inside(Path(directory), story, scenario.traits)


async def _give_back(stage: Stage, result: Any) -> None:
    """Let go of what a use case has given to its caller."""
    if isinstance(result, OwnedFd):
        result.close()
    elif isinstance(result, Device) and result.private and not stage.caller.client.gone:
        assert await stage.inside.manager.detach(stage.caller, result)


async def _settle(stage: Stage, scenario: Scenario, succeeded: bool) -> None:
    """Wait until nothing is bound but what is recorded for the caller."""
    inside = stage.inside
    await inside.until_none(inside.unrecorded)
    if not scenario.opened:  # else a detach goes on until the other opener is gone
        await inside.quiet()
    if not succeeded and scenario.attached is None:
        await inside.until_none(
            lambda: [f"loop{each} is bound" for each in inside.scripted.bound()]
        )
    if succeeded and isinstance(stage.device, Device) and not stage.caller.client.gone:
        assert stage.device.ending or inside.registry.knows(stage.device)


async def _serve_again(stage: Stage, scenario: Scenario, succeeded: bool) -> None:
    """See that the device, if there is one still, can be worked at."""
    inside, device = stage.inside, stage.device
    if stage.caller.client.gone or device is None:
        return
    if not scenario.attached and not succeeded:
        return
    if inside.registry.knows(device) and not device.ending:
        size = await inside.operations.resize(
            stage.caller, device, ResizeOptions(offset=0, size_limit=0)
        )
        assert size == stage.image.stat().st_size
        if scenario.opened:
            return
        assert await inside.manager.detach(stage.caller, device, lazy=True)


@contextmanager
def nothing(_stage: Stage, _script: Script) -> Iterator[None]:
    yield


# --- the kernel says no -------------------------------------------------------------------------

MOST = 15
"""Calls of one function that are looked at; those that are repeated while others have a device open
need not all fail."""

# What a kernel may say beside EIO, where it makes a difference.
OPENING = ("open_loop_control", "open_loop", "open_partition", "dup")
CHANGING = (
    *("loop_configure", "loop_set_fd", "loop_set_status64", "loop_clr_fd", "loop_set_capacity"),
    *("open_loop", "open_partition", "blkpg_add_partition", "blkpg_del_partition"),
)
ASKING = ("loop_attribute", "loop_binding", "loop_partitions", "block_attribute")
CODES = {
    errno.EMFILE: OPENING,
    errno.ENOMEM: ASKING,
    errno.EBUSY: CHANGING,
    errno.EINTR: (*CHANGING, "fsync"),
    errno.ENXIO: (*CHANGING, "loop_get_status64", "blkgetsize64", "blksszget"),
    errno.ENODEV: (*ASKING, "open_loop", "open_partition"),
    errno.EINVAL: ("loop_configure", "loop_set_status64", "loop_set_direct_io"),
}
# Whatever these say, what they do is done: an fd that close(2) complains about is closed.
DONE_ALL_THE_SAME = ("close",)


def failing(name: str, code: int, skip: int) -> Fault:
    @contextmanager
    def fault(_stage: Stage, script: Script) -> Iterator[None]:
        def fail() -> None:
            raise OSError(code, os.strerror(code))

        if name in DONE_ALL_THE_SAME:
            script.after(name, fail, skip=skip)
        else:
            script.before(name, fail, skip=skip)
        yield

    return fault


def calls_of(tmp_path: Path, image: Path, scenario: Scenario) -> Counter[str]:
    """Return how often each kernel function is called in a run where nothing fails."""
    counted: Counter[str] = Counter()

    @contextmanager
    def count(_stage: Stage, script: Script) -> Iterator[None]:
        yield
        counted.update(script.calls)

    play(tmp_path, image, scenario, count)
    # Of no consequence, or not a call at all.
    del counted["release"]
    return counted


def codes(scenario: Scenario, function: str) -> list[int]:
    """Return what a function may say that is worth a run."""
    others = [code for code, names in CODES.items() if function in names]
    return [errno.EIO, *(others if scenario.thorough else [])]


@EACH
def test_each_call_of_the_kernel_may_fail(tmp_path: Path, image: Path, name: str) -> None:
    """libblockdev #1171."""
    scenario, trouble = SCENARIOS[name], Trouble()
    for function, count in sorted(calls_of(tmp_path, image, scenario).items()):
        for code in codes(scenario, function):
            for skip in range(min(count, MOST)):
                with trouble.noted(f"{errno.errorcode[code]} from call {skip + 1} of {function}"):
                    play(tmp_path, image, scenario, failing(function, code, skip))
    trouble.require_none()


class Trouble:
    """All that went wrong, so that one failure does not hide the others."""

    def __init__(self) -> None:
        self._found: list[str] = []

    @contextmanager
    def noted(self, where: str) -> Iterator[None]:
        """Note what is wrong after this was done to a use case."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - told by require_none()
            place = traceback.extract_tb(exc.__traceback__)[-1]
            self._found.append(f"{where}: {exc!r} at {place.filename}:{place.lineno}")

    def require_none(self) -> None:
        """Fail if there was any."""
        assert not self._found, f"{len(self._found)} faults: " + "\n".join(self._found[:50])


# --- the awaits ---------------------------------------------------------------------------------

# Nothing but a cancellation comes out of these: they wait for a turn, or for an event.
UNFAILING_SCENARIOS = ("lazy detach", "hold")
"""They ask nobody anything."""
UNFAILING = ("Threads.turn:", "Manager._take:", "Attaching.attach:", "Manager.detach:")
CANCELLED = tuple(
    f"{each}.<locals>.act"
    for each in (
        *("attach", "detach", "resize", "resize_by"),
        *("operate", "hold_with_a_store", "look_up", "pass_through"),
    )
)
USE_CASES = (*CANCELLED, "Attaching._bind")
ERRORS: dict[str, Callable[[], BaseException]] = {
    "OSError": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "LoopError": lambda: Failed("a fault"),
    "TimedOut": lambda: TimedOut("a fault"),
    "BusError": lambda: BusError("a fault"),
}


def may_fail(point: str) -> bool:
    where, _, task = point.partition(" in ")
    return task in USE_CASES and not where.startswith(UNFAILING)


def may_be_cancelled(point: str) -> bool:
    """Only who serves a call is cancelled, not what goes on in the background."""
    return point.partition(" in ")[2] in CANCELLED


def hit(suspensions: Suspensions) -> Fault:
    @contextmanager
    def fault(_stage: Stage, _script: Script) -> Iterator[None]:
        with suspensions.installed():
            yield

    return fault


def points_of(
    tmp_path: Path, image: Path, scenario: Scenario, wanted: Callable[[str], bool]
) -> list[str]:
    """Return the names of the points in a run where nothing happens."""
    suspensions = Suspensions(wanted=wanted)
    play(tmp_path, image, scenario, hit(suspensions))
    return suspensions.points


@EACH
def test_each_await_may_fail(tmp_path: Path, image: Path, name: str) -> None:
    """CVE-2021-3560."""
    scenario, trouble = SCENARIOS[name], Trouble()
    points = points_of(tmp_path, image, scenario, may_fail)
    assert points or name in UNFAILING_SCENARIOS
    for index, point in enumerate(points):
        for kind, make in ERRORS.items():
            with trouble.noted(f"{kind} from await {index}, of {point}"):
                suspensions = Suspensions(index, make, wanted=may_fail)
                play(tmp_path, image, scenario, hit(suspensions), kinds=(BusError,))
                assert len(suspensions.points) > index, "it did not come up"
    trouble.require_none()


@EACH
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the wait is over"])
def test_each_await_may_be_cancelled(tmp_path: Path, image: Path, name: str, late: bool) -> None:
    scenario, trouble = SCENARIOS[name], Trouble()
    points = points_of(tmp_path, image, scenario, may_be_cancelled)
    assert points or name == "hold"
    for index, point in enumerate(points):
        with trouble.noted(f"a cancellation at await {index}, of {point}"):
            suspensions = Suspensions(
                index, asyncio.CancelledError, late=late, wanted=may_be_cancelled
            )
            play(tmp_path, image, scenario, hit(suspensions))
            assert len(suspensions.points) > index, "it did not come up"
    trouble.require_none()


def leaving(suspensions: Suspensions) -> Fault:
    @contextmanager
    def fault(stage: Stage, _script: Script) -> Iterator[None]:
        suspensions.action = lambda: stage.inside.leave(stage.caller)
        with suspensions.installed():
            yield

    return fault


@EACH
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the wait is over"])
def test_the_caller_may_leave_at_each_await(
    tmp_path: Path, image: Path, name: str, late: bool
) -> None:
    """CVE-2021-3560."""
    scenario, trouble = SCENARIOS[name], Trouble()
    points = points_of(tmp_path, image, scenario, lambda _: True)
    for index, point in enumerate(points[:MOST]):
        with trouble.noted(f"a client that left at await {index}, of {point}"):
            play(tmp_path, image, scenario, leaving(Suspensions(index, late=late)))
    trouble.require_none()


KEEPING = (
    *("open", "open a partition", "hold", "hold under systemd"),
    *("keep for ever", "keep no longer", "lock"),
)
"""What cannot be had of a device that is being detached."""


def ending(suspensions: Suspensions, *, keeps: bool) -> Fault:
    @contextmanager
    def fault(stage: Stage, _script: Script) -> Iterator[None]:
        device = stage.device
        assert device
        suspensions.action = lambda: stage.inside.ending.let_go(device)
        with suspensions.installed():
            yield
        came = len(suspensions.points) > suspensions.index
        assert not (came and keeps and stage.succeeded), "it was given what keeps a device"

    return fault


def may_be_detached(point: str) -> bool:
    """Not after it was done, while its outcome is looked at."""
    return may_be_cancelled(point) and not point.startswith("Threads.look:")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, scenario in SCENARIOS.items()
        # The hold on the device itself would keep it.
        if scenario.attached is not None and "detach" not in name and "through" not in name
    ],
)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when the wait is over"])
def test_the_device_may_be_detached_at_each_await(
    tmp_path: Path, image: Path, name: str, late: bool
) -> None:
    scenario, trouble = SCENARIOS[name], Trouble()
    points = points_of(tmp_path, image, scenario, may_be_detached)
    for index, point in enumerate(points[:MOST]):
        with trouble.noted(f"a device that ended at await {index}, of {point}"):
            suspensions = Suspensions(index, late=late, wanted=may_be_detached)
            play(tmp_path, image, scenario, ending(suspensions, keeps=name in KEEPING))
    trouble.require_none()
