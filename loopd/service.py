# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.example.Loop1 and its device objects on the bus: decode, call the manager, encode.

It decides nothing. The interfaces are described in dbus/org.example.Loop1.xml, which also is what
Introspect shows; a test compares it with the tables here.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .access import Caller
from .attaching import Attaching
from .bus import Authorization, Method
from .codec import Variant
from .config import Limits
from .device import PREFIX, Device
from .errors import (
    PropertyReadOnly,
    UnknownInterface,
    UnknownMethod,
    UnknownObject,
    UnknownProperty,
)
from .fd import OwnedFd
from .introspection import Introspection
from .manager import Manager
from .options import Options, attach_options, open_options, resize_options
from .registry import Registry

NAME = "org.example.Loop1"
PATH = "/org/example/Loop1"
MANAGER = NAME
DEVICE = NAME + ".Device"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PEER = "org.freedesktop.DBus.Peer"

_DEVICES = PREFIX.removesuffix("/")
# Objects that are there for what lies below them.
_ANCESTORS: dict[str, list[str]] = {
    "/": ["org"],
    "/org": ["example"],
    "/org/example": ["Loop1"],
    PATH: ["device"],
    _DEVICES: [],
}
_MACHINE_ID = Path("/etc/machine-id")

_OptionDict = dict[str, Variant]
_Answer = tuple[Any, ...]
Properties = dict[str, Variant]


@dataclass(frozen=True, slots=True)
class Target:
    """The object that a call is for."""

    path: str
    device: Device | None = None

    @property
    def bound(self) -> Device:
        """The device, on the objects that have one."""
        if self.device is None:
            raise TypeError(f"{self.path} is no device object")
        return self.device


# Property, signature, value: of a device, and of the manager below.
DEVICE_PROPERTIES: dict[str, tuple[str, Callable[[Device], Any]]] = {
    "Node": ("s", lambda device: device.node),
    "Number": ("u", lambda device: device.number),
    "DeviceNumber": ("t", lambda device: device.status.device_number),
    "Diskseq": ("t", lambda device: device.diskseq),
    "BackingFile": ("ay", lambda device: device.status.backing_file + b"\0"),
    "BackingDevice": ("t", lambda device: device.backing_device),
    "BackingInode": ("t", lambda device: device.backing_inode),
    "Offset": ("t", lambda device: device.status.offset),
    "SizeLimit": ("t", lambda device: device.status.size_limit),
    "Size": ("t", lambda device: device.status.size),
    "SectorSize": ("u", lambda device: device.status.sector_size),
    "ReadOnly": ("b", lambda device: device.status.read_only),
    "DirectIO": ("b", lambda device: device.status.direct_io),
    "Autoclear": ("b", lambda device: device.status.autoclear),
    "PartitionScan": ("b", lambda device: device.status.partition_scan),
    "Partitions": ("a(ustt)", lambda device: []),  # none are made yet
    # Bytes that are no UTF-8 would cost us the bus.
    "Reference": ("s", lambda device: device.reference.decode(errors="replace")),
    "Owner": ("u", lambda device: device.owner),
    "Holder": ("s", lambda device: device.lease.holder if device.lease else ""),
    "Lifetime": ("s", lambda device: device.lifetime),
    "Holds": ("u", lambda device: 0),  # none can be taken yet
    "Locked": ("s", lambda device: "none"),  # none can be taken yet
    "Managed": ("b", lambda device: device.managed),
    "State": ("s", lambda device: device.state),
    "AttachedAt": ("t", lambda device: device.attached_at),
}


class Service:
    """The objects on the bus. `emit` sends a signal: path, interface, member, signature, body."""

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        emit: Callable[[str, str, str, str, list[Any]], None],
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._emit = emit
        self._manager: Manager
        self._attaching: Attaching
        self._introspection = Introspection()
        self._loop = asyncio.get_running_loop()
        # What was last told of each device and of the manager, to tell what has changed.
        self._told: dict[str, Properties] = {}
        self._changed: dict[str, Target] = {}
        self.methods = self._table()

    def serve(self, manager: Manager, attaching: Attaching) -> None:
        """Take those who do what is asked for."""
        self._manager = manager
        self._attaching = attaching
        self._told[PATH] = self._properties_of(Target(PATH))

    # --- dispatch -------------------------------------------------------------------------------

    def _table(self) -> dict[str, dict[str, Method]]:
        free, manager = Authorization.FREE, Authorization.MANAGER
        table: dict[str, dict[str, Method]] = {
            MANAGER: {},
            DEVICE: {},
            OBJECT_MANAGER: {},
            PROPERTIES: {},
            INTROSPECTABLE: {},
            PEER: {},
        }

        def method(
            interface: str,
            name: str,
            in_signature: str,
            out_signature: str,
            authorization: Authorization,
            handler: Callable[..., Awaitable[_Answer]],
        ) -> None:
            table[interface][name] = Method(
                name=name,
                in_signature=in_signature,
                out_signature=out_signature,
                authorization=authorization,
                handler=handler,
            )

        method(MANAGER, "Attach", "ha{sv}", "ost", manager, self._attach)
        method(MANAGER, "Detach", "ha{sv}", "b", manager, self._detach_by_fd)
        method(MANAGER, "Resize", "ha{sv}", "t", manager, self._resize_by_fd)
        method(MANAGER, "GetDevice", "h", "o", free, self._get_device)
        method(MANAGER, "GetDeviceByNode", "s", "o", free, self._get_device_by_node)
        method(MANAGER, "ListDevices", "", "a(ostayus)", free, self._list_devices)
        method(DEVICE, "Detach", "a{sv}", "b", manager, self._detach)
        method(DEVICE, "Resize", "a{sv}", "t", manager, self._resize)
        method(DEVICE, "Open", "sa{sv}", "h", manager, self._open)
        method(DEVICE, "Sync", "a{sv}", "", manager, self._sync)
        method(OBJECT_MANAGER, "GetManagedObjects", "", "a{oa{sa{sv}}}", free, self._objects)
        method(PROPERTIES, "Get", "ss", "v", free, self._get)
        method(PROPERTIES, "GetAll", "s", "a{sv}", free, self._get_all)
        method(PROPERTIES, "Set", "ssv", "", free, self._set)
        method(INTROSPECTABLE, "Introspect", "", "s", free, self._introspect)
        method(PEER, "Ping", "", "", free, self._ping)
        method(PEER, "GetMachineId", "", "s", free, self._machine_id)
        return table

    def find(self, path: str, interface: str, member: str) -> tuple[Method, Target]:
        """The method that a call means, and the object it is called on."""
        target = Target(path, self._registry.at(path))
        interfaces = self._interfaces(target)
        if interface and interface not in interfaces:
            raise UnknownInterface("the object has no interface of that name")
        for name in [interface] if interface else interfaces:
            if method := self.methods[name].get(member):
                return method, target
        raise UnknownMethod("the object has no method of that name")

    @staticmethod
    def _interfaces(target: Target) -> tuple[str, ...]:
        if target.device:
            return (DEVICE, PROPERTIES, INTROSPECTABLE, PEER)
        if target.path == PATH:
            return (MANAGER, OBJECT_MANAGER, PROPERTIES, INTROSPECTABLE, PEER)
        if target.path in _ANCESTORS:
            return (INTROSPECTABLE, PEER)
        raise UnknownObject("there is no such object: its device may be gone")

    # --- org.example.Loop1 ----------------------------------------------------------------------

    async def _attach(
        self, caller: Caller, target: Target, file: OwnedFd, options: _OptionDict
    ) -> _Answer:
        device = await self._attaching.attach(caller, file, attach_options(options))
        return device.path, device.node, device.diskseq

    async def _detach_by_fd(
        self, caller: Caller, target: Target, fd: OwnedFd, options: _OptionDict
    ) -> _Answer:
        return (await self._manager.detach_by_fd(caller, fd, lazy=_lazy(options)),)

    async def _resize_by_fd(
        self, caller: Caller, target: Target, fd: OwnedFd, options: _OptionDict
    ) -> _Answer:
        return (await self._manager.resize_by_fd(caller, fd, resize_options(options)),)

    async def _get_device(self, caller: Caller, target: Target, fd: OwnedFd) -> _Answer:
        return ((await self._manager.device_by_fd(caller, fd)).path,)

    async def _get_device_by_node(self, caller: Caller, target: Target, node: str) -> _Answer:
        return (self._manager.device_by_node(node).path,)

    async def _list_devices(self, caller: Caller, target: Target) -> _Answer:
        rows = [
            [
                device.path,
                device.node,
                device.diskseq,
                device.status.backing_file + b"\0",
                device.owner,
                device.lifetime,
            ]
            for device in self._registry
        ]
        return (rows,)

    # --- org.example.Loop1.Device ---------------------------------------------------------------

    async def _detach(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        return (await self._manager.detach(caller, target.bound, lazy=_lazy(options)),)

    async def _resize(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        return (await self._manager.resize(caller, target.bound, resize_options(options)),)

    async def _open(
        self, caller: Caller, target: Target, mode: str, options: _OptionDict
    ) -> _Answer:
        return (await self._manager.open(caller, target.bound, open_options(mode, options)),)

    async def _sync(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        Options(options).end()
        await self._manager.sync(caller, target.bound)
        return ()

    # --- the standard interfaces ----------------------------------------------------------------

    async def _objects(self, caller: Caller, target: Target) -> _Answer:
        return (
            {
                device.path: {DEVICE: self._properties_of(Target(device.path, device))}
                for device in self._registry
            },
        )

    async def _get(self, caller: Caller, target: Target, interface: str, name: str) -> _Answer:
        value = self._properties_on(target, interface).get(name)
        if value is None:
            raise UnknownProperty("the interface has no property of that name")
        return (value,)

    async def _get_all(self, caller: Caller, target: Target, interface: str) -> _Answer:
        return (self._properties_on(target, interface),)

    async def _set(
        self, caller: Caller, target: Target, interface: str, name: str, value: Variant
    ) -> _Answer:
        await self._get(caller, target, interface, name)
        raise PropertyReadOnly(f"{name} cannot be set")

    async def _introspect(self, caller: Caller, target: Target) -> _Answer:
        children = _ANCESTORS.get(target.path, [])
        if target.path == _DEVICES:
            children = [device.path.rpartition("/")[2] for device in self._registry]
        return (self._introspection.node(self._interfaces(target), children),)

    async def _ping(self, caller: Caller, target: Target) -> _Answer:
        return ()

    async def _machine_id(self, caller: Caller, target: Target) -> _Answer:
        return (_MACHINE_ID.read_text().strip(),)  # noqa: ASYNC240  one small local file

    # --- properties and signals -----------------------------------------------------------------

    def _properties_on(self, target: Target, interface: str) -> Properties:
        own = DEVICE if target.device else MANAGER
        if interface in (own, ""):
            return self._properties_of(target)
        if interface in self._interfaces(target):
            return {}
        raise UnknownInterface("the object has no interface of that name")

    def _properties_of(self, target: Target) -> Properties:
        if device := target.device:
            return {
                name: Variant(signature, value(device))
                for name, (signature, value) in DEVICE_PROPERTIES.items()
            }
        return {
            "Version": Variant("s", __version__),
            "DeviceCount": Variant("u", self._registry.managed),
            "MaxDevices": Variant("u", self._limits.devices),
            "MaxDevicesPerUser": Variant("u", self._limits.devices_per_user),
        }

    def device_added(self, device: Device) -> None:
        """Tell of a new device."""
        told = self._told[device.path] = self._properties_of(Target(device.path, device))
        self._emit(
            PATH, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [device.path, {DEVICE: told}]
        )
        self._note(Target(PATH))

    def device_changed(self, device: Device) -> None:
        """Tell, soon, what has changed about a device."""
        self._note(Target(device.path, device))

    def device_removed(self, device: Device) -> None:
        """Tell that a device is gone."""
        self.flush()  # its last changes come before its end
        self._told.pop(device.path, None)
        self._emit(PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", [device.path, [DEVICE]])
        self._note(Target(PATH))

    def _note(self, target: Target) -> None:
        if not self._changed:
            self._loop.call_soon(self.flush)
        self._changed[target.path] = target

    def flush(self) -> None:
        """Tell what has changed since the last time: one signal an object, however much it was."""
        changed, self._changed = self._changed, {}
        for path, target in changed.items():
            before = self._told.get(path)
            if before is None:
                continue
            now = self._told[path] = self._properties_of(target)
            different = {name: value for name, value in now.items() if value != before[name]}
            if different:
                interface = DEVICE if target.device else MANAGER
                self._emit(
                    path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface, different, []]
                )


def _lazy(given: _OptionDict) -> bool:
    options = Options(given)
    lazy = options.boolean("lazy") or False
    options.end()
    return lazy
