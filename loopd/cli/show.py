# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl show`."""

import argparse
import sys

from loopd.client import Client

from . import output
from .connection import find, find_partition, run_connected
from .options import Commands, add_command, add_target
from .outcome import ExitCode
from .style import Style


def add(commands: Commands) -> None:
    """Declare the command."""
    show = add_command(commands, "show", run, "show all properties of a device")
    add_target(show, or_partition=True)


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    return run_connected(_show, found)


async def _show(found: argparse.Namespace, client: Client) -> int:
    device, number = await find(client, found.target)
    label = Style(sys.stdout).bold
    if number is not None:
        partition = await find_partition(device, number)
        if found.json:
            value = {"object": device.path, "disk": device.node, **partition._asdict()}
            print(output.as_json(value))
            return ExitCode.OK
        lines = output.partition(partition, device.node, label)
    else:
        properties = await device.properties()
        if found.json:
            print(output.as_json(output.properties_for_json(device.path, properties)))
            return ExitCode.OK
        lines = output.properties(properties, label)
    for line in lines:
        print(line)
    return ExitCode.OK
