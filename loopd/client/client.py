# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects to loopd, attaches files and finds devices, for asyncio programs."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar, Unpack

from loopd import errors
from loopd.bus import dial
from loopd.fd import OwnedFd

from .attaching import Attaching, AttachOptions, File, SupportsFileno, encoded, fileno, opened
from .changes import Changes, objects
from .device import Device, properties, resize_options
from .image import partition_named
from .link import (
    Link,
    Options,
    Unanswered,
    checked,
    is_a,
    make_options,
)
from .memory import copy_into_memory
from .properties import Daemon, Properties, is_node, is_path
from .watch import NAME, PATH, PROPERTIES

_D = TypeVar("_D")


class Reconnected(NamedTuple, Generic[_D]):
    """The devices of a client after the loss of its connection."""

    there: tuple[_D, ...]
    """Devices that a lifetime or a Hold has kept; their locks have ended."""
    gone: tuple[_D, ...]
    """Devices that are gone or are about to go, with the old connection or for another reason."""


class Named(NamedTuple, Generic[_D]):
    """The device that an fd names."""

    device: _D
    partition: int | None
    """The number of the partition that the fd is open on; None if it names the whole device."""


class Client:
    """A connection to loopd, to be used with `async with`.

    The devices that it attached end with it, except those with another lifetime or a Hold.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._devices: weakref.WeakValueDictionary[str, Device] = weakref.WeakValueDictionary()

    @classmethod
    async def connect(cls, address: str | None = None, *, interactive: bool = False) -> Self:
        """Connect to the bus at `address`, the system bus if that is None.

        `interactive` lets polkit ask the user for a password, which can take minutes.
        The first call that needs loopd starts it. Raises errors.BusError.
        """
        return cls(await Link.connect(address or dial.system_bus_address(), interactive))

    def close(self) -> None:
        """Leave the bus; loopd detaches the devices that end with this connection."""
        self._link.close()

    async def reconnect(self) -> Reconnected[Device]:
        """Connect anew, after a Disconnected or at any time; returns the devices by their fate.

        A lost connection stays lost until this is called: leases and locks ended with it, and only
        the caller knows how to go on. The result names the devices that the program still has and
        did not detach. Their Device objects stay valid. After an errors.BusError it can be called
        again. An iterator over changes has to be started anew.
        """
        former = await self._link.reconnect()
        found = await objects(self._link)
        there, gone = [], []
        for device in sorted(self._devices.values(), key=lambda each: each.diskseq):
            if device.gone:
                continue
            now = found.get(device.path)
            # loopd may not have heard yet of the end of the old connection.
            if now is None or now.state != "attached" or _ends_with(now, former):
                device.gone = True
                gone.append(device)
            else:
                there.append(device)
        return Reconnected(tuple(there), tuple(gone))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def attach(self, file: File, **options: Unpack[AttachOptions]) -> Attaching:
        """Attach a file; `await` it for the device, or use `async with` to detach the device, too.

        `file` is a path, opened as `open_file` does, or an fd, which stays the caller's. With an
        `offset` that is no multiple of 512, an fd should be open without O_DIRECT.

        Raises OSError if the file cannot be opened, ErrnoError if it cannot be copied, and as
        answers of loopd InvalidArgs, UnsupportedFile, UntrustedFilesystem, Overlap, DeviceBusy,
        AccessDenied, InteractiveAuthorizationRequired, LimitsExceeded, NotSupported, TimedOut,
        ErrnoError.
        """
        encoding = encoded(**options)

        async def attach() -> Device:
            fd = opened(file, **options)
            if options.get("in_memory"):
                fd = await copy_into_memory(fd, options.get("progress"))
            return await self._attach(fd, encoding)

        return Attaching(attach)

    async def _attach(self, fd: OwnedFd, options: Options) -> Device:
        attaching = self._link.start_passing(
            PATH,
            NAME,
            "Attach",
            "ha{sv}",
            [0, options],
            fd,
            returns=[is_path, is_node, is_a(int)],
            again=False,
        )
        try:
            path, node, diskseq = await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(self._undo)
            raise
        return self._device(path, node, diskseq)

    def _device(self, path: str, node: str, diskseq: int) -> Device:
        """The object for a path, and the same one for as long as somebody has it."""
        if not is_path(path):
            raise errors.Failed("loopd has sent an object path that is not one of a device")
        device = self._devices.get(path)
        if device is None:
            device = self._devices[path] = Device(self._link, path, node, diskseq)
        return device

    def _undo(self, attaching: asyncio.Task[list[Any]]) -> None:
        """Detach a device whose attach was cancelled before the answer came."""
        if attaching.cancelled() or attaching.exception():
            return

        self._link.start(Device(self._link, *attaching.result()).ensure_detached())

    async def device_by_node(self, node: str) -> Device:
        """The device called /dev/loop3 or loop3, of any owner.

        Raises InvalidArgs, NoSuchDevice.
        """
        (path,) = await self._link.call(
            PATH, NAME, "GetDeviceByNode", "s", [checked("node", "s", node)], returns=[is_path]
        )
        return await self._found(path)

    async def device_by_fd(self, file: int | SupportsFileno) -> Device:
        """The device that an fd names: it is open, in any mode, on the device or its backing file.

        Of the devices with that backing file the caller's own come first. An fd on a partition is
        for `named_by_fd`. Raises NoSuchDevice, Ambiguous, InvalidArgs.
        """
        device, partition = await self.named_by_fd(file)
        if partition is not None:
            raise errors.InvalidArgs(
                f"the fd is open on partition {partition} of {device.node}: pass an fd on the disk"
            )
        return device

    async def named_by_fd(self, file: int | SupportsFileno) -> Named[Device]:
        """The device that an fd names, or that it names a partition of.

        Raises NoSuchDevice, Ambiguous, and OSError if sysfs cannot be read.
        """
        with OwnedFd(os.dup(fileno(file))) as fd:
            partition = partition_named(fd.fileno())
            asking = self._link.start_passing(
                PATH, NAME, "GetDevice", "h", [0], fd.move(), returns=[is_path]
            )
        (path,) = await asyncio.shield(asking)
        return Named(await self._found(path), partition)

    async def detach_by_fd(self, file: int | SupportsFileno, *, lazy: bool = False) -> bool:
        """As Device.detach, on the device that an fd names, see device_by_fd.

        Raises NoSuchDevice, Ambiguous, InvalidArgs for an fd on a partition, and the errors of
        Device.detach.
        """
        options = make_options(("lazy", "b", lazy or None))
        try:
            return await self._detach_by_fd(file, options)
        except Unanswered:
            try:
                return await self._detach_by_fd(file, options)
            except errors.NoSuchDevice:
                return True  # the first call has done it

    async def _detach_by_fd(self, file: int | SupportsFileno, options: Options) -> bool:
        fd = OwnedFd(os.dup(fileno(file)))
        detaching = self._link.start_passing(
            PATH,
            NAME,
            "Detach",
            "ha{sv}",
            [0, options],
            fd,
            returns=[is_a(bool)],
            again=False,
        )
        (gone,) = await asyncio.shield(detaching)
        return bool(gone)

    async def resize_by_fd(
        self,
        file: int | SupportsFileno,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
        allow_overlap: bool = False,
    ) -> int:
        """As Device.resize, on the device that an fd names; returns the size now. All in bytes.

        An fd on a partition means the partition itself, not its entry in the table. Then only
        `size_limit` is allowed. It is the partition's new size; 0 means all the room there is.
        Raises NoSuchDevice, Ambiguous, and the errors of Device.resize.
        """
        options = resize_options(offset, size_limit, force, allow_overlap)
        fd = OwnedFd(os.dup(fileno(file)))
        resizing = self._link.start_passing(
            PATH, NAME, "Resize", "ha{sv}", [0, options], fd, returns=[is_a(int)]
        )
        (size,) = await asyncio.shield(resizing)
        return int(size)

    async def _found(self, path: str) -> Device:
        found = await properties(self._link, path)
        return self._device(path, found.node, found.diskseq)

    async def devices(self) -> list[tuple[Device, Properties]]:
        """All bound loop devices of the machine, with their properties."""
        found = await objects(self._link)
        return [(self._made(path, told), told) for path, told in found.items()]

    def changes(self, device: Device | None = None) -> Changes[Device]:
        """The changes of all devices, or of one, as an iterator.

            async with client.changes() as changes:
                async for kind, device, properties, names in changes: ...

        `changes.devices` has the devices at the start of the block; the iterator yields every
        later change. While loopd is away the iterator waits; when loopd is back, it yields the
        differences. For one device the iterator ends when that is gone.
        Raises Disconnected when the connection to the bus is lost.
        """
        if device is None:
            return Changes(self._link, self._made)
        return Changes(self._link, lambda *_: device, device.path, device.wait_ended)

    async def daemon(self) -> Daemon:
        """The daemon's version, its limits of devices, and its settings.

        Raises Failed if the answer is malformed.
        """
        (found,) = await self._link.call(
            PATH, PROPERTIES, "GetAll", "s", [NAME], returns=[is_a(dict)]
        )
        return Daemon.decode(found)

    async def uid(self) -> int:
        """The uid by which loopd knows the caller; in a user namespace it differs from getuid()."""
        return await self._link.uid()

    def _made(self, path: str, told: Properties) -> Device:
        return self._device(path, told.node, told.diskseq)


def _ends_with(device: Properties, connection: str) -> bool:
    return (
        device.lifetime == "connection" and device.holder in (connection, "") and not device.holds
    )


@contextlib.asynccontextmanager
async def attach(
    file: File,
    *,
    address: str | None = None,
    interactive: bool = False,
    **options: Unpack[AttachOptions],
) -> AsyncIterator[Device]:
    """Attach a file for an `async with` block, over a connection of its own.

    The options are those of Client.attach, the rest those of Client.connect.
    """
    async with await Client.connect(address, interactive=interactive) as client:
        async with client.attach(file, **options) as device:
            yield device
