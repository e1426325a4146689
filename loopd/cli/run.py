# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl run`: attaches a file for as long as a command runs."""

import argparse
import asyncio
import contextlib
import time

from loopd import errors
from loopd.client import Device
from loopd.errors import LoopError
from loopd.fd import OwnedFd

from . import attachment, notices, output
from .child import run_command
from .connection import connect
from .options import ENDS_AS_COMMAND, Commands, add_command
from .outcome import RunExitCode, sentence
from .signals import Signals
from .stream import complain, say

# Seconds in which loopd notices that a Hold is closed, and seconds between looks.
_LETTING_GO = 1.0
_PAUSE = 0.01


def add(commands: Commands) -> None:
    """Declare the command."""
    run_ = add_command(
        commands,
        "run",
        run,
        "attach a file for as long as a command runs",
        "Attach a file, run the command, detach. The command finds the device's node in $LOOPDEV, "
        "and in place of every {} in its arguments. It inherits a file descriptor. The device "
        "stays while the command, or a program that it has started, has that open, even if loopctl "
        "is killed. " + ENDS_AS_COMMAND,
        problem=_problem,
    )
    run_.usage_code = RunExitCode.FAILED
    run_.usage = "loopctl run [OPTION...] FILE -- COMMAND [ARGUMENT...]"
    attachment.add_options(run_)


def _problem(found: argparse.Namespace) -> str | None:
    return None if found.run else "the command to run is missing: put it behind '--'"


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    with attachment.open_file_of(found) as file:
        return asyncio.run(_run_with_device(found, file))


async def _run_with_device(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            device, properties = await signals.unless(attachment.attached(client, found, file))
            command = [argument.replace("{}", device.node) for argument in found.run]
            try:
                attachment.announce(found, device, properties, only_json=True)
                await notices.tell(found, file, properties)
                variables = {"LOOPDEV": device.node}
                # The Hold keeps the device, and so its number, also if loopctl is killed.
                with await signals.unless(device.hold()) as held:
                    status = await run_command(
                        command, device, signals, variables=variables, fds=[held.fileno()]
                    )
            finally:
                gone = await _detached_at_last(device)
            if not gone:
                say(output.farewell(device.node, gone=False))
            return status


async def _detached_at_last(device: Device) -> bool:
    """Detach a device, unless a program that the command left running holds it."""
    try:
        if await _is_held(device):
            say(f"the command left programs running, and {device.node} goes with the last one")
            return True
        return await device.ensure_detached()
    except LoopError as exc:
        complain(f"{device.node}: {sentence(exc)}")  # the command's exit status counts for more
        return True


async def _is_held(device: Device) -> bool:
    """Whether a Hold is still open, once loopd has had time to notice the closed ones."""
    deadline = time.monotonic() + _LETTING_GO
    with contextlib.suppress(errors.NoSuchDevice, errors.UnknownObject, errors.BusError):
        while (await device.properties()).holds:
            if time.monotonic() > deadline:
                return True
            await asyncio.sleep(_PAUSE)
    return False
