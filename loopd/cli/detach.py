# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl detach`."""

import argparse

from loopd.client import Client, Device
from loopd.errors import LoopError

from . import output
from .connection import associated, find_disk, run_connected
from .options import TARGET_HELP, Commands, add_associated, add_command
from .outcome import ExitCode, about, exit_code
from .stream import complain, say


def add(commands: Commands) -> None:
    """Declare the command."""
    detach = add_command(commands, "detach", run, "detach devices", problem=_problem)
    detach.usage = (
        "loopctl detach [OPTION...] DEVICE-OR-FILE...\n"
        "       loopctl detach [OPTION...] --all | --associated FILE"
    )
    detach.add_argument("targets", nargs="*", metavar="DEVICE-OR-FILE", help=TARGET_HELP)
    detach.add_argument("--all", action="store_true", help="all devices that are yours")
    add_associated(detach)
    detach.add_argument(
        "--lazy",
        action="store_true",
        help="also detach a device that is mounted; it goes when its last user closes it",
    )


def _problem(found: argparse.Namespace) -> str | None:
    if sum([bool(found.targets), found.all, found.associated is not None]) != 1:
        return "name devices or files, or give --all, or --associated FILE"
    return None


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    return run_connected(_detach, found, asking=True)


async def _detach(found: argparse.Namespace, client: Client) -> int:
    status, results = ExitCode.OK, []
    for target in found.targets or await _chosen(found, client):
        try:
            device = await find_disk(client, target) if isinstance(target, str) else target
            gone = await device.detach(lazy=found.lazy)
        except (LoopError, OSError) as exc:
            complain(about(target if isinstance(target, str) else target.node, exc))
            status = status or exit_code(exc)
            continue
        results.append({"object": device.path, "node": device.node, "gone": gone})
        if not gone:
            say(output.farewell(device.node, gone=False))
    if found.json:
        print(output.as_json({"devices": results}))
    return status


async def _chosen(found: argparse.Namespace, client: Client) -> list[Device]:
    """The devices of --all or --associated, newest first: a newer device may use an older one."""
    if found.all:
        uid = await client.uid()
        devices = [device for device, told in await client.devices() if told.owner == uid]
    else:
        devices = [device for device, _ in await associated(client, found.associated)]
    return sorted(devices, key=lambda each: -each.diskseq)
