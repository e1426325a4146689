# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `attach`, `hold` and `run` share: their options, opening the file, attaching it.

A filesystem may hang, and Ctrl-C must end loopctl then. So loopctl opens files before it handles
signals, and gives up every later wait when a signal comes.
"""

import argparse
import os

from loopd.client import Client, Device, Lifetime
from loopd.client.image import open_file
from loopd.client.properties import Properties
from loopd.fd import OwnedFd

from . import output
from .agent import agent
from .options import add_allow_overlap, add_direct_io, add_range, add_settle
from .progress import ProgressBar
from .readiness import settle
from .values import parse_number, parse_size

# Seconds that another program gets to let go of its lease. A file server asks its client first.
_LEASE_WAIT = 10.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare FILE and the options of all commands that attach it."""
    parser.add_argument("file", metavar="FILE", help="loopctl opens the file with your own rights")
    parser.add_argument(
        "-r",
        "--read-only",
        action="store_true",
        help="make the device read-only (default: only if you may not write to the file)",
    )
    add_range(parser)
    parser.add_argument(
        "-b",
        "--sector-size",
        type=parse_size,
        metavar="SIZE",
        help="the device's sector size (default: 512, or that of a block device); 0 takes that of "
        "the partition table",
    )
    parser.add_argument(
        "-P", "--partscan", action="store_true", help="make devices for the partitions, too"
    )
    add_direct_io(parser, "on: bypass the page cache of the file (default: as loopd.toml says)")
    parser.add_argument("--loop-ref", metavar="NAME", help="a name of your choice for the device")
    parser.add_argument(
        "--lock",
        choices=("shared", "exclusive"),
        help="keep udev and other programs off the device by a BSD lock, taken before it appears",
    )
    parser.add_argument(
        "--number",
        type=parse_number,
        metavar="N",
        help="attach /dev/loopN and no other; takes the right to manage other users' devices",
    )
    add_allow_overlap(parser)
    parser.add_argument(
        "-L",
        "--nooverlap",
        dest="allow_overlap",
        action="store_false",
        default=argparse.SUPPRESS,
        help="fail if another device has the same part of the file (default)",
    )
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="attach a copy in memory; writes are lost with the device",
    )
    add_settle(parser)


def open_file_of(found: argparse.Namespace) -> OwnedFd:
    """Open FILE with the rights of the caller."""
    if found.in_memory:
        return open_file(found.file, read_only=True, direct_io=False, lease_wait=_LEASE_WAIT)
    return open_file(
        found.file,
        read_only=found.read_only or None,
        direct_io=False if (found.offset or 0) % 512 else _direct_io(found),
        lease_wait=_LEASE_WAIT,
    )


def _direct_io(found: argparse.Namespace) -> bool | None:
    return None if found.direct_io is None else found.direct_io == "on"


async def attached(
    client: Client, found: argparse.Namespace, file: OwnedFd, lifetime: Lifetime | None = None
) -> tuple[Device, Properties]:
    """Attach the file, and wait until the device can be used."""
    async with agent(wanted=found.interactive):
        with ProgressBar(f"copying {output.name(os.path.basename(found.file))}") as progress:
            device = await client.attach(
                file,
                read_only=found.read_only or None,
                offset=found.offset,
                size_limit=found.sizelimit,
                sector_size=found.sector_size,
                partition_scan=found.partscan or None,
                direct_io=_direct_io(found),
                reference=found.loop_ref,
                lock=found.lock,
                lifetime=lifetime,
                allow_overlap=found.allow_overlap or None,
                number=found.number,
                in_memory=found.in_memory,
                progress=progress,
            )
        try:
            await settle(found, device)
            return device, await device.properties()
        except BaseException:
            # The caller has not got its node, so it would stay.
            await device.ensure_detached()
            raise


def announce(
    found: argparse.Namespace, device: Device, properties: Properties, *, only_json: bool = False
) -> None:
    """Print the device, and flush: the program that started loopctl waits for this."""
    if found.json:
        value = {
            "object": device.path,
            "node": device.node,
            "diskseq": device.diskseq,
            **output.partitions_for_json(properties),
        }
        print(output.as_json(value), flush=True)
    elif not only_json:
        print(device.node, flush=True)


def description_of(found: argparse.Namespace, device: Properties) -> str:
    """The device and its file in one phrase."""
    mode = "read-only" if device.read_only else "read-write"
    copy = "a copy of " if found.in_memory else ""
    text = f"{device.node} is {copy}{output.name(found.file)} ({output.size(device.size)}, {mode})"
    if device.partitions:
        text += f", with {', '.join(each.node for each in device.partitions)},"
    return text
