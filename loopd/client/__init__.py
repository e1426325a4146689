# SPDX-License-Identifier: LGPL-2.1-or-later
"""A typed client of loopd for asyncio programs; `loopd.client.blocking` serves all others.

    async with attach("disk.img") as device:
        print(device.node)

A device lives as long as the connection that attached it, unless it is given another lifetime.
Files are opened with the rights of the caller.

Errors are those of `loopd.errors`, here as `errors`: one class for each name on the bus, and
`errors.BusError` if loopd cannot be reached. Its subclass `Unavailable` means that there is no
loopd; `Disconnected` means that the connection to the bus is lost, see Client.reconnect.

loopd may be restarted at any time. The client sends unanswered calls once more to the next loopd,
except Attach, which must not be done twice. Devices that the next loopd takes over keep their
objects.
"""

from loopd import errors

from .absence import Unavailable
from .attaching import Attaching, AttachOptions, File, SupportsFileno
from .changes import Change, Changes
from .client import Client, Named, Reconnected, attach
from .device import Device, Lifetime, Lock
from .link import Disconnected
from .memory import Progress
from .properties import Daemon, Partition, Properties
from .watch import Ended

__all__ = [
    "AttachOptions",
    "Attaching",
    "Change",
    "Changes",
    "Client",
    "Daemon",
    "Device",
    "Disconnected",
    "Ended",
    "File",
    "Lifetime",
    "Lock",
    "Named",
    "Partition",
    "Progress",
    "Properties",
    "Reconnected",
    "SupportsFileno",
    "Unavailable",
    "attach",
    "errors",
]
