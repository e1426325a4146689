# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl hold`: attaches a file and keeps the device while loopctl runs."""

import argparse
import asyncio
import os

from loopd.client.watch import Ended
from loopd.fd import OwnedFd
from loopd.loop.uapi import MAX_REFERENCE

from . import attachment, notices, output
from .child import why
from .connection import connect
from .options import Commands, add_command
from .outcome import ExitCode
from .readiness import tell_ready, tell_stopping
from .signals import Interrupted, Signals
from .stream import complain, say


def add(commands: Commands) -> None:
    """Declare the command."""
    hold = add_command(
        commands,
        "hold",
        run,
        "attach a file, and stay until stopped or until the device is gone",
        "Attach a file, print the device's node, and stay. The device is detached when loopctl "
        "ends: by Ctrl-C, SIGTERM or in any other way. The exit status is "
        f"{ExitCode.OK} if loopctl was stopped, {ExitCode.NO_DEVICE} if somebody detached the "
        f"device, {ExitCode.UNAVAILABLE} if it went with loopd or with the bus. loopctl tells "
        "systemd when the device is there and udev has made its links; loop-attach@.service runs "
        "this command.",
    )
    attachment.add_options(hold)
    hold.add_argument(
        "--default-loop-ref",
        metavar="NAME",
        help="the device's name if --loop-ref is not given; a name that is too long is left out",
    )


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    if found.loop_ref is None:
        found.loop_ref = _default_reference(getattr(found, "default_loop_ref", None))
    with attachment.open_file_of(found) as file:
        return asyncio.run(_hold(found, file))


def _default_reference(name: str | None) -> str | None:
    """The name, such as a unit's, unless it is too long: the user did not choose it."""
    if name is None or len(os.fsencode(name)) <= MAX_REFERENCE:
        return name
    say(
        f"the device has no name, because {output.name(name)} is longer than {MAX_REFERENCE} "
        "bytes: --loop-ref gives it one"
    )
    return None


async def _hold(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            device, properties = await signals.unless(attachment.attached(client, found, file))
            description = attachment.description_of(found, properties)
            try:
                attachment.announce(found, device, properties)
                await notices.tell(found, file, properties)
                say(f"{description} until this ends: press Ctrl-C, or send SIGTERM")
                tell_ready(description)
                ended = await signals.unless(device.wait_ended())
            except Interrupted:
                tell_stopping()
                say(output.farewell(device.node, gone=await device.ensure_detached()))
                return ExitCode.OK
            complain(why(device, ended))
            return ExitCode.NO_DEVICE if ended is Ended.DETACHED else ExitCode.UNAVAILABLE
