# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl resize`."""

import argparse

from loopd.client import Client
from loopd.client.image import name_file

from . import output
from .connection import find, find_partition, run_connected
from .options import Commands, add_allow_overlap, add_command, add_range, add_target
from .outcome import ExitCode


def add(commands: Commands) -> None:
    """Declare the command."""
    resize = add_command(
        commands, "resize", run, "take up the new size of the file, or set offset and limit"
    )
    add_target(resize, or_partition=True)
    add_range(resize)
    resize.add_argument(
        "--force", action="store_true", help="shrink the device even while it is in use"
    )
    add_allow_overlap(resize)


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    return run_connected(_resize, found, asking=True)


async def _resize(found: argparse.Namespace, client: Client) -> int:
    device, partition = await find(client, found.target)
    if partition is None:
        node = device.node
        size = await device.resize(
            offset=found.offset,
            size_limit=found.sizelimit,
            force=found.force,
            allow_overlap=found.allow_overlap,
        )
    else:
        node = (await find_partition(device, partition)).node
        with name_file(node) as named:
            size = await client.resize_by_fd(
                named,
                offset=found.offset,
                size_limit=found.sizelimit,
                force=found.force,
                allow_overlap=found.allow_overlap,
            )
    if found.json:
        print(output.as_json({"object": device.path, "node": node, "size": size}))
    else:
        print(f"{node}: {output.exact_size(size)}")
    return ExitCode.OK
