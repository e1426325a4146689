# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a device is ready: for a command or a shell, and for units, if loopctl is systemd's service.

Without systemd, nothing is told to it.
"""

import argparse

from loopd import notify
from loopd.client import Device
from loopd.client.device import SETTLING

from .stream import say


async def settle(found: argparse.Namespace, device: Device) -> None:
    """Wait until udev is done with a device, unless that is not wanted."""
    if found.settle and not await device.settled():
        say(
            f"udev has not made the links to {device.node} within {SETTLING:g} s; going on "
            "(--no-settle does not wait)"
        )


def tell_ready(description: str) -> None:
    """Tell systemd that the device is there."""
    notify.tell("READY=1\nSTATUS=" + description.rstrip(","))


def tell_stopping() -> None:
    """Tell systemd that the device is about to go."""
    notify.tell("STOPPING=1")
