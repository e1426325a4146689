# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages say what the programs take: each option, exit status and setting."""

import argparse
import re
import subprocess
import tomllib
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from loopd import config, daemon
from loopd.cli import arguments
from loopd.cli.outcome import MEANINGS
from tests.harness.area import CHECKOUT

LOOPCTL = CHECKOUT / "docs" / "loopctl.1"
LOOPD = CHECKOUT / "docs" / "loopd.8"


@cache
def rendered(page: Path) -> str:
    """A page as it is read, in lines so long that none is broken."""
    done = subprocess.run(
        ["groff", "-ww", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=1000n", page],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout


def section(page: Path, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)^\S", rendered(page), re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text, re.IGNORECASE))


def parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser and those of its commands."""
    found = {"": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


@pytest.mark.parametrize(
    ("page", "parser"), [(LOOPCTL, arguments.parser()), (LOOPD, daemon._parser())]
)
def test_all_options_are_told_and_no_others(page: Path, parser: argparse.ArgumentParser) -> None:
    taken = {
        option
        for each in parsers(parser).values()
        for action in each._actions
        for option in action.option_strings
    }
    text, _, _ = rendered(page).partition("\nEXAMPLES\n")
    assert options(text) == taken


def test_all_commands_of_loopctl_are_told() -> None:
    commands = {name for name in parsers(arguments.parser()) if name}
    assert set(re.findall(r"^ +loopctl ([a-z]+)", section(LOOPCTL, "SYNOPSIS"), re.M)) == commands
    assert (
        set(re.findall(r"^     ([a-z]+)(?: |$)", section(LOOPCTL, "DESCRIPTION"), re.M)) >= commands
    )


def test_all_exit_statuses_of_loopctl_are_told() -> None:
    told = dict(re.findall(r"^ +(\d) +(.*)$", section(LOOPCTL, "EXIT STATUS"), re.MULTILINE))
    assert told == {str(int(code)): meaning for code, meaning in MEANINGS.items()}


def test_all_settings_are_told_with_their_defaults() -> None:
    lines = re.findall(r"^ +(\[\w+\]|\w+ = .*)$", section(LOOPD, "FILES"), re.MULTILINE)
    told = tomllib.loads("\n".join(lines))
    defaults = asdict(config.Config())
    defaults["trusted_filesystems"] = list(config.Config().trusted_filesystems)
    assert told == defaults
