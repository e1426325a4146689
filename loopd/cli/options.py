# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a command of loopctl declares its options, and the options that several commands share.

An option has losetup's spelling where losetup has an option for the same thing.
"""

import argparse
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeAlias

from . import losetup
from .outcome import SIGNALLED, ExitCode, RunExitCode
from .values import parse_size

TARGET_HELP = "/dev/loop3 or loop3, or the attached file (write ./loop3 for a file of that name)"
OR_PARTITION = "; /dev/loop3p1 means that partition alone"
ENDS_AS_COMMAND = (
    "loopctl passes SIGINT, SIGTERM, SIGHUP and SIGQUIT on to the command. The exit status is the "
    f"command's, {SIGNALLED}+N if signal N ended it, {RunExitCode.FAILED} if loopctl failed, "
    f"{RunExitCode.CANNOT_EXECUTE} if the command cannot be executed, {RunExitCode.NOT_FOUND} if "
    "it is not found."
)

_FOR_NOTHING: dict[str, Any] = {
    "action": "store_true",
    "default": argparse.SUPPRESS,
    "help": argparse.SUPPRESS,
}


class Parser(argparse.ArgumentParser):
    """Tells mistakes in loopctl's way and ends with the command's own exit code."""

    usage_code: int = ExitCode.USAGE
    commands: Collection[str] = ()

    def error(self, message: str) -> NoReturn:
        self.exit(self.usage_code, f"loopctl: {message}; '{self.prog} --help' tells more\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # noqa: SLF001 - it has no public name


def _no_problem(_: argparse.Namespace) -> str | None:
    return None


def add_command(
    commands: Commands,
    name: str,
    action: Callable[[argparse.Namespace], int],
    summary: str,
    description: str = "",
    *,
    problem: Callable[[argparse.Namespace], str | None] = _no_problem,
) -> Parser:
    """Declare a command with the options that all commands have.

    `action` runs it and returns the exit status. `problem` says why options that are right one by
    one cannot be given together.
    """
    made = commands.add_parser(
        name,
        help=summary,
        description=description or summary[0].upper() + summary[1:] + ".",
        allow_abbrev=False,
    )
    made.set_defaults(parser=made, action=action, problem=problem)
    made.add_argument("-J", "--json", action="store_true", help="print the result as JSON")
    made.add_argument(
        "--no-ask-password",
        dest="interactive",
        action="store_false",
        help="fail if a password is needed, and do not ask for it",
    )
    for option in losetup.DONE_ANYWAY.get(name, ()):
        made.add_argument(*option.split(), **_FOR_NOTHING)
    return made


def add_target(parser: argparse.ArgumentParser, *, or_partition: bool = False) -> None:
    """DEVICE-OR-FILE."""
    shown = TARGET_HELP + (OR_PARTITION if or_partition else "")
    parser.add_argument("target", metavar="DEVICE-OR-FILE", help=shown)


def add_settle(parser: argparse.ArgumentParser) -> None:
    """--no-settle."""
    parser.add_argument(
        "--no-settle",
        dest="settle",
        action="store_false",
        help="do not wait until udev is done with the device",
    )


def add_range(parser: argparse.ArgumentParser) -> None:
    """--offset and --sizelimit."""
    parser.add_argument(
        "-o",
        "--offset",
        type=parse_size,
        metavar="SIZE",
        help="where in the file the device starts",
    )
    parser.add_argument(
        "--sizelimit",
        type=parse_size,
        metavar="SIZE",
        help="the most bytes of the file that the device has; 0: up to the end of the file",
    )


def add_allow_overlap(parser: argparse.ArgumentParser) -> None:
    """--allow-overlap."""
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="go on if another device has the same part of the file",
    )


def add_direct_io(parser: argparse.ArgumentParser, summary: str) -> None:
    """--direct-io."""
    parser.add_argument(
        "--direct-io", nargs="?", choices=("on", "off"), metavar="on|off", help=summary
    )


def add_associated(parser: argparse.ArgumentParser) -> None:
    """--associated."""
    parser.add_argument(
        "-j", "--associated", metavar="FILE", help="only the devices that this file is attached to"
    )
