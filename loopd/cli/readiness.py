# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl as a service of systemd's: when its device is ready for what is ordered after it.

Without systemd, all of this does nothing.
"""

import asyncio
import os
import time
from pathlib import Path

from .. import supervisor
from ..client.properties import Properties
from .stream import say

_UDEV = Path("/run/udev")
# Seconds that udev may take: at boot it has much to do.
_TIMEOUT = 30.0
_PAUSE = 0.02


async def tell_ready(device: Properties, description: str) -> None:
    """Tell systemd that the device is there, once udev has made its links.

    udev leaves alone what somebody has locked exclusively.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        return
    if device.locked != "exclusive" and not await _udev_is_done(device):
        say(f"udev has not made the links to {device.node} within {_TIMEOUT:g} s; going on")
    supervisor.tell("READY=1\nSTATUS=" + description.rstrip(","))


def tell_stopping() -> None:
    """Tell systemd that the device is about to go."""
    supervisor.tell("STOPPING=1")


async def _udev_is_done(device: Properties) -> bool:
    """Wait until udev, if it runs, has looked at this attachment; false if it does not in time."""
    deadline = time.monotonic() + _TIMEOUT
    while not _udev_has_seen(device.device_number, device.diskseq):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_PAUSE)
    return True


def _udev_has_seen(number: int, diskseq: int) -> bool:
    """Whether udev has been done with this attachment at least once, or is not there.

    It writes an entry for a device after it has made the links that stand in it, and the one by
    diskseq is every device's.
    """
    if not (_UDEV / "control").exists():
        return True
    try:
        entry = (_UDEV / "data" / f"b{os.major(number)}:{os.minor(number)}").read_bytes()
    except OSError:
        return False
    return b"S:disk/by-diskseq/%d" % diskseq in entry.splitlines()
