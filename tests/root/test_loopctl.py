# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl as ordinary users run it: the real daemon, real loop devices, a real polkitd."""

import fcntl
import json
import os
import pwd
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.client import blocking
from loopd.client.watch import Ended
from loopd.errors import NotSupported
from tests.harness.area import TOKEN
from tests.harness.area import area as make_area
from tests.harness.bus import PrivateBus
from tests.harness.caller import Caller
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_gpt, make_plain, pattern
from tests.harness.loopctl import (
    PYTHON,
    Loopctl,
    Running,
    copy_package,
    number_of,
    one_sentence,
    read_until,
    terminal,
)
from tests.harness.loops import (
    BoundLoop,
    bound_loops,
    detach_leaked,
    look_at,
    loop_is_bound,
    losetup,
    strays,
    wait_unbound,
)
from tests.harness.polkit import Answer, PolkitDouble, rules_allowing
from tests.harness.udev import Udev
from tests.harness.world import World

OWNER = "nobody"
OTHER = "daemon"


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    """A directory with the package that every uid can read."""
    with make_area("package") as directory:
        yield copy_package(directory)


@pytest.fixture
def daemon(world: World) -> Daemon:
    """The module's loopd; a test that is to end one makes its own."""
    return world.daemon


@pytest.fixture
def bus(request: pytest.FixtureRequest) -> Iterator[PrivateBus]:
    """The bus of `daemon`, and another one for a test that does not ask for that."""
    if "daemon" in request.fixturenames:
        yield request.getfixturevalue("world").bus
        return
    with PrivateBus() as private:
        yield private


@pytest.fixture
def loopctl(bus: PrivateBus, package: Path, area: Path) -> Loopctl:
    """The program; what it needs of a daemon is for the test to ask for."""
    return Loopctl(bus, package, area)


@pytest.fixture
def image(area: Path) -> Path:
    """An image of 1 MiB that is OWNER's."""
    return make_plain(area / "disk.img", owner=OWNER)


@pytest.fixture
def attached(daemon: Daemon, loopctl: Loopctl, image: Path) -> Iterator[tuple[Running, int]]:
    """A loopctl that has attached `image`, and the device's number."""
    with loopctl.start("hold", image) as running:
        yield running, number_of(running.line())


def is_attached(image: Path) -> bool:
    """Whether any loop device has this file; a number may be in others' use again."""
    return any(loop.backing_file == str(image) for loop in bound_loops().values())


# --- hold ---------------------------------------------------------------------------------------


def test_hold_keeps_the_device_until_it_is_told_to_end(
    attached: tuple[Running, int], image: Path
) -> None:
    running, number = attached
    loop = look_at(number)
    assert loop is not None
    assert loop.backing_file == str(image)
    running.signal(signal.SIGTERM)
    status, out, err = running.end()
    assert (status, out) == (0, "")
    first, second = err.splitlines()
    assert "until this ends" in first
    assert second == f"loopctl: detached /dev/loop{number}"
    assert not loop_is_bound(number, loop.diskseq)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_the_end_of_the_terminal_detach(
    attached: tuple[Running, int], image: Path, number: signal.Signals
) -> None:
    running, _ = attached
    running.signal(number)
    assert running.end()[0] == 0
    assert not is_attached(image)


def test_nothing_is_left_of_a_loopctl_that_is_killed(attached: tuple[Running, int]) -> None:
    running, number = attached
    loop = look_at(number)
    assert loop is not None
    running.signal(signal.SIGKILL)
    wait_unbound(number, loop.diskseq)


def test_others_see_what_is_attached(
    attached: tuple[Running, int], loopctl: Loopctl, image: Path
) -> None:
    _, number = attached
    listed = loopctl.json("list", user=OTHER)["loopdevices"]
    (line,) = [each for each in listed if each["name"] == f"/dev/loop{number}"]
    device = loopctl.json("show", f"/dev/loop{number}", user=OTHER)
    assert (line["back-file"], line["size"]) == (str(image), MIB)
    assert device == loopctl.json("show", f"loop{number}")
    assert device == loopctl.json("show", image.name)
    assert device["node"] == f"/dev/loop{number}"
    assert device["backing_file"] == str(image)
    assert device["backing_inode"] == image.stat().st_ino
    assert device["size"] == MIB
    assert device["owner"] == pwd.getpwnam(OWNER).pw_uid
    assert device["lifetime"] == "connection"
    assert device["read_only"] is False
    assert device["managed"] is True


def test_options_reach_the_device(daemon: Daemon, loopctl: Loopctl, image: Path) -> None:
    options = "-r -o 4K --sizelimit 0x10000 -b 4096 --direct-io=off --loop-ref name".split()
    with loopctl.start("hold", *options, image, "--json") as running:
        told = json.loads(running.line())
        device = loopctl.json("show", told["node"])
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0
    assert {key: device[key] for key in told} == told
    assert device["read_only"] is True
    assert (device["offset"], device["size_limit"], device["size"]) == (4096, 65536, 65536)
    assert device["sector_size"] == 4096
    assert device["direct_io"] is False
    assert device["reference"] == "name"


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (["--default-loop-ref", "x" * 62], "x" * 62),
        (["--default-loop-ref", "x" * 63], ""),
        (["--default-loop-ref", "x" * 63, "--loop-ref=mine"], "mine"),
    ],
)
def test_a_default_name_never_fails(
    daemon: Daemon, loopctl: Loopctl, image: Path, options: list[str], reference: str
) -> None:
    with loopctl.start("hold", *options, image) as running:
        assert loopctl.json("show", running.line())["reference"] == reference
        running.signal(signal.SIGTERM)
        status, _, err = running.end()
    assert status == 0
    assert ("--loop-ref gives it one" in err) == (reference == "")


def test_a_device_that_begins_at_any_byte_has_what_follows(
    daemon: Daemon, loopctl: Loopctl, image: Path, area: Path
) -> None:
    part = area / "part"
    part.write_bytes(image.read_bytes()[188392 : 188392 + 2048 * 100])
    command = ("run", "-o", "188392", "--sizelimit", "200K", image, "--", "cmp", "{}", part)
    assert loopctl.run(*command, user="root") == (0, "", "")


def test_a_file_that_may_not_be_written_is_attached_read_only(
    daemon: Daemon, loopctl: Loopctl, area: Path
) -> None:
    make_plain(area / "roots.img", owner="root", mode=0o644)
    with loopctl.start("hold", "roots.img") as running:
        assert loopctl.json("show", running.line())["read_only"] is True
        running.signal(signal.SIGTERM)
        assert "read-only" in running.end()[2]


def test_hold_tells_when_somebody_else_detaches(
    attached: tuple[Running, int], loopctl: Loopctl
) -> None:
    running, number = attached
    assert loopctl.run("detach", f"loop{number}", user="root") == (0, "", "")
    status, _, err = running.end()
    assert status == 5
    assert err.endswith(f"loopctl: somebody has detached /dev/loop{number}\n")


def test_hold_tells_when_the_daemon_dies(
    authority: object, make_daemon: Callable[..., Daemon], loopctl: Loopctl, image: Path
) -> None:
    daemon = make_daemon()
    with loopctl.start("hold", image) as running:
        number = number_of(running.line())
        loop = look_at(number)
        assert loop is not None
        daemon.kill()
        status, _, err = running.end()
    assert status == 3
    assert err.endswith(f"loopctl: loopd has stopped, and /dev/loop{number} with it\n")
    wait_unbound(number, loop.diskseq)


def test_hold_tells_when_the_bus_dies(
    bus: PrivateBus, loopctl: Loopctl, image: Path, polkit: PolkitDouble
) -> None:
    with Daemon(bus, complaints=True) as daemon:
        with loopctl.start("hold", image) as running:
            number = number_of(running.line())
            loop = look_at(number)
            assert loop is not None
            polkit.stop()
            bus.kill()
            status, _, err = running.end()
            daemon.wait()
    assert status == 3
    assert "the bus has closed the connection" in err
    wait_unbound(number, loop.diskseq)


def test_a_signal_takes_back_a_question_that_is_open(
    loopctl: Loopctl, polkit: PolkitDouble, make_daemon: Callable[..., Daemon], image: Path
) -> None:
    make_daemon()
    polkit.on("org.example.loop1.attach", Answer.HANG)
    with loopctl.start("hold", image) as running:
        question = polkit.wait_question()
        assert question.interactive
        running.signal(signal.SIGTERM)
        assert running.end() == (128 + signal.SIGTERM, "", "")
    polkit.wait_cancelled(question)


def test_nobody_is_asked_when_that_is_not_wanted(
    loopctl: Loopctl, polkit: PolkitDouble, make_daemon: Callable[..., Daemon], image: Path
) -> None:
    make_daemon()
    polkit.on("org.example.loop1.attach", Answer.CHALLENGE)
    status, out, err = loopctl.run("hold", "--no-ask-password", image)
    assert (status, out) == (4, "")
    assert "--no-ask-password" in err
    assert not polkit.wait_question().interactive


def test_hold_as_the_body_of_a_unit(
    daemon: Daemon, loopctl: Loopctl, image: Path, udev: Udev, area: Path
) -> None:
    """systemd hears of it when there is something to mount, and the end is waited for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(area / "notify"))

        def heard() -> list[str]:
            Deadline().wait_readable([notify.fileno()], "what systemd is told")
            return notify.recv(4096).decode().split("\n")

        environment = {"NOTIFY_SOCKET": notify.getsockname()}
        with loopctl.start("hold", image, user="root", environment=environment) as running:
            ready, status = heard()
            number = number_of(running.line())
            loop = look_at(number)
            assert loop is not None
            link = Path(f"/dev/disk/by-diskseq/{loop.diskseq}")
            assert link.resolve() == Path(f"/dev/loop{number}")
            assert (ready, status) == (
                *("READY=1", f"STATUS=/dev/loop{number} is {image} (1 MiB, read-write)"),
            )
            running.signal(signal.SIGTERM)
            assert heard() == ["STOPPING=1"]
            assert running.end()[0] == 0
            assert not loop_is_bound(number, loop.diskseq)


def test_hold_ends_with_the_device(daemon: Daemon, loopctl: Loopctl, image: Path) -> None:
    with loopctl.start("hold", image) as running:
        assert loopctl.run("detach", running.line()) == (0, "", "")
        status, _, err = running.end()
    assert status == 5
    assert "somebody has detached" in err


# --- direct I/O, partitions, locks, numbers -----------------------------------------------------


@pytest.mark.parametrize("given", [[], ["-r"]])
def test_the_setting_decides_on_direct_io_and_not_how_the_file_is_open(
    authority: object,
    make_daemon: Callable[..., Daemon],
    loopctl: Loopctl,
    image: Path,
    given: list[str],
) -> None:
    """A15, A18"""
    make_daemon(config="direct_io = false\n")
    command = ["sh", "-c", 'cat "/sys/block/${LOOPDEV#/dev/}/loop/dio"']
    assert loopctl.run("run", *given, image, "--", *command) == (0, "0\n", "")
    with os.fdopen(os.open(image, os.O_RDONLY | os.O_DIRECT), "rb"):  # else there is none to have
        assert loopctl.run("run", "--direct-io", image, "--", *command) == (0, "1\n", "")


@pytest.fixture
def disk(area: Path) -> Path:
    """An image with two partitions that is OWNER's."""
    return make_gpt(area / "gpt.img", owner=OWNER)


def test_the_command_finds_the_partitions(daemon: Daemon, loopctl: Loopctl, disk: Path) -> None:
    command = ["sh", "-c", "test -b {}p1 && test -b {}p2 && echo {}"]
    status, out, err = loopctl.run("run", "-P", disk, "--", *command)
    assert (status, err) == (0, "")
    number = number_of(out.rstrip("\n"))
    assert not is_attached(disk)
    assert strays(number) == ()


def test_hold_tells_the_partitions(daemon: Daemon, loopctl: Loopctl, disk: Path) -> None:
    with loopctl.start("hold", "--partscan", disk) as running:
        node = running.line()
        told = loopctl.json("show", node)["partitions"]
        running.signal(signal.SIGTERM)
        status, _, err = running.end()
    assert status == 0
    assert f", with {node}p1, {node}p2, until this ends" in err
    assert told == [
        {"number": 1, "node": f"{node}p1", "start": MIB, "size": MIB},
        {"number": 2, "node": f"{node}p2", "start": 2 * MIB, "size": MIB},
    ]


def test_hold_tells_the_partitions_as_json(daemon: Daemon, loopctl: Loopctl, disk: Path) -> None:
    with loopctl.start("hold", "-P", "--json", disk) as running:
        told = json.loads(running.line())
        assert told["partitions"] == loopctl.json("show", told["node"])["partitions"]
        assert len(told["partitions"]) == 2
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0


def test_a_sector_size_of_0_is_that_of_the_partition_table(
    daemon: Daemon, loopctl: Loopctl, area: Path
) -> None:
    disk = make_gpt(area / "gpt.img", ((256, 256),), sector_size=4096, owner=OWNER)
    with loopctl.start("hold", "-P", "-b", "0", disk) as running:
        shown = loopctl.json("show", running.line())
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0
    assert shown["sector_size"] == 4096
    assert [(each["start"], each["size"]) for each in shown["partitions"]] == [(MIB, MIB)]


@pytest.mark.parametrize(
    ("kind", "refused"), [("exclusive", fcntl.LOCK_SH), ("shared", fcntl.LOCK_EX)]
)
def test_a_lock_is_there_from_the_start(
    daemon: Daemon, loopctl: Loopctl, image: Path, kind: str, refused: int
) -> None:
    with loopctl.start("hold", "--lock", kind, image) as running:
        node = running.line()
        assert loopctl.json("show", node)["locked"] == kind
        assert re.search(f"^Lock: +{kind}$", loopctl.run("show", node)[1], re.MULTILINE)
        with open(node, "rb") as device, pytest.raises(BlockingIOError):
            fcntl.flock(device, refused | fcntl.LOCK_NB)
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0


@pytest.mark.alone  # anybody may be given the number before it is bound
def test_root_can_ask_for_a_number(daemon: Daemon, loopctl: Loopctl, image: Path) -> None:
    number = 500_000 + os.getpid() % 500_000
    command = ("run", "--number", str(number), image, "--", "echo", "{}")
    assert loopctl.run(*command, user="root") == (0, f"/dev/loop{number}\n", "")


def test_a_number_that_is_taken(
    attached: tuple[Running, int], loopctl: Loopctl, area: Path
) -> None:
    _, number = attached
    make_plain(area / "second.img")
    status, out, err = loopctl.run("attach", "--number", str(number), "second.img", user="root")
    assert (status, out) == (6, "")
    assert one_sentence(err)


def test_a_number_takes_the_right_to_manage_the_devices_of_others(
    loopctl: Loopctl,
    make_polkit: Callable[[str], object],
    make_daemon: Callable[..., Daemon],
    image: Path,
) -> None:
    make_polkit(rules_allowing("org.example.loop1.attach", users=(OWNER,)))
    make_daemon()
    status, out, err = loopctl.run("hold", "--number", "3", image)
    assert (status, out) == (4, "")
    assert one_sentence(err)
    assert not is_attached(image)


# --- in memory ----------------------------------------------------------------------------------


@pytest.fixture
def source(area: Path) -> Path:
    """An image that everyone may read; a copy of it is known for this test's by its name."""
    return make_plain(area / f"{TOKEN}disk.img")


@pytest.mark.parametrize("options", [[], ["--direct-io"]])
def test_a_copy_in_memory_is_writable_and_its_file_stays_as_it_is(
    daemon: Daemon, loopctl: Loopctl, source: Path, options: list[str]
) -> None:
    """A19"""
    with loopctl.start("hold", "--in-memory", *options, source) as running:
        node = running.line()
        shown = loopctl.json("show", node)
        assert shown["backing_file"] == f"/memfd:{source.name} (deleted)"
        assert (shown["read_only"], shown["direct_io"]) == (False, False)
        with open(node, "r+b", buffering=0) as device:
            assert device.read(MIB) == pattern(0, MIB)
            device.seek(0)
            device.write(bytes(4096))
            os.fsync(device)
        running.signal(signal.SIGTERM)
        status, _, err = running.end()
    assert status == 0
    assert f"{node} is a copy of {source} (1 MiB, read-write) until" in err
    assert source.read_bytes() == pattern(0, MIB)


def test_a_copy_in_memory_can_be_read_only(daemon: Daemon, loopctl: Loopctl, source: Path) -> None:
    """A19"""
    command = ["sh", "-c", 'cat "/sys/block/${LOOPDEV#/dev/}/ro"']
    assert loopctl.run("run", "-r", "--in-memory", source, "--", *command) == (0, "1\n", "")


def test_a_copy_has_the_partitions(daemon: Daemon, loopctl: Loopctl, area: Path) -> None:
    """A19"""
    disk = make_gpt(area / f"{TOKEN}gpt.img")
    command = ["test", "-b", "{}p2"]
    assert loopctl.run("run", "-P", "--in-memory", disk, "--", *command) == (0, "", "")


def test_a_block_device_can_be_copied(
    attached: tuple[Running, int], loopctl: Loopctl, area: Path
) -> None:
    """A19"""
    _, number = attached
    link = area / "link"
    link.symlink_to(f"/dev/loop{number}")
    command = (
        "run",
        "--in-memory",
        link,
        "--",
        "sh",
        "-c",
        "cat {} >copy; losetup -O BACK-FILE -n {}",
    )
    status, out, err = loopctl.run(*command, user="root")
    assert (status, err) == (0, "")
    assert out == f"/memfd:loop{number} (deleted)\n"
    assert (area / "copy").read_bytes() == pattern(0, MIB)


@contextmanager
def foreign_device(file: Path) -> Iterator[BoundLoop]:
    """A loop device that losetup has made."""
    loop = look_at(number_of(losetup(file)))
    assert loop is not None
    try:
        yield loop
    finally:
        detach_leaked(loop)


@pytest.fixture
def hanging() -> Iterator[tuple[str, Fuse]]:
    """A block device on which reads last until its Fuse goes on."""
    with Fuse(size=8 * MIB) as fuse, foreign_device(fuse.file) as loop:
        # Open, since the last one to close it would have to wait, too.
        with open(loop.node, "rb"):
            # A udevd that some test has started is not to hang, too.
            Udev().settle()
            fuse.process.signal(signal.SIGSTOP)
            try:
                yield loop.node, fuse
            finally:
                fuse.process.signal(signal.SIGCONT)


def test_a_copy_shows_its_progress_on_a_terminal(
    daemon: Daemon, loopctl: Loopctl, hanging: tuple[str, Fuse]
) -> None:
    """A19"""
    node, fuse = hanging
    command = ("hold", "--in-memory", node)
    with terminal() as (keyboard, screen):
        with loopctl.start(*command, user="root", stderr=screen) as running:
            read_until(keyboard, rf"copying {os.path.basename(node)} .+ \d+%")
            fuse.process.signal(signal.SIGCONT)
            copy = running.line()
            # The bar is gone before anything else is said.
            read_until(keyboard, rf"\x1b\[2Kloopctl: {copy} is a copy of {node} .*\n")
            running.signal(signal.SIGTERM)
            assert running.end()[0] == 0


def test_a_copy_that_hangs_can_be_given_up(
    daemon: Daemon, loopctl: Loopctl, hanging: tuple[str, Fuse]
) -> None:
    """A19"""
    node, _ = hanging
    command = ("run", "--in-memory", node, "--", "true")
    with terminal() as (keyboard, screen):
        with loopctl.start(*command, user="root", stderr=screen) as running:
            read_until(keyboard, rf"copying {os.path.basename(node)} .+ \d+%")
            running.signal(signal.SIGINT)
            assert running.end()[:2] == (128 + signal.SIGINT, "")
            read_until(keyboard, r"\x1b\[2K$")


def test_progress_is_for_terminals_only(daemon: Daemon, loopctl: Loopctl, source: Path) -> None:
    """A19"""
    assert loopctl.run("run", "--in-memory", source, "--", "true") == (0, "", "")


# --- resize and detach --------------------------------------------------------------------------


def test_a_file_that_has_grown_is_taken_up(
    attached: tuple[Running, int], loopctl: Loopctl, image: Path
) -> None:
    _, number = attached
    os.truncate(image, 3 * MIB)
    assert loopctl.run("resize", image) == (0, f"/dev/loop{number}: 3 MiB (3145728 bytes)\n", "")
    os.truncate(image, 4 * MIB)
    assert loopctl.json("resize", f"loop{number}")["size"] == 4 * MIB
    assert loopctl.json("resize", image, "-o", "1M", "--sizelimit", "2M")["size"] == 2 * MIB
    shown = loopctl.json("show", image)
    assert (shown["offset"], shown["size_limit"], shown["size"]) == (MIB, 2 * MIB, 2 * MIB)


def test_detach_by_file(attached: tuple[Running, int], loopctl: Loopctl, image: Path) -> None:
    running, number = attached
    answer = loopctl.json("detach", image)["devices"]
    assert [(each["node"], each["gone"]) for each in answer] == [(f"/dev/loop{number}", True)]
    assert running.end()[0] == 5
    assert not is_attached(image)


def test_detach_goes_on_after_one_that_fails(
    attached: tuple[Running, int], loopctl: Loopctl, area: Path
) -> None:
    running, number = attached
    status, out, err = loopctl.run("detach", "missing", f"/dev/loop{number}")
    assert (status, out) == (7, "")
    assert one_sentence(err)
    assert running.end()[0] == 5


def test_a_file_is_detached_without_the_right_to_read_it(
    attached: tuple[Running, int], loopctl: Loopctl, image: Path
) -> None:
    running, _ = attached
    image.chmod(0)
    assert loopctl.run("detach", image) == (0, "", "")
    assert running.end()[0] == 5


def test_a_device_in_use_is_detached_lazily_only(
    attached: tuple[Running, int], loopctl: Loopctl
) -> None:
    running, number = attached
    loop = look_at(number)
    assert loop is not None
    user = os.open(loop.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        status, out, err = loopctl.run("detach", loop.node)
        assert (status, out) == (6, "")
        assert one_sentence(err)
        status, out, err = loopctl.run("detach", "--lazy", loop.node)
        assert (status, out) == (0, "")
        assert "still in use" in err
        assert running.end()[0] == 5
    finally:
        os.close(user)
    wait_unbound(number, loop.diskseq)


# --- run ----------------------------------------------------------------------------------------


def test_run_gives_the_command_the_device_and_takes_its_exit_status(
    daemon: Daemon, loopctl: Loopctl, image: Path
) -> None:
    script = 'echo "$LOOPDEV" {} "$1"; cat "/sys/block/${LOOPDEV#/dev/}/loop/backing_file"; exit 7'
    status, out, err = loopctl.run("run", image, "--", "sh", "-c", script, "sh", "--if={}")
    assert (status, err) == (7, "")
    shown, file = out.splitlines()
    node, *others = shown.split()
    assert others == [node, f"--if={node}"]
    assert file == str(image)
    assert not is_attached(image)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "kill -9 $$"], 128 + signal.SIGKILL),
        (["nowhere"], 127),
        (["/etc/passwd"], 126),
        (["true"], 0),
    ],
)
def test_run_ends_as_env_and_timeout_do(
    daemon: Daemon, loopctl: Loopctl, image: Path, command: list[str], status: int
) -> None:
    found, out, err = loopctl.run("run", image, "--", *command)
    assert (found, out) == (status, "")
    assert one_sentence(err) or status not in (126, 127)


def test_run_tells_of_its_own_failures_by_one_status(
    daemon: Daemon, loopctl: Loopctl, image: Path
) -> None:
    for arguments in (["missing"], [image], ["--sizelimit", "100", image]):
        command = [] if arguments == [image] else ["--", "true"]
        status, out, err = loopctl.run("run", *arguments, *command)
        assert (status, out) == (125, "")
        assert one_sentence(err)


_WAITING = """
import signal
wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
print("{}", flush=True)
while True:
    got = signal.Signals(signal.sigwait(wanted)).name
    print(got, flush=True)
    if got == "SIGTERM":
        raise SystemExit(9)
"""


def test_run_passes_signals_on_and_waits_for_the_command(
    daemon: Daemon, loopctl: Loopctl, image: Path
) -> None:
    with loopctl.start("run", image, "--", PYTHON, "-c", _WAITING) as running:
        assert number_of(running.line()) >= 0
        for each in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
            running.signal(each)
            assert running.line() == each.name
        assert running.end() == (9, "", "")
    assert not is_attached(image)


def test_a_key_of_the_terminal_reaches_the_command_once(
    daemon: Daemon, loopctl: Loopctl, image: Path
) -> None:
    with terminal() as (keyboard, screen):
        streams: dict[str, Any] = {"stdin": screen, "stderr": screen}
        arguments = ("run", image, "--", PYTHON, "-c", _WAITING)
        with loopctl.start(*arguments, before=("setsid", "--ctty", "--wait"), **streams) as running:
            running.line()
            # Whatever loopctl makes of the key comes later than the key itself, and in order.
            running.signal(signal.SIGSTOP)
            os.write(keyboard, b"\x03")
            assert running.line() == "SIGINT"
            running.signal(signal.SIGTERM)
            running.signal(signal.SIGCONT)
            assert running.line() == "SIGTERM"
            assert running.end()[0] == 9


@contextmanager
def waiting(loopctl: Loopctl, image: Path, script: str) -> Iterator[tuple[Running, int, int]]:
    """A `run` of a shell that reads from its stdin, the device's number, and what it waits for."""
    with ExitStack() as stack:
        read_end, write_end = os.pipe()
        stack.callback(os.close, read_end)
        told = stack.enter_context(open(write_end, "wb"))
        command = ("run", image, "--", "sh", "-c", script)
        run = stack.enter_context(loopctl.start(*command, stdin=read_end, start_new_session=True))
        yield run, number_of(run.line()), told.fileno()


def holds(caller: Caller, number: int) -> int:
    """How many Holds there are of a device."""
    (path,) = caller.manager("GetDeviceByNode", "s", f"loop{number}")
    return int(caller.get(path, "Holds"))


def let_end(write_end: int) -> None:
    """Tell the shell of `waiting` that it can go on."""
    os.write(write_end, b"\n")


def test_a_command_keeps_its_device_when_loopctl_is_killed(
    daemon: Daemon, loopctl: Loopctl, image: Path, caller: Caller
) -> None:
    """Killed loopctl: what it takes for its device would soon be another user's."""
    with waiting(loopctl, image, "echo {}; read x") as (run, number, told):
        loop = look_at(number)
        assert loop is not None
        run.signal(signal.SIGKILL)
        run.process.wait()
        # loopd has heard of it, and knows what keeps the device.
        deadline = Deadline()
        while holder(caller, number):
            assert deadline.remaining
        assert holds(caller, number) == 1
        assert loop_is_bound(number, loop.diskseq)
        let_end(told)
        wait_unbound(number, loop.diskseq)
        run.end()


def holder(caller: Caller, number: int) -> str:
    """The connection that has the lease of a device."""
    (path,) = caller.manager("GetDeviceByNode", "s", f"loop{number}")
    return str(caller.get(path, "Holder"))


def test_nothing_is_left_of_a_run_that_is_killed_with_its_command(
    daemon: Daemon, loopctl: Loopctl, image: Path
) -> None:
    """Killed loopctl: as by the kernel, of a control group that is out of memory."""
    with waiting(loopctl, image, "echo {}; read x") as (run, number, _):
        loop = look_at(number)
        assert loop is not None
        os.killpg(run.pid, signal.SIGKILL)
        wait_unbound(number, loop.diskseq)
        run.end()


# What it leaves running tells of itself: before, it would be killed with the group.
_DAEMON = 'exec 3<&0; setsid sh -c "echo {}; exec >/dev/null; read x" <&3 3<&- 2>/dev/null &'


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_command_leaves_running_keeps_the_device(
    daemon: Daemon, loopctl: Loopctl, image: Path, killed: bool
) -> None:
    """Killed loopctl."""
    script = _DAEMON + (" read y" if killed else "")
    with waiting(loopctl, image, script) as (run, number, told):
        loop = look_at(number)
        assert loop is not None
        if killed:
            os.killpg(run.pid, signal.SIGKILL)
            run.end()
        else:
            said = f"the command left programs running, and /dev/loop{number} goes with the"
            assert run.end() == (0, "", f"loopctl: {said} last one\n")
        assert loop_is_bound(number, loop.diskseq)
        let_end(told)
        wait_unbound(number, loop.diskseq)


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.fixture
def odd_files(area: Path) -> None:
    """Files of kinds that cannot be attached."""
    (area / "directory").mkdir()
    os.mkfifo(area / "fifo")
    os.chmod(area / "fifo", 0o666)
    make_plain(area / "secret", owner="root", mode=0o600)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("hold missing", 7),
        ("hold directory", 7),
        ("hold -r directory", 7),
        ("hold fifo", 7),
        ("hold secret", 7),
        ("hold /proc/version", 7),
        ("hold --sizelimit 100 disk.img", 2),
        ("hold -o 2M disk.img", 2),
        ("hold --number 1048576 disk.img", 2),
        ("hold --in-memory missing", 7),
        ("hold --in-memory directory", 7),
        ("hold --in-memory fifo", 7),
        ("hold --in-memory secret", 7),
        ("detach disk.img", 5),
        ("detach directory", 5),
        ("resize disk.img", 5),
        ("show loop1048575", 5),
        ("show missing", 7),
    ],
)
def test_each_problem_has_its_sentence_and_exit_code(
    daemon: Daemon, loopctl: Loopctl, image: Path, odd_files: None, command: str, code: int
) -> None:
    status, out, err = loopctl.run(*command.split())
    assert (status, out) == (code, "")
    assert one_sentence(err)


ROOTLESS = ("unshare", "--user", "--map-root-user")


@pytest.mark.parametrize("before", [ROOTLESS, ("unshare", "--user")], ids=["root", "unmapped"])
def test_a_user_namespace_that_makes_the_uid_another_one(
    daemon: Daemon, loopctl: Loopctl, image: Path, before: tuple[str, ...]
) -> None:
    assert loopctl.run("list", before=before)[0] == 0
    status, node, _ = loopctl.run("run", image, "--", "echo", "{}", before=before)
    assert status == 0
    assert number_of(node.rstrip()) >= 0
    # Who is root in there only has no device that stays until somebody detaches it.
    assert loopctl.run("attach", image, before=before) == loopctl.run("attach", image)


def test_the_root_of_a_user_namespace_detaches_what_is_its_own(
    daemon: Daemon, loopctl: Loopctl, image: Path, area: Path
) -> None:
    roots = make_plain(area / "roots.img", owner="root")
    with loopctl.start("hold", image) as own, loopctl.start("hold", roots, user="root") as others:
        own.line(), others.line()
        assert loopctl.run("detach", "--all", before=ROOTLESS) == (0, "", "")
        assert own.end()[0] == 5
        assert is_attached(roots)
        others.signal(signal.SIGTERM)
        assert others.end()[0] == 0


def test_without_a_bus(loopctl: Loopctl, area: Path) -> None:
    nowhere = {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={area}/none"}
    status, out, err = loopctl.run("list", environment=nowhere)
    assert (status, out) == (3, "")
    assert one_sentence(err)


def test_without_a_daemon(loopctl: Loopctl, image: Path) -> None:
    status, out, err = loopctl.run("attach", image)
    assert (status, out) == (3, "")
    assert one_sentence(err)


def test_a_device_of_another_user(
    loopctl: Loopctl,
    make_polkit: Callable[[str], object],
    make_daemon: Callable[..., Daemon],
    image: Path,
) -> None:
    make_polkit(rules_allowing("org.example.loop1.attach", users=(OWNER,)))
    make_daemon()
    with loopctl.start("hold", image) as running:
        node = running.line()
        for arguments in (["detach", node], ["resize", node], ["hold", image]):
            status, out, err = loopctl.run(*arguments, user=OTHER)
            assert (status, out) == (4, "")
            assert one_sentence(err)
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0


def test_the_same_bytes_twice(attached: tuple[Running, int], loopctl: Loopctl, image: Path) -> None:
    status, out, err = loopctl.run("hold", image)
    assert (status, out) == (6, "")
    assert one_sentence(err)
    with loopctl.start("hold", "--allow-overlap", image) as second:
        second.line()
        status, out, err = loopctl.run("show", image)
        assert (status, out) == (5, "")
        assert one_sentence(err)
        second.signal(signal.SIGTERM)
        assert second.end()[0] == 0


def test_a_limit(
    loopctl: Loopctl,
    polkit: PolkitDouble,
    make_daemon: Callable[..., Daemon],
    image: Path,
    area: Path,
) -> None:
    make_daemon(config="[limits]\ndevices_per_user = 1\n")
    make_plain(area / "second.img", owner=OWNER)
    with loopctl.start("hold", image) as running:
        running.line()
        status, out, err = loopctl.run("hold", "second.img")
        assert (status, out) == (8, "")
        assert one_sentence(err)
        running.signal(signal.SIGTERM)
        assert running.end()[0] == 0


# --- how it looks -------------------------------------------------------------------------------


def test_a_name_of_any_bytes_is_harmless_in_a_list(
    daemon: Daemon, loopctl: Loopctl, area: Path
) -> None:
    image = make_plain(Path(os.fsdecode(os.fsencode(area) + b"/\x1b[31m\xff\n")), owner=OWNER)
    with loopctl.start("hold", image) as running:
        node = running.line()
        _, out, _ = loopctl.run("list")
        (line,) = [each for each in out.splitlines() if each.startswith(f"{node}\t")]
        assert line.endswith(f"\t{area}/\\x1b[31m\\xff\\n")
        assert loopctl.json("show", node)["backing_file"] == f"{area}/\x1b[31m\ufffd\n"
        running.signal(signal.SIGTERM)
        status, _, err = running.end()
        assert status == 0
        assert "\x1b" not in err


def test_a_list_on_a_terminal_is_aligned_and_short(
    attached: tuple[Running, int], loopctl: Loopctl
) -> None:
    _, number = attached
    with terminal() as (keyboard, screen):
        # The devices of others may be more than a terminal keeps until it is read.
        with loopctl.start("list", stdout=screen) as running, ThreadPoolExecutor(1) as pool:
            shown = pool.submit(read_until, keyboard, "the end\r?\n$")
            status, _, _ = running.end()
            os.write(screen, b"the end\n")
            header, *rows = shown.result().replace("\r", "").splitlines()
        assert status == 0
    (row,) = [each for each in rows if each.startswith(f"/dev/loop{number} ")]
    assert header.split()[:3] == ["NAME", "SIZE", "OFFSET"]
    assert row.split()[1] == "1M"
    assert row.index("/disk.img") > header.index("BACK-FILE")


# --- the library --------------------------------------------------------------------------------


def test_the_blocking_front_does_all_of_it(
    daemon: Daemon, bus: PrivateBus, caller: Caller, image: Path
) -> None:
    with blocking.Client.connect(bus.address) as client:
        with client.attach(image, reference="x") as device:
            assert device.properties().reference == "x"
            os.truncate(image, 2 * MIB)
            assert device.resize() == 2 * MIB
            with device.open("rw") as fd:
                os.pwrite(fd.fileno(), b"written", 512)
            device.sync()
            assert image.read_bytes()[512:519] == b"written"
            assert client.device_by_node(device.node).path == device.path
            with image.open("rb") as file:
                assert client.device_by_fd(file).path == device.path
            assert device.path in [each.path for each, _ in client.devices()]
            number = number_of(device.node)
            assert loop_is_bound(number, device.diskseq)
        assert not loop_is_bound(number, device.diskseq)
        assert device.wait_ended() is Ended.DETACHED
    with blocking.attach(image, address=bus.address) as device:
        assert device.detach()


def test_the_blocking_front_changes_devices(daemon: Daemon, bus: PrivateBus, disk: Path) -> None:
    with blocking.Client.connect(bus.address) as client:
        with client.attach(disk, partition_scan=True, lock="shared") as device:
            device.set_reference("x")
            assert device.set_direct_io(False) is False
            device.lock("exclusive")
            device.set_sector_size(512)
            assert device.rescan_partitions() == 2
            found = device.properties()
            assert (found.reference, found.locked, found.direct_io) == ("x", "exclusive", False)
            assert [each.number for each in found.partitions] == [1, 2]
            with device.open(partition=2) as fd:
                assert os.pread(fd.fileno(), 16, 0) == pattern(2 * MIB, 16)
                assert client.resize_by_fd(fd, size_limit=MIB // 2) == MIB // 2
            assert device.properties().partitions[1].size == MIB // 2
            device.lock("none")
            with pytest.raises(NotSupported, match="SetLifetime"):
                device.set_autoclear(False)


def test_the_blocking_front_sets_autoclear_on_a_foreign_device(
    authority: object, make_daemon: Callable[..., Daemon], bus: PrivateBus, image: Path
) -> None:
    # Open, since it would go at once with autoclear.
    with foreign_device(image) as loop, open(loop.node, "rb"):
        make_daemon()
        with blocking.Client.connect(bus.address) as client:
            device = client.device_by_node(loop.node)
            device.set_autoclear(True)
            assert device.properties().autoclear
            device.set_autoclear(False)
            assert not device.properties().autoclear
