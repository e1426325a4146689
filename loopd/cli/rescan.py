# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl rescan`."""

import argparse

from loopd.client import Client

from . import output
from .connection import find_disk, run_connected
from .options import Commands, add_command, add_settle, add_target
from .outcome import ExitCode
from .readiness import settle
from .stream import say


def add(commands: Commands) -> None:
    """Declare the command."""
    rescan = add_command(
        commands,
        "rescan",
        run,
        "bring the partitions in step with the partition table",
        "Bring the devices of the partitions in step with the partition table, and print their "
        "nodes. A partition that is in use can grow; loopd does not remove, move or shrink it.",
    )
    add_target(rescan)
    add_settle(rescan)


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    return run_connected(_rescan, found, asking=True)


async def _rescan(found: argparse.Namespace, client: Client) -> int:
    device = await find_disk(client, found.target)
    await device.rescan_partitions()
    await settle(found, device)
    properties = await device.properties()
    if found.json:
        value = {
            "object": device.path,
            "node": device.node,
            **output.partitions_for_json(properties),
        }
        print(output.as_json(value))
    else:
        for each in properties.partitions:
            print(each.node)
    if properties.missing_partitions:
        say(output.missing_partitions(properties))
    return ExitCode.OK
