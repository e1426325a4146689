# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's file in a running daemon: its mistakes stop the start, its settings hold."""

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH
from tests.harness.daemon import Daemon
from tests.harness.polkit import Answer
from tests.harness.service import service
from tests.harness.wire import CallError
from tests.harness.world import World

# Settings are read, and hold, above the reading and writing of messages.
pytestmark = pytest.mark.one_library

SIZE = 64 * 1024


def refused(call: Callable[..., Any], *args: Any, **named: Any) -> tuple[str, str]:
    """Return the name and the text of the error."""
    with pytest.raises(CallError) as caught:
        call(*args, **named)
    return caught.value.name, caught.value.message


# Mistakes


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        # tests/unit has all others.
        ("unknown = 1", "unknown", "there is no such setting"),
        ("[limits]\ndevices = 0", "limits: devices", "has to be from 1 to 65536"),
    ],
)
def test_a_mistake_stops_the_start_with_file_key_and_reason(
    tmp_path: Path, text: str, key: str, reason: str
) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text(text)
    done = start(path)
    assert done.returncode == os.EX_CONFIG
    assert done.stderr == f"loopd: {path}: {key}: {reason}\n"
    assert done.stdout == ""


@pytest.mark.parametrize("content", [b"direct_io", b"\xff\xfe"])
def test_a_file_that_is_no_toml_stops_the_start(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "loopd.toml"
    path.write_bytes(content)
    done = start(path)
    assert done.returncode == os.EX_CONFIG
    assert done.stderr.startswith(f"loopd: {path}: ")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) > len(f"loopd: {path}: \n")


@pytest.mark.parametrize("arguments", [(), ("--check-config",)])
def test_all_mistakes_are_told(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text("new = 1\nidle_timeout = 0\n")
    done = start(path, *arguments)
    assert done.returncode == os.EX_CONFIG
    assert done.stderr == (
        f"loopd: {path}: new: there is no such setting\n"
        f"loopd: {path}: idle_timeout: has to be from 1 to 86400\n"
    )


def test_checking_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text("idle_timeout = 1\n")
    done = start(path, "--check-config")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_a_fifo_does_not_keep_it_from_starting_or_ending(tmp_path: Path) -> None:
    path = tmp_path / "loopd.toml"
    os.mkfifo(path)
    done = start(path)
    assert done.returncode == os.EX_CONFIG
    assert done.stderr == f"loopd: {path}: is no regular file\n"


def start(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start loopd where there is no bus, which it says if the file does not stop it before."""
    environment = os.environ | {
        "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={config.parent}/none",
        "PYTHONPATH": str(CHECKOUT),
    }
    command = [sys.executable, "-m", "loopd", "--config", str(config)]
    command += ["--runtime-directory", str(config.parent / "run")]
    command += arguments
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_mistake_is_no_start_on_the_bus(bus: PrivateBus, library: str | None) -> None:
    with Daemon(bus, library=library, config="wrong = true", wait_ready=False) as daemon:
        assert daemon.wait() == os.EX_CONFIG
        assert daemon.log == f"loopd: {daemon.config_path}: wrong: there is no such setting\n"
        with bus.connect() as client:
            assert client.owner_of(LOOPD) is None


def test_an_empty_file_and_none_at_all_are_the_defaults(new_world: Callable[..., World]) -> None:
    for arguments in ([], ["--config", "/none/loopd.toml"]):
        world = new_world(config="", arguments=arguments)
        caller = world.caller()
        assert caller.get(MANAGER_PATH, "MaxDevicesPerUser", MANAGER) == 32
        assert caller.get(MANAGER_PATH, "MaxDevices", MANAGER) == 1024


WRONG = "wrong = true\n[limits]\ndevices = 0\ndevices_per_user = 3\n"


@pytest.mark.parametrize("stored", [True, False])
def test_with_devices_to_take_back_a_mistake_is_told_and_no_device_is_lost(stored: bool) -> None:
    """Settings that destroy."""
    if os.getuid() != 0:
        pytest.skip("only root has loop devices to give")
    with service() as unit:
        if not stored:
            unit.environment = {}
        unit.start()
        caller = unit.caller(None)
        attached = caller.attach(unit.image(owner=None), lifetime="system")
        daemon = unit.restart(config=WRONG)
        sentences = [
            f"{daemon.config_path}: wrong: there is no such setting",
            f"{daemon.config_path}: limits: devices: has to be from 1 to 65536",
        ]
        assert loops.loop_is_bound(attached.number, attached.diskseq)
        assert caller.get(attached.path, "Managed") is True
        assert caller.get(MANAGER_PATH, "ConfigurationError", MANAGER) == "; ".join(sentences)
        # What is right counts.
        assert caller.get(MANAGER_PATH, "MaxDevicesPerUser", MANAGER) == 3
        assert caller.get(MANAGER_PATH, "MaxDevices", MANAGER) == 1024
        for sentence in sentences:
            assert f"{sentence}: the default holds" in daemon.log
        if stored:
            unit.store.wait_said(
                "STATUS=defaults hold where settings are wrong: " + "; ".join(sentences)
            )
        unit.restart()
        assert caller.get(MANAGER_PATH, "ConfigurationError", MANAGER) == ""
        caller.detach(attached.path)
        unit.wait_nothing()
        # With nothing to take back, as ever.
        unit.end_for_restart()
        daemon = unit.start(config=WRONG, wait_ready=False)
        assert daemon.wait() == os.EX_CONFIG


# Settings


def test_limits_take_effect(new_world: Callable[..., World]) -> None:
    world = new_world(config="[limits]\ndevices_per_user = 1\ncalls_per_connection = 2\n")
    caller = world.caller()
    assert caller.get(MANAGER_PATH, "MaxDevicesPerUser", MANAGER) == 1
    assert caller.get(MANAGER_PATH, "MaxDevices", MANAGER) == 1024
    caller.attach(world.image(SIZE))
    name, text = refused(caller.attach, world.image(SIZE))
    assert name.endswith(".LimitsExceeded")
    assert " 1 loop devices" in text
    world.polkit.reset(Answer.HANG)
    calls = [caller.attach_begin(world.image(SIZE)) for _ in range(2)]
    world.polkit.wait_question(count=2)
    name, text = refused(caller.manager, "ListDevices")
    assert name.endswith(".LimitsExceeded")
    assert "2 calls of this connection" in text
    world.polkit.release(Answer.DENY)
    for call in calls:
        refused(call.end)


def test_direct_io_can_be_off_unless_asked_for(new_world: Callable[..., World]) -> None:
    """A15."""
    usual, off = new_world(), new_world(config="direct_io = false")

    def uses(world: World, **options: Any) -> bool:
        caller = world.caller()
        attached = caller.attach(world.image(SIZE), **options)
        sysfs = Path(f"/sys/block/loop{attached.number}/loop/dio").read_text() == "1\n"
        assert caller.get(attached.path, "DirectIO") is sysfs
        return sysfs

    possible = uses(usual, direct_io=True)
    assert uses(usual) is possible
    assert uses(off, direct_io=True) is possible
    assert uses(off) is False
    assert uses(usual, direct_io=False) is False


@pytest.mark.parametrize("interactive", [False, True])
def test_polkit_has_as_long_as_its_deadline_says(
    new_world: Callable[..., World], interactive: bool
) -> None:
    """The other deadline is one that the test would not live to see."""
    short = "interactive_authorization" if interactive else "authorization"
    long = "authorization" if interactive else "interactive_authorization"
    world = new_world(config=f"[deadlines]\n{short} = 1\n{long} = 3600\n", authority=Answer.HANG)
    caller = world.caller()
    name, text = refused(caller.attach, world.image(SIZE), interactive=interactive)
    assert name.endswith(".AccessDenied")
    assert "within 1 s" in text
    world.polkit.wait_cancelled(world.polkit.questions[0])


GATED = """
import fcntl
from loopd.loop import kernel
def gated(function):
    def wait_and_call(*arguments):
        with open({gate!r}) as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
        return function(*arguments)
    return wait_and_call
kernel.fsync, kernel.loop_configure = gated(kernel.fsync), gated(kernel.loop_configure)
"""


class Gate:
    """Stops two of the kernel's functions until it is opened."""

    def __init__(self, directory: Path) -> None:
        path = directory / "gate"
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        self.prelude = GATED.format(gate=str(path))

    def close(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def open(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_UN)


@pytest.fixture
def gate() -> Iterator[Gate]:
    with area("gate") as directory:
        gate = Gate(directory)
        yield gate
        os.close(gate.fd)


def test_an_operation_has_as_long_as_its_deadline_says(
    new_world: Callable[..., World], gate: Gate
) -> None:
    # Long enough for a busy machine to do what nothing stops.
    world = new_world(config="[deadlines]\noperation = 3\n", prelude=gate.prelude)
    caller = world.caller()
    attached = caller.attach(world.image(SIZE))
    image = world.image(SIZE)
    gate.close()
    calls = [
        caller.call_begin(attached.path, DEVICE, "Sync", "a{sv}", {}),
        caller.attach_begin(image),
    ]
    # Nothing else waits for them.
    assert caller.resize(attached.path) == SIZE
    for call in calls:
        name, text = refused(call.end)
        assert name == f"{MANAGER}.Error.TimedOut"
        assert "within 3 s" in text
    gate.open()
    assert caller.device(attached.path, "Sync", "a{sv}", {}) == ()
    assert caller.detach(attached.path) is True
    # The attach that nobody waits for any more is undone when it is over.
    world.wait_idle_fds()
    world.wait_devices(0)
    assert str(image) not in {each.backing_file for each in loops.bound_loops().values()}
    loops.used_numbers.add(caller.attach(image).number)


def test_loopd_may_have_as_many_files_open_as_the_system_gives(
    make_daemon: Callable[..., Daemon],
) -> None:
    """A service starts with a soft limit of 1024, and each device has three."""
    daemon = make_daemon(within=["prlimit", "--nofile=300:5000"])
    assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (5000, 5000)
