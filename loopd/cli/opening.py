# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's `open`: a command that has a device open without any right to its node."""

import argparse
import asyncio
import os

from loopd.errors import InvalidArgs
from loopd.fd import OwnedFd

from .agent import agent
from .child import run_command
from .connection import connect, find
from .readiness import settle
from .signals import Signals


def open_device(found: argparse.Namespace) -> int:
    """`loopctl open`; returns its exit status."""
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
