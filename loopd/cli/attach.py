# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopctl attach`."""

import argparse
import asyncio
import sys

from loopd.client import Lifetime
from loopd.errors import NotSupported
from loopd.fd import OwnedFd

from . import attachment, hold, notices
from .connection import connect
from .options import Commands, add_command
from .outcome import ExitCode
from .signals import Interrupted, Signals
from .stream import say
from .style import Style

_UNTIL = {"user": "until you have logged out", "system": "until somebody detaches it"}


def add(commands: Commands) -> None:
    """Declare the command."""
    attach = add_command(
        commands,
        "attach",
        run,
        "attach a file",
        "Attach a file, print the device's node, and return. The device stays until you have "
        "logged out; if you are root, it stays until somebody detaches it.",
        problem=_problem,
    )
    attachment.add_options(attach)
    attach.add_argument(
        "--lifetime",
        choices=("connection", "user", "system"),
        help="user: until you have logged out (default, if you are not root); system: until "
        "somebody detaches it (default for root; other users need an administrator's password); "
        "connection: until loopctl is stopped, as with 'loopctl hold'",
    )


def _problem(found: argparse.Namespace) -> str | None:
    if found.lock and found.lifetime != "connection":
        return "--lock ends with loopctl: use 'loopctl hold', or --lifetime connection"
    return None


def run(found: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    if found.lifetime == "connection":
        return hold.run(found)
    with attachment.open_file_of(found) as file:
        return asyncio.run(_attach(found, file))


async def _attach(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            uid = await signals.unless(client.uid())
            lifetime = found.lifetime or _default_lifetime(uid)
            try:
                attaching = attachment.attached(client, found, file, lifetime)
                device, properties = await signals.unless(attaching)
            except NotSupported as exc:
                raise NotSupported(_without_lifetime(exc)) from exc
            try:
                signals.check()
                attachment.announce(found, device, properties)
                await notices.tell(found, file, properties)
            except (Interrupted, OSError):
                # The caller has not got its node, so it would stay.
                await device.ensure_detached()
                raise
            if Style(sys.stderr).on_terminal:
                say(f"{attachment.description_of(found, properties)} {_UNTIL[lifetime]}")
            return ExitCode.OK


def _default_lifetime(uid: int) -> Lifetime:
    return "system" if uid == 0 else "user"


def _without_lifetime(exc: NotSupported) -> str:
    """The error, with the commands that keep a device without logind."""
    if "logind" not in str(exc):
        return str(exc)
    return f"{exc}; 'loopctl hold' keeps a device while it runs, 'loopctl run' while a command does"
