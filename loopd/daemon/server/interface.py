# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.example.Loop1 and its device objects on the bus: decode, call the manager, encode.

It decides nothing. The interfaces are described in dbus/org.example.Loop1.xml, which also is what
Introspect shows; a test compares it with the tables here.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopd.bus.codec import Variant
from loopd.daemon.access import Caller
from loopd.daemon.actions.attach import Attaching
from loopd.daemon.actions.change import Operations
from loopd.daemon.actions.guard import Manager
from loopd.daemon.devices.device import PREFIX, Device
from loopd.daemon.devices.registry import Registry
from loopd.errors import (
    NoSuchDevice,
    PropertyReadOnly,
    UnknownInterface,
    UnknownMethod,
    UnknownObject,
    UnknownProperty,
)
from loopd.fd import OwnedFd

from .announcer import (
    DEVICE,
    INTROSPECTABLE,
    MANAGER,
    OBJECT_MANAGER,
    OBJECTS,
    PATH,
    PEER,
    PROPERTIES,
    ROWS,
    Announcer,
    Properties,
)
from .call import Authorization, Method
from .introspection import Introspection
from .options import (
    attach_options,
    detach_options,
    lifetime_kind,
    lock_kind,
    no_options,
    open_options,
    reference,
    resize_options,
    sector_size,
)

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
_GONE = "there is no such object: its device may be gone"

_OptionDict = dict[str, Variant]
_Answer = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The object that a call is for."""

    path: str
    device: Device | None = None

    @property
    def its_device(self) -> Device:
        """The device, on the objects that have one."""
        if self.device is None:
            raise TypeError(f"{self.path} is no device object")
        return self.device


class Service:
    """The objects on the bus, but for their signals, which are the announcer's."""

    def __init__(self, registry: Registry, announcer: Announcer) -> None:
        self._registry = registry
        self._announcer = announcer
        self._manager: Manager
        self._operations: Operations
        self._attaching: Attaching
        self._introspection = Introspection()
        self.methods = self._table()

    def serve(self, manager: Manager, operations: Operations, attaching: Attaching) -> None:
        """Take those who do what is asked for."""
        self._manager = manager
        self._operations = operations
        self._attaching = attaching

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
        method(MANAGER, "ListDevices", "", ROWS, free, self._list_devices)
        method(DEVICE, "Detach", "a{sv}", "b", manager, self._detach)
        method(DEVICE, "Resize", "a{sv}", "t", manager, self._resize)
        method(DEVICE, "Open", "sa{sv}", "h", manager, self._open)
        method(DEVICE, "Hold", "a{sv}", "h", manager, self._hold)
        method(DEVICE, "SetLifetime", "sa{sv}", "", manager, self._set_lifetime)
        method(DEVICE, "SetAutoclear", "ba{sv}", "", manager, self._set_autoclear)
        method(DEVICE, "SetDirectIO", "ba{sv}", "b", manager, self._set_direct_io)
        method(DEVICE, "SetReference", "sa{sv}", "", manager, self._set_reference)
        method(DEVICE, "SetSectorSize", "ua{sv}", "", manager, self._set_sector_size)
        method(DEVICE, "Lock", "sa{sv}", "", manager, self._lock)
        method(DEVICE, "Sync", "a{sv}", "", manager, self._sync)
        method(DEVICE, "RescanPartitions", "a{sv}", "u", manager, self._rescan_partitions)
        method(OBJECT_MANAGER, "GetManagedObjects", "", OBJECTS, free, self._objects)
        method(PROPERTIES, "Get", "ss", "v", free, self._get)
        method(PROPERTIES, "GetAll", "s", "a{sv}", free, self._get_all)
        method(PROPERTIES, "Set", "ssv", "", free, self._set)
        method(INTROSPECTABLE, "Introspect", "", "s", free, self._introspect)
        method(PEER, "Ping", "", "", free, self._ping)
        method(PEER, "GetMachineId", "", "s", free, self._machine_id)
        return table

    def find(self, uid: int, path: str, interface: str, member: str) -> tuple[Method, Target]:
        """The method that a call means, and the object it is called on, as that user sees it."""
        device = self._registry.at(path)
        target = Target(path, device if device and device.seen_by(uid) else None)
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
        raise UnknownObject(_GONE)

    # --- org.example.Loop1 ----------------------------------------------------------------------

    async def _attach(
        self, caller: Caller, target: Target, file: OwnedFd, options: _OptionDict
    ) -> _Answer:
        device = await self._attaching.attach(caller, file, attach_options(options))
        return device.path, device.node, device.diskseq

    async def _detach_by_fd(
        self, caller: Caller, target: Target, fd: OwnedFd, options: _OptionDict
    ) -> _Answer:
        return (await self._manager.detach_by_fd(caller, fd, lazy=detach_options(options)),)

    async def _resize_by_fd(
        self, caller: Caller, target: Target, fd: OwnedFd, options: _OptionDict
    ) -> _Answer:
        return (await self._operations.resize_by_fd(caller, fd, resize_options(options)),)

    async def _get_device(self, caller: Caller, target: Target, fd: OwnedFd) -> _Answer:
        device = await self._manager.device_by_fd(caller, fd)
        return (await self._path_of(device),)

    async def _get_device_by_node(self, caller: Caller, target: Target, node: str) -> _Answer:
        device = self._manager.device_by_node(node)
        return (await self._path_of(device),)

    async def _list_devices(self, caller: Caller, target: Target) -> _Answer:
        await self._registry.look_for_asker(self._registry.seen_by(caller.uid))
        return (await self._announcer.rows(caller.uid),)

    # --- org.example.Loop1.Device ---------------------------------------------------------------

    async def _detach(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        lazy = detach_options(options)
        return (await self._manager.detach(caller, target.its_device, lazy=lazy),)

    async def _resize(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        wanted = resize_options(options)
        return (await self._operations.resize(caller, target.its_device, wanted),)

    async def _open(
        self, caller: Caller, target: Target, mode: str, options: _OptionDict
    ) -> _Answer:
        writable, partition = open_options(mode, options)
        return (
            await self._operations.open(
                caller, target.its_device, writable=writable, partition=partition
            ),
        )

    async def _hold(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        no_options(options)
        return (await self._operations.hold(caller, target.its_device),)

    async def _set_lifetime(
        self, caller: Caller, target: Target, lifetime: str, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        wanted = lifetime_kind(lifetime)
        await self._operations.set_lifetime(caller, target.its_device, wanted)
        return ()

    async def _set_autoclear(
        self, caller: Caller, target: Target, enable: bool, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        await self._operations.set_autoclear(caller, target.its_device, enable)
        return ()

    async def _set_direct_io(
        self, caller: Caller, target: Target, enable: bool, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        return (await self._operations.set_direct_io(caller, target.its_device, enable),)

    async def _set_reference(
        self, caller: Caller, target: Target, text: str, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        await self._operations.set_reference(caller, target.its_device, reference(text))
        return ()

    async def _set_sector_size(
        self, caller: Caller, target: Target, size: int, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        await self._operations.set_sector_size(caller, target.its_device, sector_size(size))
        return ()

    async def _lock(
        self, caller: Caller, target: Target, kind: str, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        await self._operations.lock(caller, target.its_device, lock_kind(kind))
        return ()

    async def _sync(self, caller: Caller, target: Target, options: _OptionDict) -> _Answer:
        no_options(options)
        await self._operations.sync(caller, target.its_device)
        return ()

    async def _rescan_partitions(
        self, caller: Caller, target: Target, options: _OptionDict
    ) -> _Answer:
        no_options(options)
        return (await self._operations.rescan_partitions(caller, target.its_device),)

    # --- the standard interfaces ----------------------------------------------------------------

    async def _objects(self, caller: Caller, target: Target) -> _Answer:
        await self._registry.look_for_asker(self._registry.seen_by(caller.uid))
        return (await self._announcer.objects(caller.uid),)

    async def _get(self, caller: Caller, target: Target, interface: str, name: str) -> _Answer:
        value = (await self._properties_on(target, interface)).get(name)
        if value is None:
            raise UnknownProperty("the interface has no property of that name")
        return (value,)

    async def _get_all(self, caller: Caller, target: Target, interface: str) -> _Answer:
        return (await self._properties_on(target, interface),)

    async def _set(
        self, caller: Caller, target: Target, interface: str, name: str, value: Variant
    ) -> _Answer:
        await self._get(caller, target, interface, name)
        raise PropertyReadOnly(f"{name} cannot be set")

    async def _introspect(self, caller: Caller, target: Target) -> _Answer:
        children = _ANCESTORS.get(target.path, [])
        if target.path == _DEVICES:
            children = [device.label for device in self._registry.seen_by(caller.uid)]
        return (self._introspection.node(self._interfaces(target), children),)

    async def _ping(self, caller: Caller, target: Target) -> _Answer:
        return ()

    async def _machine_id(self, caller: Caller, target: Target) -> _Answer:
        return (_MACHINE_ID.read_text().strip(),)  # noqa: ASYNC240  one small local file

    async def _properties_on(self, target: Target, interface: str) -> Properties:
        own = DEVICE if target.device else MANAGER
        if interface in (own, ""):
            if target.device and not await self._is_there(target.device):
                raise UnknownObject(_GONE)
            return self._announcer.properties_of(target.device)
        if interface in self._interfaces(target):
            return {}
        raise UnknownInterface("the object has no interface of that name")

    async def _is_there(self, device: Device) -> bool:
        """Look at a device that is asked about; whether it still is there."""
        await self._registry.look_for_asker([device])
        return self._registry.knows(device)

    async def _path_of(self, device: Device) -> str:
        if not await self._is_there(device):
            raise NoSuchDevice(f"{device.node} is gone")
        return device.path
