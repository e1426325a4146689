# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arguments of loopctl: which there are, and how they are spelled.

Where losetup has an option for the same thing, its spelling is taken. Nothing is opened here.
"""

import argparse
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from loopd import __version__

from . import losetup
from .columns import COLUMNS, DEFAULT
from .outcome import MEANINGS, SIGNALLED, ExitCode, RunExitCode
from .values import node_of, parse_number, parse_size

_TARGET_HELP = "/dev/loop3 or loop3, else an attached file (./loop3, if it is called so)"
_OR_PARTITION = "; /dev/loop3p1 is that partition alone"
_WITH_COMMAND = ("run", "open")
_WITHOUT_COMMAND = ("-h", "--help", "-V", "--version")
_ENDS_AS_COMMAND = (
    "SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to it. The exit status is the command's, "
    f"{SIGNALLED}+N if signal N ended it, {RunExitCode.FAILED} if loopctl failed, "
    f"{RunExitCode.CANNOT_EXECUTE} if the command cannot be executed, {RunExitCode.NOT_FOUND} if "
    "it is not found."
)

_FOR_NOTHING: dict[str, Any] = {
    "action": "store_true",
    "default": argparse.SUPPRESS,
    "help": argparse.SUPPRESS,
}

SETTINGS = ("direct_io", "loop_ref", "sector_size", "lifetime", "autoclear")
"""What `set` can change, by the names that its options have once they are read."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises SystemExit for --help, --version and wrong usage, which it has reported then.
    """
    given = list(arguments)
    command: list[str] | None = None
    # argparse would take options of the command to run for ours.
    if given[:1] and given[0] in _WITH_COMMAND and "--" in given:
        split = given.index("--")
        given, command = given[:split], given[split + 1 :]
    # The value of --direct-io follows an equals sign only, as in losetup: not so in argparse.
    end = given.index("--") if "--" in given else len(given)
    given[:end] = ["--direct-io=on" if each == "--direct-io" else each for each in given[:end]]
    loopctl = parser()
    if given and _is_losetups(given[0]):
        try:
            given = losetup.translated(given, loopctl.commands)
        except losetup.Refused as exc:
            loopctl.error(str(exc))
    found = loopctl.parse_args(given)
    if problem := _problem(found, command):
        found.parser.error(problem)
    if found.command in _WITH_COMMAND:
        found.run = command
    return found


def _is_losetups(first: str) -> bool:
    """Whether a command line begins as losetup's do: with an option or a device."""
    return (first.startswith("-") and first not in _WITHOUT_COMMAND) or node_of(first) is not None


def _problem(found: argparse.Namespace, command: list[str] | None) -> str | None:
    """What is wrong with arguments of which each by itself is right."""
    if found.command == "run" and not command:
        return "the command to run is missing: put it behind '--'"
    if found.command == "open" and command == []:
        return "the command to run is missing behind '--'"
    if found.command == "attach" and found.lock and found.lifetime != "connection":
        return "a lock ends with loopctl: take 'loopctl hold', or --lifetime connection"
    if found.command == "detach":
        ways = [bool(found.targets), found.all, found.associated is not None]
        if sum(ways) != 1:
            return "name devices or files, or give --all, or --associated FILE"
    if found.command == "list" and found.associated is None and found.offset is not None:
        return "the offset is of a device that has a file: give --associated FILE"
    if found.command == "list" and found.associated is not None and found.target is not None:
        return "name a device, or give --associated FILE"
    if found.command == "set" and all(getattr(found, name) is None for name in SETTINGS):
        return "nothing is to be set: give --direct-io, --loop-ref or another option"
    return None


def parse_columns(text: str) -> tuple[str, ...]:
    """Names of columns, as losetup takes them; with a plus sign, beside those that are usual."""
    usual = DEFAULT if text.startswith("+") else ()
    names = [name.strip().upper() for name in text.removeprefix("+").split(",")]
    for name in names:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(
                f"there is no column {name!r}: there are {', '.join(COLUMNS)}"
            )
    return (*usual, *names)


class _Parser(argparse.ArgumentParser):
    """One whose mistakes are told in loopctl's way and end with the command's own exit code."""

    usage_code: int = ExitCode.USAGE
    commands: Collection[str] = ()

    def error(self, message: str) -> NoReturn:
        self.exit(self.usage_code, f"loopctl: {message}; '{self.prog} --help' tells more\n")


def parser() -> _Parser:
    """All commands and their options."""
    parser = _Parser(
        prog="loopctl",
        description="Attach files to loop devices, as an ordinary user, through loopd.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"loopctl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.commands = commands.choices

    def command(name: str, summary: str, description: str = "") -> _Parser:
        made: _Parser = commands.add_parser(
            name,
            help=summary,
            description=description or summary[0].upper() + summary[1:] + ".",
            allow_abbrev=False,
        )
        made.set_defaults(parser=made)
        made.add_argument("-J", "--json", action="store_true", help="tell the result as JSON")
        made.add_argument(
            "--no-ask-password",
            dest="interactive",
            action="store_false",
            help="never have anybody asked for a password",
        )
        for option in losetup.DONE_ANYWAY.get(name, ()):
            made.add_argument(*option.split(), **_FOR_NOTHING)
        return made

    attach = command(
        "attach",
        "attach a file",
        "Attach a file, print the device's node, and return. The device stays until its user has "
        "logged out, or, if that is root, until somebody detaches it.",
    )
    _add_attach_options(attach)
    attach.add_argument(
        "--lifetime",
        choices=("connection", "user", "system"),
        help="user: until you have logged out, which is what users get who are not root; system: "
        "until somebody detaches it, which is what root gets and takes others an administrator's "
        "yes; connection: until loopctl is stopped, as 'loopctl hold' does",
    )

    hold = command(
        "hold",
        "attach a file, and stay until stopped or until the device is gone",
        "Attach a file, print the device's node, and stay: the device is detached when loopctl "
        "ends, by Ctrl-C, SIGTERM or in whatever way. The exit status is "
        f"{ExitCode.OK} if loopctl was stopped, {ExitCode.NO_DEVICE} if somebody detached the "
        f"device, {ExitCode.UNAVAILABLE} if it went with loopd or with the bus. systemd is told "
        "when the device is there and udev has made its links: this is what loop-attach@.service "
        "runs.",
    )
    _add_attach_options(hold)
    hold.add_argument(
        "--default-loop-ref",
        metavar="NAME",
        help="the name of the device if --loop-ref gives none; none if it is too long",
    )

    detach = command("detach", "detach devices")
    detach.usage = (
        "loopctl detach [OPTION...] DEVICE-OR-FILE...\n"
        "       loopctl detach [OPTION...] --all | --associated FILE"
    )
    detach.add_argument("targets", nargs="*", metavar="DEVICE-OR-FILE", help=_TARGET_HELP)
    detach.add_argument("--all", action="store_true", help="all that are yours")
    _add_associated(detach)
    detach.add_argument(
        "--lazy", action="store_true", help="also what is mounted: it goes with its last user"
    )

    resize = command("resize", "take up the new size of a file, or set offset and limit")
    resize.add_argument("target", metavar="DEVICE-OR-FILE", help=_TARGET_HELP + _OR_PARTITION)
    _add_range(resize)
    resize.add_argument("--force", action="store_true", help="shrink it even while it is in use")
    _add_allow_overlap(resize)

    rescan = command(
        "rescan",
        "bring the partitions in step with the partition table",
        "Bring the devices of the partitions in step with the partition table, and print their "
        "nodes. One that is in use can grow, and neither go nor move nor shrink.",
    )
    rescan.add_argument("target", metavar="DEVICE-OR-FILE", help=_TARGET_HELP)
    _add_settle(rescan)

    listing = command(
        "list",
        "list all loop devices of the machine, or one",
        "List all loop devices of the machine, also those that others have attached, or one.",
    )
    listing.add_argument("target", nargs="?", metavar="DEVICE-OR-FILE", help=_TARGET_HELP)
    _add_associated(listing)
    listing.add_argument(
        "-o",
        "--offset",
        type=parse_size,
        metavar="SIZE",
        help="of those that have the file, the ones that start there",
    )
    listing.add_argument(
        "-O",
        "--output",
        type=parse_columns,
        metavar="COLUMNS",
        help="which, separated by commas; after a plus sign, beside the usual ones",
    )
    listing.formatter_class = argparse.RawDescriptionHelpFormatter
    names = f"The columns are {', '.join(COLUMNS)}."
    listing.epilog = textwrap.fill(names, 80, break_on_hyphens=False)
    listing.add_argument("--output-all", action="store_true", help="all columns")
    listing.add_argument("-n", "--noheadings", action="store_true", help="no line of headings")
    listing.add_argument(
        "--bytes", action="store_true", help="sizes in bytes, as they always are in a pipe"
    )
    listing.add_argument(
        "--raw", action="store_true", help="one space between columns, and \\x20 for any other"
    )

    show = command("show", "tell all about a device")
    show.add_argument("target", metavar="DEVICE-OR-FILE", help=_TARGET_HELP + _OR_PARTITION)

    change = command("set", "change how a device is, or for how long it stays")
    change.add_argument("target", metavar="DEVICE-OR-FILE", help=_TARGET_HELP)
    _add_direct_io(change, "go past the page cache of the file, or not")
    change.add_argument("--loop-ref", metavar="NAME", help="another free name; '' is none")
    change.add_argument(
        "-b",
        "--sector-size",
        type=parse_size,
        metavar="SIZE",
        help="of a device that is not in use; 0 is as the partition table says",
    )
    change.add_argument(
        "--lifetime",
        choices=("user", "system"),
        help="until its owner has logged out, or until somebody detaches it",
    )
    change.add_argument(
        "--autoclear",
        choices=("on", "off"),
        help="have the kernel detach it at its last close, or not; for devices of the lifetime "
        "system, and for those that loopd did not attach",
    )

    opening = command(
        "open",
        "run a command that has the device open",
        "Run a command, or a shell without one, that has the device open, for which no right to "
        "the device's node is needed. $LOOPFD is the number of the file descriptor, as in "
        "sh -c 'sha256sum <&$LOOPFD', and every {} in the arguments becomes /dev/fd/ and that "
        "number, which most programs open anew, and so only where they may open the node. A device "
        "that is detached meanwhile goes when the command ends. A read-only device takes an "
        "administrator's password by default, since who has it open can put another file behind "
        "it. " + _ENDS_AS_COMMAND,
    )
    opening.usage_code = RunExitCode.FAILED
    opening.usage = "loopctl open [OPTION...] DEVICE-OR-FILE [-- COMMAND [ARGUMENT...]]"
    opening.add_argument("target", metavar="DEVICE-OR-FILE", help=_TARGET_HELP + _OR_PARTITION)
    opening.add_argument("-w", "--read-write", action="store_true", help="open it for writing, too")
    opening.add_argument(
        "--partition", type=parse_number, metavar="N", help="this partition, not the whole"
    )
    _add_settle(opening)

    command(
        "monitor",
        "tell of devices as they come, change and go",
        "Tell of devices as they come, change and go, until stopped: for people, or with --json "
        "as one object a line.",
    )

    run = command(
        "run",
        "attach a file for as long as a command runs",
        "Attach a file, run the command, detach. The command finds the device's node in $LOOPDEV, "
        "and in place of every {} in its arguments. It inherits an fd, which keeps the device as "
        "long as it or what it has started has that open, also if loopctl is killed. "
        + _ENDS_AS_COMMAND,
    )
    run.usage_code = RunExitCode.FAILED
    run.usage = "loopctl run [OPTION...] FILE -- COMMAND [ARGUMENT...]"
    _add_attach_options(run)
    return parser


def _add_attach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="opened with your own rights")
    parser.add_argument(
        "-r",
        "--read-only",
        action="store_true",
        help="take no writes (default: only if you may not write to the file)",
    )
    _add_range(parser)
    parser.add_argument(
        "-b",
        "--sector-size",
        type=parse_size,
        metavar="SIZE",
        help="of the device (default: 512, or that of a block device); 0 is as the partition table "
        "says",
    )
    parser.add_argument(
        "-P", "--partscan", action="store_true", help="make devices for the partitions, too"
    )
    _add_direct_io(parser, "go past the page cache of the file (default: as loopd is set up)")
    parser.add_argument("--loop-ref", metavar="NAME", help="a name of your choice for the device")
    parser.add_argument(
        "--lock",
        choices=("shared", "exclusive"),
        help="keep udev and others off the device, by a BSD lock that is there from the start",
    )
    parser.add_argument(
        "--number",
        type=parse_number,
        metavar="N",
        help="/dev/loopN and no other, which takes the right to manage the devices of others",
    )
    _add_allow_overlap(parser)
    parser.add_argument(
        "-L",
        "--nooverlap",
        dest="allow_overlap",
        action="store_false",
        default=argparse.SUPPRESS,
        help="not if another device has the same part of the file (default)",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="attach a copy in memory: what is written is lost with the device",
    )
    _add_settle(parser)


def _add_settle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-settle",
        dest="settle",
        action="store_false",
        help="do not wait until udev is done with the device",
    )


def _add_range(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--offset", type=parse_size, metavar="SIZE", help="where in the file it starts"
    )
    parser.add_argument(
        "--sizelimit", type=parse_size, metavar="SIZE", help="at most so much; 0 is to the end"
    )


def _add_allow_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="even if another device has the same part of the file",
    )


def _add_direct_io(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument(
        "--direct-io", nargs="?", choices=("on", "off"), metavar="on|off", help=summary
    )


def _add_associated(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-j", "--associated", metavar="FILE", help="the devices that have this file, and no others"
    )


def _epilog() -> str:
    codes = "\n".join(f"  {code:3}  {meaning}" for code, meaning in MEANINGS.items())
    return (
        f"exit status:\n{codes}\n  {SIGNALLED}+N  ended by signal N\n"
        "'run' and 'open' have their command's, and others for themselves: see their\n--help.\n\n"
        "Sizes are in bytes, or have a suffix: K, M, G (of 1024, as KiB), or KB, MB, GB\n(of 1000)."
    )
