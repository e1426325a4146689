# SPDX-License-Identifier: LGPL-2.1-or-later
"""A typed client of loopd for asyncio programs; `loopd.client.blocking` is the same for all others.

    async with attach("disk.img") as device:
        print(device.node)

A device lives as long as the connection that attached it, unless another lifetime is asked for.
The caller's own rights open the files.

Errors are those of `loopd.errors`, here as `errors`: one class for each name on the bus, and
`errors.BusError` where there is nobody to talk to. Of that, `Unavailable` says that there is no
loopd, and `Disconnected` that the connection to the bus is lost, see Client.reconnect.

loopd may be restarted at any time. Calls that it left unanswered are sent once more to the next
one where doing them twice does no harm, which is all but Attach; devices that it takes over are the
same objects as before.
"""

from loopd import errors

from .absence import Unavailable
from .changes import Change, Changes
from .client import (
    Attaching,
    AttachOptions,
    Client,
    File,
    Named,
    Reconnected,
    SupportsFileno,
    attach,
)
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
