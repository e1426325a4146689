# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl over a bus that the tests play: what its options send, what it says, its progress bar."""

import asyncio
import contextlib
import errno
import json
import os
import pty
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.bus.codec import Variant
from loopd.cli import app, attachment, notices, progress, readiness
from loopd.cli.outcome import ExitCode
from loopd.client import Client, Daemon, Device
from loopd.client.link import Link
from loopd.client.watch import Watch
from loopd.fd import OwnedFd
from tests.harness.images import MIB, make_plain
from tests.unit.test_client import OBJECT, Bus, properties

# --- attach and run -----------------------------------------------------------------------------

PARTITIONS = Variant("a(ustt)", [[1, "/dev/loop3p1", 512, 1024], [2, "/dev/loop3p2", 2048, 512]])


class _Client(Client):
    """One whose loopd has no mistakes in its settings, which root's commands ask for first."""

    async def daemon(self) -> Daemon:
        return Daemon("1", 0, 0, 0, "")

    async def uid(self) -> int:
        return os.geteuid()


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    """A bus that loopctl connects to, with a loopd that can attach /dev/loop3."""
    made = Bus()

    def hold() -> list[int]:
        made.sends = [OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))]
        return [0]

    made.answers |= {
        "Attach": lambda: [OBJECT, "/dev/loop3", 41],
        "Detach": lambda: [True],
        "GetAll": lambda: [properties(Partitions=Variant("a(ustt)", []))],
        "Hold": hold,
    }

    async def connect(*_: object, **how: object) -> Client:
        return _Client(Link(made, Watch(), interactive=False))

    async def settled(_: Device) -> bool:
        return True

    monkeypatch.setattr(attachment.Client, "connect", connect)
    monkeypatch.setattr(Device, "settled", settled)
    monkeypatch.setattr(notices, "_has_node", lambda _: True)
    return made


@pytest.fixture
def file(area: Path) -> Path:
    return make_plain(area / "disk.img", 4096)


def options_of(bus: Bus) -> dict[str, Any]:
    """What was sent with Attach."""
    _, options = bus.bodies[0]
    return {key: each.value for key, each in options.items()}


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("", {}),
        ("-P", {"partition-scan": True}),
        ("--partscan", {"partition-scan": True}),
        ("-b 0", {"sector-size": 0}),
        ("--lock exclusive", {"lock": "exclusive"}),
        ("--lock=shared", {"lock": "shared"}),
        ("--number 7", {"number": 7}),
        ("--number 0", {"number": 0}),
        ("--direct-io", {"direct-io": True}),
        ("--direct-io=off", {"direct-io": False}),
        ("-r", {"read-only": True}),
    ],
)
def test_an_option_is_passed_on(bus: Bus, file: Path, given: str, sent: dict[str, Any]) -> None:
    assert app.main(["run", *given.split(), str(file), "--", "true"]) == 0
    assert options_of(bus) == sent
    assert bus.passed[0].st_ino == file.stat().st_ino


@pytest.mark.parametrize(("given", "direct"), [("", True), ("--direct-io=off", False)])
def test_the_file_is_opened_for_direct_io(
    bus: Bus, file: Path, given: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A18"""
    flags: list[int] = []
    really = os.open

    def open_(path: Any, how: int, *more: Any, **others: Any) -> int:
        if path == str(file):
            flags.append(how)
        return really(path, how, *more, **others)

    monkeypatch.setattr(os, "open", open_)
    assert app.main(["run", *given.split(), str(file), "--", "true"]) == 0
    assert bool(flags[0] & os.O_DIRECT) is direct
    assert flags[0] & os.O_ACCMODE == os.O_RDWR


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("", {"direct-io": False}),
        ("-r", {"direct-io": False, "read-only": True}),
        ("--direct-io", {"direct-io": False}),
    ],
)
def test_a_copy_in_memory_is_passed_in_place_of_the_file(
    bus: Bus, file: Path, given: str, sent: dict[str, Any]
) -> None:
    """A19"""
    file.chmod(0o444)
    assert app.main(["run", "--in-memory", *given.split(), str(file), "--", "true"]) == 0
    assert options_of(bus) == sent
    assert bus.passed_names == ["/memfd:disk.img (deleted)"]


def test_a_directory_cannot_be_copied(
    bus: Bus, area: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A19"""
    assert app.main(["attach", "--in-memory", str(area)]) == ExitCode.FILE
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"loopctl: {area}: the file is neither a regular one nor a block device\n"
    assert bus.calls == []


def attached(bus: Bus, *arguments: str) -> int:
    """Run `loopctl hold` on a device that somebody detaches as soon as it is there."""
    told = [bus.answers["GetAll"], lambda: [properties(State=Variant("s", "detaching"))]]
    bus.answers["GetAll"] = lambda: told.pop(0)()
    return app.main(["hold", *arguments])


def test_attach_tells_of_the_partitions(
    bus: Bus, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bus.answers["GetAll"] = lambda: [properties(Partitions=PARTITIONS)]
    assert attached(bus, "-P", str(file)) == ExitCode.NO_DEVICE
    out, err = capsys.readouterr()
    assert out == "/dev/loop3\n"
    assert err.splitlines()[0] == (
        f"loopctl: /dev/loop3 is {file} (4 KiB, read-write), with /dev/loop3p1, /dev/loop3p2, "
        "until this ends: press Ctrl-C, or send SIGTERM"
    )


def test_attach_tells_of_a_copy(bus: Bus, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A19"""
    assert attached(bus, "--in-memory", str(file)) == ExitCode.NO_DEVICE
    assert f"/dev/loop3 is a copy of {file} (4 KiB, read-write) until" in capsys.readouterr().err


# --- when it is ready ---------------------------------------------------------------------------


@pytest.fixture
def events(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in which order: that udev is waited for, a node is printed, systemd is told."""
    seen: list[str] = []

    async def settled(_: Device) -> bool:
        seen.append("settled")
        return True

    def announce(*_: object, **__: object) -> None:
        seen.append("announced")

    monkeypatch.setattr(Device, "settled", settled)
    monkeypatch.setattr(attachment, "_announce", announce)
    monkeypatch.setattr(readiness.notify, "tell", seen.append)
    return seen


@pytest.mark.parametrize("command", ["attach --lifetime=user", "run", "hold"])
@pytest.mark.parametrize("option", ["", "--no-settle"])
def test_udev_is_waited_for_before_anybody_hears_of_the_device(
    bus: Bus, file: Path, events: list[str], command: str, option: str
) -> None:
    """By-label links, and all others."""
    if command == "hold":
        attached(bus, *option.split(), str(file))
        assert events.pop().startswith("READY=1\n")
    else:
        name, *options = command.split()
        arguments = [name, *options, *option.split(), str(file)]
        assert app.main([*arguments, *(["--", "true"] if name == "run" else [])]) == 0
    assert events == ["settled", "announced"][1 if option else 0 :]


def test_systemd_is_told_what_is_attached(bus: Bus, file: Path, events: list[str]) -> None:
    bus.answers["GetAll"] = lambda: [properties(Partitions=PARTITIONS)]
    attached(bus, str(file))
    assert events[-1] == (
        f"READY=1\nSTATUS=/dev/loop3 is {file} (4 KiB, read-write), with /dev/loop3p1, /dev/loop3p2"
    )


def test_a_udev_that_does_nothing_is_not_waited_for_for_ever(
    bus: Bus, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def settled(_: Device) -> bool:
        return False

    monkeypatch.setattr(Device, "settled", settled)
    assert app.main(["run", str(file), "--", "true"]) == 0
    assert capsys.readouterr().err == (
        "loopctl: udev has not made the links to /dev/loop3 within 30 s; going on (--no-settle "
        "does not wait)\n"
    )


def test_a_device_that_is_given_up_while_udev_is_waited_for_is_detached(
    bus: Bus, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has heard of it."""

    async def settled(_: Device) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(Device, "settled", settled)
    given = ["attach", "--lifetime=user", str(file)]
    assert app.main(given) == 128 + signal.SIGTERM
    assert [member for _, member in bus.calls] == ["Attach", "Detach"]


# --- what is told of it -------------------------------------------------------------------------


def told(bus: Bus, capsys: pytest.CaptureFixture[str], *arguments: str, **of: Variant) -> str:
    """Run a command on a device; what loopctl says."""
    bus.answers["GetAll"] = lambda: [properties(**{"Partitions": Variant("a(ustt)", []), **of})]
    assert app.main(["run", *arguments, "--", "true"]) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        ({"Offset": Variant("t", 188392)}, "its offset, 188392, is no multiple of 4096"),
        ({}, "its sectors have 512 bytes, and the file asks for 4096, as -b 4096 makes them"),
        ({"SectorSize": Variant("u", 4096)}, "the filesystem of its file does not allow it"),
    ],
)
def test_direct_io_that_is_not_to_be_had_has_a_reason(
    bus: Bus,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    of: dict[str, Variant],
    reason: str,
) -> None:
    """Direct I/O that does not take."""
    monkeypatch.setattr(notices, "direct_io_alignment", lambda _: 4096)
    of = {"DirectIO": Variant("b", False), **of}
    error = told(bus, capsys, "--direct-io=on", str(file), **of)
    assert error.startswith(f"loopctl: /dev/loop3 does without direct I/O: {reason}")
    assert error.count("\n") == 1
    # Nobody has asked for it, or it is there.
    assert told(bus, capsys, "--direct-io=off", str(file), **of) == ""
    assert told(bus, capsys, str(file), **of) == ""
    assert told(bus, capsys, "--direct-io=on", str(file)) == ""


def test_a_copy_in_memory_has_no_direct_io(
    bus: Bus, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = told(bus, capsys, "--in-memory", "--direct-io", str(file), DirectIO=Variant("b", False))
    assert error == (
        "loopctl: /dev/loop3 does without direct I/O: a copy in memory has no use for it\n"
    )


@pytest.mark.parametrize("option", [[], ["-P"], ["-o", "4K"], ["--in-memory"]])
def test_a_file_that_is_no_image_is_said_to_be_none(
    bus: Bus, file: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    """Compressed files."""
    begin = 4096 if "-o" in option else 0
    file.write_bytes(bytes(begin) + b"\xfd7zXZ\0" + bytes(8192))
    error = told(bus, capsys, *option, str(file), Offset=Variant("t", begin))
    assert error == (
        f"loopctl: {file} seems to be compressed by xz, and no image of a disk as it is: make one "
        "of it with 'unxz'\n"
    )


def test_a_beginning_that_cannot_be_read_is_no_obstacle(
    bus: Bus,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(notices, "beginning", fails)
    assert told(bus, capsys, "-P", str(file)) == ""


def test_a_beginning_that_does_not_come_is_not_waited_for(
    bus: Bus,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The filesystem hangs."""
    monkeypatch.setattr(notices, "_READING", 0)
    end = threading.Event()

    def hangs(*_: object) -> bytes:
        end.wait(20)
        return b""

    monkeypatch.setattr(notices, "beginning", hangs)
    try:
        assert told(bus, capsys, "-P", str(file)) == ""
    finally:
        end.set()


def test_a_node_that_is_not_there_is_told(
    bus: Bus, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sandboxes."""
    monkeypatch.setattr(notices, "_has_node", lambda _: False)
    assert told(bus, capsys, str(file)) == (
        "loopctl: /dev/loop3 is not there in this /dev, as in a sandbox: 'loopctl open' has a "
        "command use the device without a node\n"
    )


@pytest.mark.parametrize("command", ["attach", "run"])
def test_partitions_are_told_as_json(
    bus: Bus, file: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    bus.answers["GetAll"] = lambda: [properties(Partitions=PARTITIONS)]
    if command == "attach":
        attached(bus, "-P", "--json", str(file))
    else:
        app.main(["run", "-P", "--json", str(file), "--", "true"])
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "object": OBJECT,
        "node": "/dev/loop3",
        "diskseq": 41,
        "partitions": [
            {"number": 1, "node": "/dev/loop3p1", "start": 512, "size": 1024},
            {"number": 2, "node": "/dev/loop3p2", "start": 2048, "size": 512},
        ],
        "missing_partitions": [],
    }


# --- the bar ------------------------------------------------------------------------------------


class Screen:
    """A terminal; what is written there can be read."""

    def __init__(self, reading: OwnedFd, writing: OwnedFd) -> None:
        self._reading = reading
        self._writing = writing
        self._seen = b""

    def hang_up(self) -> None:
        """Be gone."""
        self._reading.close()

    @contextmanager
    def bar(self, what: str = "copying disk.img") -> Iterator[progress.ProgressBar]:
        """A bar with the terminal for stderr."""
        before = sys.stderr
        sys.stderr = open(self._writing.fileno(), "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - below
        try:
            with progress.ProgressBar(what) as bar:
                yield bar
        finally:
            with contextlib.suppress(OSError):  # of a terminal that has gone
                sys.stderr.close()
            sys.stderr = before

    def seen(self) -> str:
        """Everything that was written."""
        os.set_blocking(self._reading.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reading.fileno(), 65536):
                self._seen += data
        return self._seen.decode()

    def line(self) -> str:
        """The line that was drawn last, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.seen().rpartition("\r\x1b[2K")[2])


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """A terminal of 40 columns, on which everything is slow enough for a bar."""
    monkeypatch.setattr(progress, "_QUICK", 0)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "40", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    reading, writing = pty.openpty()
    with OwnedFd(reading) as terminal, OwnedFd(writing) as stderr:
        yield Screen(terminal, stderr)


def test_a_bar_tells_how_far_it_is(screen: Screen) -> None:
    """A19"""
    with screen.bar() as bar:
        bar(MIB, 4 * MIB)
        assert re.fullmatch(r"copying disk\.img [━╺╸]+ +25% --:--", screen.line())
        assert len(screen.line()) == 37  # there is room for ^C
        bar(3 * MIB, 4 * MIB)
        assert " 75% " in screen.line()
        bar(4 * MIB, 4 * MIB)
        # Gone before anything else is said, and the cursor is there all the time.
        assert screen.seen().endswith("\x1b[2K")
        drawn = screen.seen()
    assert screen.seen() == drawn
    assert drawn.count("\x1b[?25h") >= 1
    assert "100%" not in drawn


def test_a_bar_goes_with_its_block(screen: Screen) -> None:
    """A19"""
    with screen.bar() as bar:
        bar(1, 4)
        drawn = screen.seen()
    assert screen.seen().removeprefix(drawn).endswith("\x1b[2K")


def test_a_name_cannot_draw(screen: Screen) -> None:
    """A19: neither as rich's markup nor by its length"""
    with screen.bar("copying [red]" + "x" * 100) as bar:
        bar(1, 4)
        assert re.match(r"copying \[red\]x+… [━╺╸]+ +25% ", screen.line())
        assert len(screen.line()) == 37


def test_no_colour_where_none_is_wanted(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A19"""

    def colours() -> list[str]:
        before = len(screen.seen())
        with screen.bar() as bar:
            bar(1, 4)
        return re.findall(r"\x1b\[[0-9;]*3[0-9;]*m", screen.seen()[before:])

    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


def test_what_is_quick_has_no_bar(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A19"""
    monkeypatch.setattr(progress, "_QUICK", 3600)
    with screen.bar() as bar:
        bar(1, 4)
        bar(4, 4)
    assert screen.seen() == ""


def test_what_is_done_has_no_bar(screen: Screen) -> None:
    """A19"""
    with screen.bar() as bar:
        bar(0, 0)
        bar(4, 4)
    assert screen.seen() == ""


def test_a_dumb_terminal_has_no_bar(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A19"""
    monkeypatch.setenv("TERM", "dumb")
    with screen.bar() as bar:
        bar(1, 4)
    assert screen.seen() == ""


def test_a_pipe_has_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A19"""
    monkeypatch.setattr(progress, "_QUICK", 0)
    with progress.ProgressBar("x") as bar:
        bar(1, 4)
    assert capsys.readouterr() == ("", "")


def test_without_rich_there_is_no_bar(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A19"""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with screen.bar() as bar:
        bar(1, 4)
        bar(2, 4)
    assert screen.seen() == ""


def test_without_stderr_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A19"""
    monkeypatch.setattr(progress, "_QUICK", 0)
    monkeypatch.setattr(sys, "stderr", None)
    with progress.ProgressBar("x") as bar:
        bar(1, 4)


@pytest.mark.parametrize("drawn", [[], [1]])
def test_a_terminal_that_goes_is_no_problem(screen: Screen, drawn: list[int]) -> None:
    """A19"""
    with screen.bar() as bar:
        for done in drawn:
            bar(done, 4)
        screen.hang_up()
        bar(2, 4)
        bar(3, 4)


def test_rich_is_imported_only_for_a_bar(file: Path, bus: Bus) -> None:
    """A19: it would take as long as many a command"""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        del sys.modules[name]
    assert app.main(["run", "--in-memory", str(file), "--", "true"]) == 0
    assert "rich" not in sys.modules
