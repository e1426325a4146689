# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl open`: a command has the device open, and needs no right to the device's node."""

import argparse
import asyncio
import os

from loopd.errors import InvalidArgs
from loopd.fd import OwnedFd

from .agent import agent
from .child import run_command
from .connection import connect, find
from .options import ENDS_AS_COMMAND, Commands, add_command, add_settle, add_target
from .outcome import RunExitCode
from .readiness import settle
from .signals import Signals
from .values import parse_number


def add(commands: Commands) -> None:
    """Declare the command."""
    opening = add_command(
        commands,
        "open",
        run,
        "run a command that has the device open",
        "Run a command, by default a shell, that has the device open. You need no right to the "
        "device's node. $LOOPFD is the number of the file descriptor, as in "
        "sh -c 'sha256sum <&$LOOPFD'. loopctl replaces every {} in the arguments by /dev/fd/ and "
        "that number; most programs open such a path anew, which does take the right to open the "
        "node. A device that is detached meanwhile goes when the command ends. A read-only device "
        "takes an administrator's password by default, because a program that has it open can put "
        "another file behind it. " + ENDS_AS_COMMAND,
        problem=_problem,
    )
    opening.usage_code = RunExitCode.FAILED
    opening.usage = "loopctl open [OPTION...] DEVICE-OR-FILE [-- COMMAND [ARGUMENT...]]"
    add_target(opening, or_partition=True)
    opening.add_argument("-w", "--read-write", action="store_true", help="open it for writing, too")
    opening.add_argument(
        "--partition", type=parse_number, metavar="N", help="open this partition, not the disk"
    )
    add_settle(opening)


def _problem(found: argparse.Namespace) -> str | None:
    return "the command to run is missing behind '--'" if found.run == [] else None


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    # The lowest number that is free: dash, for one, has redirections for a single digit only.
    with OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as slot:
        return asyncio.run(_open(found, slot))


async def _open(found: argparse.Namespace, slot: OwnedFd) -> int:
    number = slot.fileno()
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            device, partition = await signals.unless(find(client, found.target))
            if found.partition is not None:
                if partition is not None:
                    raise InvalidArgs(f"--partition: {found.target} is a partition already")
                partition = found.partition
            await signals.unless(settle(found, device))
            node = device.node if partition is None else f"{device.node}p{partition}"
            async with agent(wanted=found.interactive):
                opening = device.open("rw" if found.read_write else "r", partition=partition)
                opened = await signals.unless(opening)
            with opened:
                os.dup2(opened.fileno(), number, inheritable=False)
            command = found.run or [os.environ.get("SHELL") or "/bin/sh"]
            return await run_command(
                [argument.replace("{}", f"/dev/fd/{number}") for argument in command],
                device,
                signals,
                variables={"LOOPDEV": node, "LOOPFD": str(number)},
                fds=[number],
            )
