# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl list`."""

import argparse
import sys
import textwrap

from loopd.client import Client
from loopd.client.properties import Properties

from . import columns, output
from .connection import associated, find_disk, run_connected
from .options import TARGET_HELP, Commands, add_associated, add_command
from .outcome import ExitCode
from .style import Style
from .values import parse_size


def add(commands: Commands) -> None:
    """Declare the command."""
    listing = add_command(
        commands,
        "list",
        run,
        "list all loop devices of the machine, or one",
        "List all loop devices of the machine, also those of other users, or one device.",
        problem=_problem,
    )
    listing.add_argument("target", nargs="?", metavar="DEVICE-OR-FILE", help=TARGET_HELP)
    add_associated(listing)
    listing.add_argument(
        "-o",
        "--offset",
        type=parse_size,
        metavar="SIZE",
        help="with --associated: only the devices that start there in the file",
    )
    listing.add_argument(
        "-O",
        "--output",
        type=_parse_columns,
        metavar="COLUMNS",
        help="the columns, separated by commas; a plus sign in front adds them to the usual ones",
    )
    listing.formatter_class = argparse.RawDescriptionHelpFormatter
    names = f"The columns are {', '.join(columns.COLUMNS)}."
    listing.epilog = textwrap.fill(names, 80, break_on_hyphens=False)
    listing.add_argument("--output-all", action="store_true", help="all columns")
    listing.add_argument("-n", "--noheadings", action="store_true", help="no line of headings")
    listing.add_argument(
        "--bytes", action="store_true", help="sizes in bytes, as they always are in a pipe"
    )
    listing.add_argument(
        "--raw",
        action="store_true",
        help="one space between columns, and \\x20 for a space in a value",
    )


def _problem(found: argparse.Namespace) -> str | None:
    if found.associated is None and found.offset is not None:
        return "--offset selects among the devices of a file: give --associated FILE"
    if found.associated is not None and found.target is not None:
        return "name a device, or give --associated FILE"
    return None


def _parse_columns(text: str) -> tuple[str, ...]:
    """Names of columns, as losetup takes them; a plus sign adds them to the usual ones."""
    usual = columns.DEFAULT if text.startswith("+") else ()
    names = [name.strip().upper() for name in text.removeprefix("+").split(",")]
    for name in names:
        if name not in columns.COLUMNS:
            raise argparse.ArgumentTypeError(
                f"there is no column {name!r}: there are {', '.join(columns.COLUMNS)}"
            )
    return (*usual, *names)


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    return run_connected(_list, found)


async def _wanted(found: argparse.Namespace, client: Client) -> list[Properties]:
    """The devices to list."""
    if found.target is not None:
        return [await (await find_disk(client, found.target)).properties()]
    if found.associated is None:
        return [told for _, told in await client.devices()]
    try:
        pairs = await associated(client, found.associated)
    except FileNotFoundError:
        return []  # as losetup has it: no device has a file that is not there
    return [told for _, told in pairs if found.offset in (None, told.offset)]


async def _list(found: argparse.Namespace, client: Client) -> int:
    devices = await _wanted(found, client)
    names = tuple(columns.COLUMNS) if found.output_all else found.output or columns.DEFAULT
    if found.json:
        shown = [columns.for_json(each, names) for each in devices]
        print(output.as_json({"loopdevices": shown}))
        return ExitCode.OK
    if not devices:
        return ExitCode.OK
    for line in _lines(found, devices, names):
        print(line)
    return ExitCode.OK


def _lines(
    found: argparse.Namespace, devices: list[Properties], names: tuple[str, ...]
) -> list[str]:
    """The table as it is printed."""
    style, headings = Style(sys.stdout), not found.noheadings
    in_bytes = found.bytes or found.raw or not style.on_terminal
    rows = columns.listed(devices, names, in_bytes=in_bytes, headings=headings)
    if found.raw:
        return columns.raw(rows)
    if not style.on_terminal:
        return ["\t".join(row) for row in rows]
    lines = columns.aligned(rows, names, style.width)
    for index, each in enumerate(devices, start=len(lines) - len(devices)):
        if each.state != "attached":
            lines[index] = style.yellow(lines[index])
    if headings:
        lines[0] = style.bold(lines[0])
    return lines
