# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl without a bus: its arguments, what it prints, how it ends."""

import argparse
import ast
import asyncio
import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loopd import __version__, errors
from loopd.bus.transport import BusError
from loopd.cli import app, columns, output
from loopd.cli.arguments import parse
from loopd.cli.outcome import MEANINGS, ExitCode, RunExitCode, exit_code, sentence
from loopd.cli.signals import Interrupted, Signals
from loopd.cli.values import node_of, parse_size
from loopd.client.absence import Unavailable
from loopd.client.properties import FOREIGN, Partition, Properties
from tests.harness.area import CHECKOUT
from tests.harness.asynchronous import run_async

# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("512", 512),
        ("0x200", 512),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("3M", 3 << 20),
        ("1.5M", 3 << 19),
        ("0.1kB", 100),
        ("0.1K", 102),
        ("2GiB", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("15E", 15 << 60),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_sizes_are_read_as_losetup_reads_them(text: str, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-1",
        "1.5",
        "1.M",
        ".5M",
        "0x1.5K",
        "1X",
        "1KB2",
        "1iB",
        "K",
        " 1",
        "1 ",
        "\u0661",
        "16E",
        "1_000",
        "0x",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


def test_attach_takes_the_spellings_of_losetup() -> None:
    short = parse("attach -r -o 1M --sizelimit 2M -b 4K -P --direct-io=off --loop-ref x f".split())
    long = parse(
        "attach --read-only --offset=1M --sizelimit=2M --sector-size=4096 --partscan "
        "--direct-io=off --loop-ref=x f".split()
    )
    for found in (short, long):
        assert found.read_only
        assert found.partscan
        assert (found.offset, found.sizelimit, found.sector_size) == (1 << 20, 2 << 20, 4096)
        assert (found.direct_io, found.loop_ref, found.file) == ("off", "x", "f")


def test_hold_takes_what_attach_takes_but_for_the_lifetime() -> None:
    options = "-r -o 1M -P --number 3 --in-memory --json -- f".split()
    kept, held = (vars(parse([command, *options])) for command in ("attach", "hold"))
    different = {key for key in kept if kept[key] != held.get(key)}
    assert different == {"command", "parser"}
    assert kept.keys() - held.keys() == {"lifetime"}


def test_a_lock_is_for_a_device_that_loopctl_stays_with() -> None:
    assert parse("attach --lock=shared --lifetime=connection f".split()).lock == "shared"
    assert parse("hold --lock=shared f".split()).lock == "shared"


def test_of_an_option_that_is_given_twice_the_last_counts() -> None:
    """The unit has defaults before what an administrator gives."""
    assert parse("hold --loop-ref=unit --loop-ref=mine f".split()).loop_ref == "mine"
    assert parse("hold --default-loop-ref=unit f".split()).default_loop_ref == "unit"


def test_what_is_not_given_is_left_to_loopd() -> None:
    found = parse(["attach", "f"])
    given = (found.offset, found.sizelimit, found.sector_size, found.direct_io, found.loop_ref)
    assert (*given, found.lock, found.number) == (None,) * 7
    switches = (found.read_only, found.partscan, found.allow_overlap, found.in_memory)
    assert switches == (False,) * 4


def test_direct_io_without_a_value_does_not_take_the_file_for_one() -> None:
    found = parse(["attach", "--direct-io", "off"])
    assert (found.direct_io, found.file) == ("on", "off")


def test_a_file_may_begin_with_a_dash() -> None:
    assert parse(["attach", "--", "--direct-io"]).file == "--direct-io"


@pytest.mark.parametrize("command", ["run -r disk.img", "open -w loop3"])
def test_the_options_of_a_command_to_run_are_left_alone(command: str) -> None:
    found = parse([*command.split(), *"-- mkfs -r --direct-io -- {}".split()])
    assert found.run == ["mkfs", "-r", "--direct-io", "--", "{}"]


def test_open_may_do_without_a_command() -> None:
    assert parse(["open", "loop3"]).run is None


def test_columns_are_named_as_by_losetup_or_added_to_the_usual_ones() -> None:
    assert parse("list -O name,back-file".split()).output == ("NAME", "BACK-FILE")
    assert parse("list --output +DIO".split()).output == (*columns.DEFAULT, "DIO")
    assert parse(["list"]).output is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("", ExitCode.USAGE),
        ("frobnicate", ExitCode.USAGE),
        ("attach", ExitCode.USAGE),
        ("attach a b", ExitCode.USAGE),
        ("attach --direct-io=perhaps f", ExitCode.USAGE),
        ("attach --off 512 f", ExitCode.USAGE),
        ("attach -o 5X f", ExitCode.USAGE),
        ("attach --lock none f", ExitCode.USAGE),
        ("attach --number loop3 f", ExitCode.USAGE),
        ("attach --number -1 f", ExitCode.USAGE),
        ("attach --number 1_0 f", ExitCode.USAGE),
        ("attach --lock shared f", ExitCode.USAGE),
        ("attach --lifetime ever f", ExitCode.USAGE),
        ("hold --lifetime user f", ExitCode.USAGE),
        ("detach", ExitCode.USAGE),
        ("detach --all loop3", ExitCode.USAGE),
        ("detach --all -j f", ExitCode.USAGE),
        ("list -O SIZE,TASTE", ExitCode.USAGE),
        ("set loop3", ExitCode.USAGE),
        ("set --lifetime connection loop3", ExitCode.USAGE),
        ("open", RunExitCode.FAILED),
        ("open loop3 --", RunExitCode.FAILED),
        ("open --partition x loop3", RunExitCode.FAILED),
        ("run f", RunExitCode.FAILED),
        ("run f --", RunExitCode.FAILED),
        ("run -- true", RunExitCode.FAILED),
    ],
)
def test_wrong_usage_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: str, code: int
) -> None:
    assert app.main(arguments.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("loopctl: ")
    assert err.endswith("--help' tells more\n")
    assert err.count("\n") == 1


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr() == (f"loopctl {__version__}\n", "")
    assert app.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for code in ExitCode:
        assert f" {code:d}  {MEANINGS[code]}\n" in out


@pytest.mark.parametrize("target", ["loop3", "/dev/loop3", "loop1048575"])
def test_a_node_is_known_by_its_name(target: str) -> None:
    assert node_of(target) == (target, None)
    assert node_of(f"{target}p15") == (target, 15)


@pytest.mark.parametrize(
    "target", ["./loop3", "loop", "loop3p", "/dev/loop3p1p1", "loop-control", "loop3\n", "LOOP3"]
)
def test_everything_else_is_a_file(target: str) -> None:
    assert node_of(target) is None


def test_a_link_to_a_node_means_the_node(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/loop3")
    assert node_of(str(link)) == ("/dev/loop3", None)
    link.unlink()
    link.symlink_to("/dev/loop3p2")
    assert node_of(str(link)) == ("/dev/loop3", 2)


# --- output -------------------------------------------------------------------------------------


def device(**changes: Any) -> Properties:
    """A device, as loopd might tell."""
    values: dict[str, Any] = {
        "node": "/dev/loop3",
        "number": 3,
        "device_number": os.makedev(7, 3),
        "diskseq": 41,
        "backing_file": b"/tmp/disk.img",
        "backing_device": os.makedev(254, 0),
        "backing_inode": 99,
        "offset": 0,
        "size_limit": 0,
        "size": 4 << 20,
        "sector_size": 512,
        "read_only": False,
        "direct_io": True,
        "autoclear": True,
        "partition_scan": False,
        "partitions": (),
        "missing_partitions": (),
        "reference": "",
        "owner": 0,
        "holder": ":1.9",
        "lifetime": "connection",
        "holds": 0,
        "locked": "none",
        "managed": True,
        "state": "attached",
        "attached_at": 1_600_000_000_000_000,
    }
    return Properties(**{**values, **changes})


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"/tmp/disk.img", "/tmp/disk.img"),
        ("/tmp/größe 1".encode(), "/tmp/größe 1"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"\x1b[2J", "\\x1b[2J"),
        (b"a\nb\tc", "a\\nb\\tc"),
        (b"\\x1b", "\\\\x1b"),
        ("\u202etxt.exe".encode(), "\\u202etxt.exe"),
        ("\x9b31m".encode(), "\\x9b31m"),
        (b"\x00", "\\x00"),
    ],
)
def test_names_reach_a_terminal_as_text_only(raw: bytes, shown: str) -> None:
    assert output.printable(raw) == shown


@pytest.mark.parametrize(
    ("number", "long", "short"),
    [
        (0, "0 bytes", "0"),
        (512, "512 bytes", "512"),
        (1024, "1 KiB", "1K"),
        (1536, "1.5 KiB", "1.5K"),
        (4 << 20, "4 MiB", "4M"),
        ((1 << 30) - 1, "1024 MiB", "1024M"),
        (5 << 60, "5 EiB", "5E"),
        ((1 << 64) - 1, "16 EiB", "16E"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit(number: int, long: str, short: str) -> None:
    assert (output.size(number), output.short_size(number)) == (long, short)


def test_an_owner_without_a_name_is_a_number() -> None:
    assert output.owner(4_000_000_000) == "4000000000"


def test_all_properties_are_shown() -> None:
    partition = Partition(1, "/dev/loop3p1", 512, 1024)
    shown = "\n".join(
        output.properties(
            device(
                reference="r\x07",
                partitions=(partition,),
                missing_partitions=(2, 5),
                size_limit=1 << 20,
            )
        )
    )
    for part in (
        "Size:           4 MiB (4194304 bytes)\n",
        "Size limit:     1 MiB (1048576 bytes)\n",
        "Partitions:     /dev/loop3p1\n",
        "Missing ones:   2, 5\n",
        "Reference:      r\\x07\n",
        "Owner:          root (uid 0)\n",
        "Backing inode:  99 on 254:0\n",
        "Device number:  7:3\n",
    ):
        assert part in shown + "\n"


def test_a_foreign_device_is_not_said_to_be_anybodys() -> None:
    foreign = device(owner=FOREIGN, managed=False, lifetime="", holder="", attached_at=0)
    shown = "\n".join(output.properties(foreign))
    assert str(FOREIGN) not in shown
    assert "1970" not in shown


def test_json_is_ascii_and_valid_whatever_a_file_is_called() -> None:
    partition = Partition(1, "/dev/loop3p1", 512, 1024)
    odd = device(backing_file=b"/tmp/\xff\x1b\xc2\x9b", partitions=(partition,))
    text = output.as_json(output.properties_for_json("/o", odd))
    assert text.isascii()
    assert text.isprintable()
    # Not a lone surrogate, which strict readers refuse.
    assert json.loads(text)["backing_file"] == "/tmp/\ufffd\x1b\x9b"
    assert json.loads(text)["partitions"] == [
        {"number": 1, "node": "/dev/loop3p1", "start": 512, "size": 1024}
    ]


# --- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (BusError("x"), ExitCode.UNAVAILABLE),
        (Unavailable("x"), ExitCode.UNAVAILABLE),
        (errors.InvalidArgs("x"), ExitCode.USAGE),
        (errors.AccessDenied("x"), ExitCode.DENIED),
        (errors.InteractiveAuthorizationRequired("x"), ExitCode.DENIED),
        (errors.UntrustedFilesystem("x"), ExitCode.DENIED),
        (errors.NoSuchDevice("x"), ExitCode.NO_DEVICE),
        (errors.UnknownObject("x"), ExitCode.NO_DEVICE),
        (errors.Ambiguous("x"), ExitCode.NO_DEVICE),
        (errors.DeviceBusy("x"), ExitCode.BUSY),
        (errors.Overlap("x"), ExitCode.BUSY),
        (errors.UnsupportedFile("x"), ExitCode.FILE),
        (errors.LimitsExceeded("x"), ExitCode.LIMIT),
        (errors.NotSupported("x"), ExitCode.NOT_SUPPORTED),
        (errors.Failed("x"), ExitCode.FAILED),
        (errors.TimedOut("x"), ExitCode.FAILED),
        (errors.ErrnoError("x", errno.ENOSPC), ExitCode.FAILED),
        (errors.by_name("com.example.Error", "x"), ExitCode.FAILED),
        (FileNotFoundError(errno.ENOENT, "x", "file"), ExitCode.FILE),
        (OSError(errno.ENOSPC, "x"), ExitCode.FAILED),
    ],
)
def test_each_error_has_its_exit_code(exc: Exception, code: ExitCode) -> None:
    assert exit_code(exc) == code


def test_every_error_of_loopd_was_thought_of() -> None:
    considered = {
        *("AccessDenied Ambiguous DeviceBusy ErrnoError Failed InvalidArgs LimitsExceeded").split(),
        *("InteractiveAuthorizationRequired NoSuchDevice NotSupported Overlap PeerError").split(),
        *("PropertyReadOnly TimedOut UnknownInterface UnknownMethod UnknownObject").split(),
        *("UnknownProperty UnsupportedFile UntrustedFilesystem").split(),
    }
    assert {cls.__name__ for cls in errors.LoopError.__subclasses__()} == considered


def test_exit_codes_differ_from_those_of_commands_and_signals() -> None:
    assert len(set(ExitCode)) == len(MEANINGS)
    assert max(ExitCode) < min(RunExitCode)
    assert max(RunExitCode) < 128


@pytest.mark.parametrize(
    ("exc", "start", "advice"),
    [
        (FileNotFoundError(2, "x", "a\x1b"), "cannot open a\\x1b: No such file", "check the path"),
        (PermissionError(13, "x", b"a"), "cannot open a: Permission denied", "right to read"),
        (IsADirectoryError(21, "x", "a"), "cannot open a: Is a directory", "pass an image"),
        (BlockingIOError(11, "x", "a"), "cannot open a: Resource temp", "has a lease on it"),
        (errors.NoSuchDevice("loop3 has none"), "loop3 has none", "loopctl list"),
        (errors.AccessDenied("polkit says no"), "polkit says no", "administrator"),
        (errors.InteractiveAuthorizationRequired("x"), "a password", "--no-ask-password"),
        (BusError("cannot connect"), "cannot connect", "DBUS_SYSTEM_BUS_ADDRESS"),
        (errors.PeerError("", "a.b\x1bc"), "loopd answered a.b\\x1bc", ""),
        (errors.Failed("two\nlines"), "two\\nlines", "log"),
    ],
)
def test_an_error_is_told_in_one_line_with_what_to_do(
    exc: Exception, start: str, advice: str
) -> None:
    text = sentence(exc)
    assert text.startswith(start)
    assert advice in text
    assert text.isprintable()


def test_without_a_bus_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    (tmp_path / "image").touch()
    image = f"{tmp_path}/image"
    for arguments in (
        f"attach {image}",
        f"hold {image}",
        *("list", "list -j /", "show loop3", "detach loop3", "detach --all", "resize loop3"),
        *("set --direct-io loop3", "monitor"),
    ):
        assert app.main(arguments.split()) == ExitCode.UNAVAILABLE
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("loopctl: cannot connect to the bus at ")
        assert err.count("\n") == 1
    for arguments in (f"run {image} -- true", "open loop3 -- true"):
        assert app.main(arguments.split()) == RunExitCode.FAILED


def test_the_file_comes_before_the_bus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    assert app.main(["attach", f"{tmp_path}/image"]) == ExitCode.FILE
    assert "image" in capsys.readouterr().err


def loopctl(*arguments: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
    """Run loopctl in a process of its own."""
    program = "import sys; from loopd.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        **how,
    )


def test_a_reader_that_has_left_is_no_problem_to_speak_of() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = loopctl("--help", stdout=write_end)
    finally:
        os.close(write_end)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""


def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = loopctl("--help", stdout=full)
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == b"loopctl: cannot write: No space left on device\n"


def test_a_closed_stdout_is_told() -> None:
    done = loopctl("--help", preexec_fn=lambda: os.close(1))
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == b"loopctl: cannot write: Bad file descriptor\n"


def test_with_a_closed_stderr_nothing_goes_elsewhere(tmp_path: Path) -> None:
    for arguments, status in (
        (("attach", f"{tmp_path}/none"), ExitCode.FILE),
        (("attach", "--nonsense"), ExitCode.USAGE),
        (("run", f"{tmp_path}/none", "--", "true"), RunExitCode.FAILED),
    ):
        done = loopctl(*arguments, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
        assert (done.returncode, done.stdout) == (status, b"")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_no_file_takes_the_place_of_a_closed_stream(
    tmp_path: Path, closed: tuple[int, ...]
) -> None:
    """Closed streams: a command that loopctl runs would write to it."""
    program = (
        "import os, sys\n"
        "from loopd.cli import stream\n"
        f"for number in {closed}: os.close(number)\n"
        "stream.provide_streams()\n"
        f"fd = os.open({str(tmp_path / 'told')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "links = [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]\n"
        "inherited = [os.get_inheritable(number) for number in range(3)]\n"
        "os.write(fd, repr((fd > 2, links, inherited)).encode())\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=True)
    behind, links, inherited = ast.literal_eval((tmp_path / "told").read_text())
    assert behind is True
    assert all(links[number] == "/dev/null" for number in closed)
    assert inherited == [True] * 3


def test_ctrl_c_is_told_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(app._COMMANDS, "list", interrupt)
    assert app.main(["list"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


def test_letters_that_the_locale_does_not_have_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(*_: object) -> int:
        print("größe")
        return 0

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setitem(app._COMMANDS, "list", show)
    assert app.main(["list"]) == 0
    assert written.getvalue() == b"gr\\xf6\\xdfe\n"


def test_a_signal_that_was_ignored_at_the_start_stays_so() -> None:
    async def look() -> list[object]:
        with Signals():
            return [signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hangup, termination = run_async(look())
        assert hangup is signal.SIG_IGN
        assert termination is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_does_not_wait() -> None:
    async def signalled() -> object:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                await signals.unless(asyncio.sleep(60))
            return signal.getsignal(signal.SIGTERM)

    assert run_async(signalled()) is signal.SIG_DFL
