# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's `monitor`: devices as they come, change and go, until it is stopped."""

import argparse
import asyncio
import sys
import time
from typing import Any

from loopd.client import Change, Device

from . import output
from .connection import connected
from .outcome import ExitCode
from .signals import Interrupted, Signals
from .stream import say
from .style import Style


def monitor(found: argparse.Namespace) -> int:
    """`loopctl monitor`; returns its exit status."""
    return asyncio.run(_monitor(found))


async def _monitor(found: argparse.Namespace) -> int:
    style = Style(sys.stdout)
    with Signals() as signals:
        try:
            async with connected(found) as client, client.changes() as changes:
                if Style(sys.stderr).on_terminal:
                    say(f"devices now: {len(changes.devices)}; press Ctrl-C to stop")
                while True:
                    change = await signals.unless(changes.__anext__())
                    print(as_json(change) if found.json else as_line(change, style), flush=True)
        except Interrupted:
            return ExitCode.OK


def as_json(change: Change[Device]) -> str:
    """One object: what happened, when in microseconds, to which device, which is as told."""
    value: dict[str, Any] = {
        "event": change.kind,
        "time": time.time_ns() // 1000,
        "changed": list(change.names),
        "device": output.properties_for_json(change.device.path, change.properties),
    }
    return output.as_json(value)


def as_line(change: Change[Device], style: Style) -> str:
    """What happened, for people."""
    device = change.properties
    if change.kind == "changed":
        what = output.news(device, change.names)
    else:
        whose = f", for {output.owner(device.owner)}" if device.managed else ""
        what = f"{output.printable(device.backing_file)} ({output.size(device.size)}{whose})"
    colour = {"attached": style.green, "changed": style.yellow, "detached": style.red}[change.kind]
    return f"{time.strftime('%T')} {colour(f'{change.kind:8}')} {device.node:11} {what}"
