# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl set`."""

import argparse

from loopd.client import Client, Device
from loopd.client.image import name_file

from . import notices, output
from .connection import find_disk, run_connected
from .options import Commands, add_command, add_direct_io, add_target
from .outcome import ExitCode
from .stream import say
from .values import node_of, parse_size

_SETTINGS = ("direct_io", "loop_ref", "sector_size", "lifetime", "autoclear")


def add(commands: Commands) -> None:
    """Declare the command."""
    change = add_command(
        commands,
        "set",
        run,
        "change the settings of a device, or its lifetime",
        problem=_problem,
    )
    add_target(change)
    add_direct_io(change, "on: bypass the page cache of the file; off: use it")
    change.add_argument(
        "--loop-ref", metavar="NAME", help="another name, which must be free; '' removes the name"
    )
    change.add_argument(
        "-b",
        "--sector-size",
        type=parse_size,
        metavar="SIZE",
        help="the sector size of a device that is not in use; 0 takes that of the partition table",
    )
    change.add_argument(
        "--lifetime",
        choices=("user", "system"),
        help="user: until its owner has logged out; system: until somebody detaches it",
    )
    change.add_argument(
        "--autoclear",
        choices=("on", "off"),
        help="on: the kernel detaches the device at its last close; for devices of the lifetime "
        "system, and for devices that loopd did not attach",
    )


def _problem(found: argparse.Namespace) -> str | None:
    if all(getattr(found, name) is None for name in _SETTINGS):
        return "nothing is to be set: give --direct-io, --loop-ref or another option"
    return None


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    return run_connected(_set, found, asking=True)


async def _set(found: argparse.Namespace, client: Client) -> int:
    device = await find_disk(client, found.target)
    if found.sector_size is not None:
        await device.set_sector_size(found.sector_size)
    if found.direct_io is not None:
        wanted = found.direct_io == "on"
        if await device.set_direct_io(wanted) is not wanted:
            await _tell_why_buffered(found.target, device)
    if found.loop_ref is not None:
        await device.set_reference(found.loop_ref)
    if found.lifetime is not None:
        await device.set_lifetime(found.lifetime)
    if found.autoclear is not None:  # after --lifetime, which decides whether it is allowed
        await device.set_autoclear(found.autoclear == "on")
    if found.json:
        print(output.as_json(output.properties_for_json(device.path, await device.properties())))
    return ExitCode.OK


async def _tell_why_buffered(target: str, device: Device) -> None:
    properties = await device.properties()
    if node_of(target):
        say(notices.without_direct_io(properties, None))
        return
    with name_file(target) as file:
        say(notices.without_direct_io(properties, file))
