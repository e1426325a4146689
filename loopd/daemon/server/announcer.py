# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the objects on the bus tell about themselves: their properties, and when those change.

One signal an object, however much has changed, and before the answer to the call that changed it;
but the number of devices is told a moment later.
Of a device that only its owner sees, only the owner's connections hear.
"""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from loopd import __version__
from loopd.bus import codec
from loopd.bus.codec import Variant
from loopd.daemon.access import NOBODY
from loopd.daemon.config import Limits
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.registry import Registry

from .listing import Listing

NAME = "org.example.Loop1"
PATH = "/org/example/Loop1"
MANAGER = NAME
DEVICE = NAME + ".Device"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"

Properties = dict[str, Variant]


def _partitions(device: Device) -> list[list[Any]]:
    return [
        [each.number, device.partition_node(each.number), each.start, each.size]
        for each in device.status.partitions
    ]


# Property, signature, value.
DEVICE_PROPERTIES: dict[str, tuple[str, Callable[[Device], Any]]] = {
    "Node": ("s", lambda device: device.node),
    "Number": ("u", lambda device: NO_NUMBER if device.number is None else device.number),
    "DeviceNumber": ("t", lambda device: device.status.device_number),
    "Diskseq": ("t", lambda device: device.diskseq),
    "BackingFile": ("ay", lambda device: device.status.backing_file + b"\0"),
    "BackingDevice": ("t", lambda device: device.file.device if device.file else 0),
    "BackingInode": ("t", lambda device: device.file.inode if device.file else 0),
    "Offset": ("t", lambda device: device.status.offset),
    "SizeLimit": ("t", lambda device: device.size_limit),
    "Size": ("t", lambda device: device.status.size),
    "SectorSize": ("u", lambda device: device.sector_size),
    "ReadOnly": ("b", lambda device: device.status.read_only),
    "DirectIO": ("b", lambda device: device.status.direct_io),
    "Autoclear": ("b", lambda device: device.status.autoclear),
    "PartitionScan": ("b", lambda device: device.status.partition_scan),
    "Partitions": ("a(ustt)", _partitions),
    "MissingPartitions": ("au", lambda device: device.missing_partitions),
    # Bytes that are no UTF-8 would cost us the bus.
    "Reference": ("s", lambda device: device.reference.decode(errors="replace")),
    "Owner": ("u", lambda device: device.owner),
    "Holder": ("s", lambda device: device.lease.holder if device.lease else ""),
    "Lifetime": ("s", lambda device: device.lifetime),
    "Holds": ("u", lambda device: len(device.holds)),
    "Locked": ("s", lambda device: str(device.lock)),
    "Managed": ("b", lambda device: device.managed),
    "State": ("s", lambda device: device.state),
    "AttachedAt": ("t", lambda device: device.attached_at),
}

OBJECTS = "a{oa{sa{sv}}}"
"""What GetManagedObjects answers."""
ROWS = "a(ostayus)"
"""What ListDevices answers: the path, and these properties."""
_ROW = ("Node", "Diskseq", "BackingFile", "Owner", "Lifetime")

# Seconds until DeviceCount is announced, once for all devices that have come and gone meanwhile.
# Before each answer it was a fifteenth of what an Attach and a Detach cost the event loop.
_COUNTED_AFTER = 0.05

NO_NUMBER = 0xFFFFFFFF
"""The loop number of a block device that needed no loop device."""


class Emit(Protocol):
    """Sends a signal about a device to everyone, or if private to its owner's connections."""

    def __call__(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[Any],
        *,
        owner: int,
        private: bool,
    ) -> None:
        """Send it."""


class Announcer:
    """Keeps what was told last of each object, to tell what has changed."""

    def __init__(
        self, registry: Registry, limits: Limits, configuration_error: str, emit: Emit
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._configuration_error = configuration_error
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._told: dict[str, Properties] = {}
        self._changed: dict[str, Device] = {}
        self._counting = False
        """Whether the number of devices is going to be told."""
        self._objects = Listing(OBJECTS, lambda path: {path: {DEVICE: self._told[path]}})
        self._rows = Listing(ROWS, self._row)

    def start(self) -> None:
        """Begin with the manager as it is now."""
        self._told[PATH] = self.properties_of(None)

    def properties_of(self, device: Device | None) -> Properties:
        """The properties of a device, or of the manager."""
        if device:
            return {
                name: Variant(signature, value(device))
                for name, (signature, value) in DEVICE_PROPERTIES.items()
            }
        return {
            "Version": Variant("s", __version__),
            "DeviceCount": Variant("u", self._registry.managed),
            "MaxDevices": Variant("u", self._limits.devices),
            "MaxDevicesPerUser": Variant("u", self._limits.devices_per_user),
            "ConfigurationError": Variant("s", self._configuration_error),
        }

    async def objects(self, uid: int) -> codec.Array:
        """All devices that a user sees, with the properties that were told last."""
        return await self._objects.of(partial(self._paths, uid))

    async def rows(self, uid: int) -> codec.Array:
        """The same, with what ListDevices tells."""
        return await self._rows.of(partial(self._paths, uid))

    def _paths(self, uid: int) -> Iterator[str]:
        self.flush()  # who asks hears of changes before the answer that has them
        return (each.path for each in self._registry.seen_by(uid) if each.path in self._told)

    def _row(self, path: str) -> list[list[Any]]:
        told = self._told[path]
        return [[path, *(told[name].value for name in _ROW)]]

    def _keep(self, path: str, told: Properties) -> None:
        self._forget(path)
        self._told[path] = told

    def _forget(self, path: str) -> None:
        self._told.pop(path, None)
        self._objects.forget(path)
        self._rows.forget(path)

    def added(self, device: Device) -> None:
        """Tell of a new device."""
        told = self._told[device.path] = self.properties_of(device)
        body = [device.path, {DEVICE: told}]
        self._emit_for(device, PATH, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", body)
        self._count()

    def changed(self, device: Device) -> None:
        """Tell, soon, what has changed about a device."""
        if not self._changed:
            self._loop.call_soon(self.flush)
        self._changed[device.path] = device

    def removed(self, device: Device) -> None:
        """Tell that a device is gone."""
        if device.path in self._changed:  # its last changes come before its end
            self._tell(device.path, self._changed.pop(device.path))
        self._forget(device.path)
        body = [device.path, [DEVICE]]
        self._emit_for(device, PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", body)
        self._count()

    def _count(self) -> None:
        if not self._counting:
            self._counting = True
            self._loop.call_later(_COUNTED_AFTER, self._tell_count)

    def _tell_count(self) -> None:
        self._counting = False
        self._tell(PATH, None)

    def flush(self) -> None:
        """Tell what has changed since the last time."""
        changed, self._changed = self._changed, {}
        for path, device in changed.items():
            self._tell(path, device)

    def _tell(self, path: str, device: Device | None) -> None:
        before = self._told.get(path)
        if before is None:
            return
        now = self.properties_of(device)
        different = {name: value for name, value in now.items() if value != before[name]}
        if different:
            self._keep(path, now)
            body = [DEVICE if device else MANAGER, different, []]
            self._emit_for(device, path, PROPERTIES, "PropertiesChanged", "sa{sv}as", body)

    def _emit_for(
        self,
        device: Device | None,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[Any],
    ) -> None:
        owner = device.owner if device else NOBODY
        private = device is not None and device.private
        self._emit(path, interface, member, signature, body, owner=owner, private=private)
