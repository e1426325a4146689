# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads the command line of loopctl.

Each command declares its options in its own module, beside its action. Nothing is opened here.
"""

import argparse
from collections.abc import Sequence

from loopd import __version__

from . import attach, detach, hold, losetup, monitor, rescan, resize, run, show
from . import list as list_
from . import open as open_
from . import set as set_
from .options import Parser
from .outcome import MEANINGS, SIGNALLED
from .values import node_of

_COMMANDS = (attach, hold, detach, resize, rescan, list_, show, set_, open_, monitor, run)
_WITH_COMMAND = ("run", "open")
_WITHOUT_COMMAND = ("-h", "--help", "-V", "--version")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises SystemExit for --help, --version and wrong usage, after reporting it.
    """
    given = list(arguments)
    command: list[str] | None = None
    # argparse would read the options of the command to run as options of loopctl.
    if given[:1] and given[0] in _WITH_COMMAND and "--" in given:
        split = given.index("--")
        given, command = given[:split], given[split + 1 :]
    # As in losetup, the value of --direct-io follows an equals sign. argparse would also take the
    # next argument.
    end = given.index("--") if "--" in given else len(given)
    given[:end] = ["--direct-io=on" if each == "--direct-io" else each for each in given[:end]]
    loopctl = parser()
    if given and _is_losetups(given[0]):
        try:
            given = losetup.translated(given, loopctl.commands)
        except losetup.Refused as exc:
            loopctl.error(str(exc))
    found = loopctl.parse_args(given)
    if found.command in _WITH_COMMAND:
        found.run = command
    if problem := found.problem(found):
        found.parser.error(problem)
    return found


def _is_losetups(first: str) -> bool:
    """Whether a command line begins like one of losetup: with an option or a device."""
    return (first.startswith("-") and first not in _WITHOUT_COMMAND) or node_of(first) is not None


def parser() -> Parser:
    """All commands and their options."""
    loopctl = Parser(
        prog="loopctl",
        description="Attach files to loop devices, as an ordinary user, through loopd.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    loopctl.add_argument("-V", "--version", action="version", version=f"loopctl {__version__}")
    commands = loopctl.add_subparsers(dest="command", metavar="COMMAND", required=True)
    loopctl.commands = commands.choices
    for command in _COMMANDS:
        command.add(commands)
    return loopctl


def _epilog() -> str:
    codes = "\n".join(f"  {code:3}  {meaning}" for code, meaning in MEANINGS.items())
    return (
        f"exit status:\n{codes}\n  {SIGNALLED}+N  ended by signal N\n"
        "'run' and 'open' end with the exit status of their command: see their --help.\n\n"
        "Sizes are in bytes, or have a suffix: K, M, G (of 1024, as KiB), or KB, MB, GB\n(of 1000)."
    )
