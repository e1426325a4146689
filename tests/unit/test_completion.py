# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion of loopctl's command line: what the shells offer, and what loopctl takes."""

import argparse
import os
import pty
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from loopd.cli.arguments import parser
from loopd.cli.columns import COLUMNS
from tests.harness.area import CHECKOUT
from tests.harness.deadline import Deadline
from tests.unit.test_manuals import parsers

DIRECTORY = CHECKOUT / "loopd" / "cli" / "completion"

# What a shell does at the second TAB: words as Bash splits them, with equals signs by themselves.
_ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_loopctl
[[ ${#COMPREPLY[@]} == 0 ]] || printf '%s\\n' "${COMPREPLY[@]}"
"""

COMMANDS = {name: each for name, each in parsers(parser()).items() if name}


def need(shell: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"not installed: {shell}")
    return shell


def bash(line: str, directory: Path) -> set[str]:
    """What bash offers for the last word of a line."""
    words = re.findall(r"[^\s=]+|=", line) + ([""] if line[-1] in " =" else [])
    done = subprocess.run(
        ["bash", "-c", _ASK_BASH, "bash", DIRECTORY / "loopctl.bash", *words],
        cwd=directory,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return set(done.stdout.splitlines())


def fish(line: str, directory: Path) -> set[str]:
    """What fish offers, with options as they would be typed."""
    script = f"source {DIRECTORY / 'loopctl.fish'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(
        [need("fish"), "--no-config", "-c", script],
        cwd=directory,
        check=True,
        env=os.environ | {"HOME": str(directory)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return {each.partition("\t")[0] for each in done.stdout.splitlines()}


Shell = Callable[[str, Path], set[str]]
both = pytest.mark.parametrize("shell", [bash, fish])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with two files, one of them with a name that is hard to quote."""
    (tmp_path / "disk.img").touch()
    (tmp_path / "my disk*.img").touch()
    return tmp_path


def options(each: argparse.ArgumentParser, *, long: bool = True) -> set[str]:
    """The options of a command, but for those that it takes for nothing."""
    strings = {
        option
        for action in each._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
    }
    return {option for option in strings if option.startswith("--") or not long}


@both
def test_commands_are_completed(shell: Shell, files: Path) -> None:
    assert shell("loopctl ", files) - {"--help", "--version"} == {*COMMANDS}
    assert shell("loopctl de", files) == {"detach"}


@both
@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_are_those_it_takes(
    shell: Shell, command: str, files: Path
) -> None:
    offered = {each.partition("=")[0] for each in shell(f"loopctl {command} --", files)}
    assert offered == options(COMMANDS[command])


def test_short_options_are_offered_too(files: Path) -> None:
    offered = bash("loopctl attach -", files)
    assert offered == options(COMMANDS["attach"], long=False)


@both
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("loopctl attach --lifetime=", {"connection", "user", "system"}),
        ("loopctl attach --lifetime ", {"connection", "user", "system"}),
        ("loopctl set --lifetime=s", {"system"}),
        ("loopctl hold --lock ", {"shared", "exclusive"}),
        ("loopctl set --autoclear ", {"on", "off"}),
        ("loopctl attach --direct-io=of", {"off"}),
        ("loopctl list -O SIZE,OWN", {"SIZE,OWNER"}),
        ("loopctl list -O +DI", {"+DIO", "+DISKSEQ"}),
        ("loopctl list -O ", {*COLUMNS}),
        ("loopctl list --offset ", set()),
        ("loopctl attach --offset ", set()),
    ],
)
def test_values_are_completed(shell: Shell, line: str, offered: set[str], files: Path) -> None:
    found = {each.removeprefix("--lifetime=") for each in shell(line, files)}
    assert {each.removeprefix("--direct-io=") for each in found} == offered


@both
@pytest.mark.parametrize(
    "line",
    ["attach ", "run -r ", "hold --offset 1M ", "detach ", "detach -j ", "list --associated "],
)
def test_files_are_completed(shell: Shell, line: str, files: Path) -> None:
    shown = {each.replace("\\", "") for each in shell(f"loopctl {line}", files)}
    assert {"disk.img", "my disk*.img"} <= shown
    shown = {each.replace("\\", "") for each in shell(f"loopctl {line}my", files)}
    assert shown == {"my disk*.img"}


@both
def test_the_command_to_run_is_completed_as_a_command(shell: Shell, files: Path) -> None:
    assert {each.rstrip() for each in shell("loopctl run disk.img -- sha256su", files)} == {
        "sha256sum"
    }
    assert "disk.img" not in shell("loopctl run disk.img -- dis", files)
    assert "disk.img" in shell("loopctl open loop3 -- cat ", files)
    assert "--read-only" not in shell("loopctl run disk.img -- cat --", files)


def typed(
    command: list[str], setup: str, line: str, wanted: str, environment: dict[str, str]
) -> str:
    """Type into an interactive shell, and wait for what it makes of it; returns what it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environment)  # noqa: S606 - it is a shell
    try:
        deadline = Deadline()
        for text, pattern in ((f"{setup}; echo rea''dy\n", "ready"), (line, wanted)):
            os.write(terminal, text.encode())
            seen = b""
            while not re.search(pattern, re.sub(r".\x08", "", seen.decode(errors="replace"))):
                deadline.wait_readable([terminal], f"{pattern} after {seen!r}")
                seen += os.read(terminal, 65536)
        return seen.decode(errors="replace")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


HOSTILE = ("a\n_etc_passwd", "b\x1b]0;forged\x07")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory with names that a terminal would obey, and one that comes after them."""
    for name in (*HOSTILE, "z.img"):
        (tmp_path / name).touch()
    return tmp_path


def test_no_line_of_a_name_is_a_candidate_in_bash(hostile: Path) -> None:
    """Names in a terminal."""
    assert bash("loopctl attach ", hostile) == {HOSTILE[1], "z.img"}


def test_bash_shows_no_name_as_it_is(hostile: Path) -> None:
    setup = f"cd {hostile}; source {DIRECTORY / 'loopctl.bash'}"
    seen = typed(
        ["bash", "--norc", "-i"], setup, "loopctl attach \t\t", r"z\.img", environment_of(hostile)
    )
    require_harmless(seen)


def test_zsh_shows_no_name_as_it_is(hostile: Path) -> None:
    """Names in a terminal."""
    functions = hostile / ".functions"
    functions.mkdir()
    shutil.copy(DIRECTORY / "loopctl.zsh", functions / "_loopctl")
    setup = f"cd {hostile}; fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -D"
    zsh = [need("zsh"), "-f", "-i"]
    require_harmless(typed(zsh, setup, "loopctl attach \t\t", r"z\.img", environment_of(hostile)))


def test_fish_shows_no_name_as_it_is(hostile: Path) -> None:
    """Names in a terminal."""
    setup = f"cd {hostile}; source {DIRECTORY / 'loopctl.fish'}"
    command = [need("fish"), "--no-config", "-i"]
    environment = environment_of(hostile) | {"TERM": "xterm"}
    require_harmless(typed(command, setup, "loopctl attach \t\t", r"z\.img", environment))


def environment_of(directory: Path) -> dict[str, str]:
    """Of an interactive shell that reads no settings."""
    return os.environ | {
        "PS1": "$ ",
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
        "INPUTRC": os.devnull,
        "HOME": str(directory),
        "ZDOTDIR": str(directory),
    }


def require_harmless(seen: str) -> None:
    """A shell wrote a hostile name, and not the sequence in it that a terminal obeys."""
    assert "forged" in seen
    assert "\x1b]0;forged" not in seen


def test_bash_completes_what_is_typed(files: Path) -> None:
    environment = os.environ | {"PS1": "$ ", "TERM": "dumb", "INPUTRC": os.devnull}
    setup = f"cd {files}; source {DIRECTORY / 'loopctl.bash'}"
    line = "loopctl att\t--lifet\t=us\tmy\t"
    wanted = r"loopctl attach --lifetime=user my\\ disk\\\*\.img "
    typed(
        ["bash", "--norc", "-i"],
        setup,
        line,
        re.sub(" --lifetime=", " --lifetime ?=", wanted),
        environment,
    )


def test_zsh_completes_what_is_typed(files: Path) -> None:
    shutil.copy(DIRECTORY / "loopctl.zsh", files / "_loopctl")
    environment = os.environ | {"TERM": "dumb", "HOME": str(files), "ZDOTDIR": str(files)}
    setup = f"cd {files}; fpath=({files} $fpath); autoload -Uz compinit; compinit -u -D"
    line = "loopctl att\t--lifet\tus\tmy\t"
    wanted = r"loopctl attach --lifetime=user my\\ disk\\\*\.img "
    typed([need("zsh"), "-f", "-i"], setup, line, wanted, environment)


def test_zsh_is_offered_what_loopctl_takes() -> None:
    text = (DIRECTORY / "loopctl.zsh").read_text()
    offered = set(re.findall(r"(?<=[\s',{(])--[a-z-]+(?=[=}\[ )]|$)", text, re.MULTILINE))
    offered = {each.rstrip("-") for each in offered}
    assert offered == set().union({"--version"}, *map(options, COMMANDS.values()))
    assert set(re.findall(r"^ +([a-z]+)\\:", text, re.MULTILINE)) == {*COMMANDS}
    assert {*COLUMNS} <= set(text.replace("\\", "").replace("'", " ").split())
