# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects to loopd, attaches files and finds devices, for asyncio programs."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypedDict, TypeVar, Unpack

from loopd import errors
from loopd.bus import dial
from loopd.fd import OwnedFd

from .changes import Changes, objects
from .device import Device, Lifetime, Lock, properties, resize_options
from .image import Path, open_file, partition_named
from .link import (
    Link,
    Options,
    Unanswered,
    checked,
    is_a,
    make_options,
)
from .memory import Progress, copy_into_memory
from .properties import Daemon, Properties, is_node, is_path
from .watch import NAME, PATH, PROPERTIES


class SupportsFileno(Protocol):
    """Whatever has an fd, such as an open file."""

    def fileno(self) -> int:
        """The fd."""


File = Path | int | SupportsFileno
"""A file to open by its path, or an fd."""


class AttachOptions(TypedDict, total=False):
    """The options of Client.attach, which tells what they mean."""

    read_only: bool | None
    offset: int | None
    size_limit: int | None
    sector_size: int | None
    partition_scan: bool | None
    direct_io: bool | None
    reference: str | None
    lock: Lock | None
    lifetime: Lifetime | None
    allow_overlap: bool | None
    number: int | None
    in_memory: bool
    progress: Progress | None


_D = TypeVar("_D")


class Reconnected(NamedTuple, Generic[_D]):
    """What has become of a client's devices over the loss of its connection."""

    there: tuple[_D, ...]
    """Those that go on as they were, by their lifetime or by a Hold; their locks have ended."""
    gone: tuple[_D, ...]
    """Those that went with the old connection, or otherwise, or are about to."""


class Named(NamedTuple, Generic[_D]):
    """What an fd names."""

    device: _D
    partition: int | None
    """The number of the partition of it that the fd is open on; None if it names all of it."""


class Client:
    """A connection to loopd, to be used with `async with`: what it attached ends with it.

    Unless it has another lifetime, or a Hold, which is not bound to the connection.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._devices: weakref.WeakValueDictionary[str, Device] = weakref.WeakValueDictionary()

    @classmethod
    async def connect(cls, address: str | None = None, *, interactive: bool = False) -> Self:
        """Connect to the bus at `address`, the system bus if that is None.

        `interactive` lets polkit ask the user for a password, which can take minutes.
        Raises errors.BusError. loopd is started by the first call that needs it.
        """
        return cls(await Link.connect(address or dial.system_bus_address(), interactive))

    def close(self) -> None:
        """Leave the bus; whatever was attached over this connection is detached."""
        self._link.close()

    async def reconnect(self) -> Reconnected[Device]:
        """Connect anew, after a Disconnected or on a whim; tells what is left of the devices.

        A connection that is lost stays so until this is called, because leases and locks are over
        with it and only the caller knows what follows from that. It is about the devices that the
        program still has, and did not detach; what is there goes on under the same objects. After
        an errors.BusError it can be called again. Whoever iterates over changes starts anew.
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

    def attach(
        self,
        file: File,
        *,
        read_only: bool | None = None,
        offset: int | None = None,
        size_limit: int | None = None,
        sector_size: int | None = None,
        partition_scan: bool | None = None,
        direct_io: bool | None = None,
        reference: str | None = None,
        lock: Lock | None = None,
        lifetime: Lifetime | None = None,
        allow_overlap: bool | None = None,
        number: int | None = None,
        in_memory: bool = False,
        progress: Progress | None = None,
    ) -> "Attaching":
        """Attach a file; to be awaited for the device, or used with `async with` to detach it, too.

        `file` is a path, opened as `open_file` does, or an fd, which stays the caller's. None
        means loopd's default:
        `read_only` as the fd is open; `offset` in bytes, without direct I/O if it is no multiple of
        512, and then an fd should be open without O_DIRECT; `size_limit` in bytes, to the end of
        the file; `sector_size` in bytes, 512 or that of a block device, while 0 means as the
        partition table says; `partition_scan`, to have devices for the partitions, too, which are
        there when this returns; `direct_io` as configured, and without where the file does not
        allow it;
        `reference`, a free name of at most 62 bytes; `lock`, the BSD lock that the device has from
        the start, see Device.lock; `lifetime`, how long it is kept, this connection by default, see
        Device.set_lifetime; `allow_overlap`, to map bytes that another device maps;
        `number`, that of /dev/loop3 and no other, for root and who may manage others' devices.

        `in_memory` attaches a copy of the file that is in memory, holes left out, without direct
        I/O. It is writable unless `read_only` is true; what is written is lost with the device and
        never reaches the file. `progress` is called while it is copied, on the event loop and at
        most 20 times a second, with the bytes that are done and the bytes in all.

        Raises OSError where the file cannot be opened, ErrnoError where it cannot be copied, and on
        the bus InvalidArgs, UnsupportedFile, UntrustedFilesystem, Overlap, DeviceBusy,
        AccessDenied, InteractiveAuthorizationRequired, LimitsExceeded, NotSupported, TimedOut,
        ErrnoError.
        """
        if in_memory:
            direct_io = False
        opened_direct = False if (offset or 0) % 512 else direct_io
        options = make_options(
            ("read-only", "b", read_only),
            ("offset", "t", offset),
            ("size-limit", "t", size_limit),
            ("sector-size", "u", sector_size),
            ("partition-scan", "b", partition_scan),
            ("direct-io", "b", direct_io),
            ("reference", "s", reference),
            ("lock", "s", lock),
            ("lifetime", "s", lifetime),
            ("allow-overlap", "b", allow_overlap),
            ("number", "u", number),
        )

        async def attach() -> Device:
            if in_memory:
                source = _own(file, read_only=True, direct_io=False)
                return await self._attach(await copy_into_memory(source, progress), options)
            fd = _own(file, read_only=read_only, direct_io=opened_direct)
            return await self._attach(fd, options)

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
            raise errors.Failed("loopd tells of a device with a path that no device has")
        device = self._devices.get(path)
        if device is None:
            device = self._devices[path] = Device(self._link, path, node, diskseq)
        return device

    def _undo(self, attaching: asyncio.Task[list[Any]]) -> None:
        """Detach what came when nobody waited for it any more."""
        if attaching.cancelled() or attaching.exception():
            return

        self._link.start(Device(self._link, *attaching.result()).ensure_detached())

    async def device_by_node(self, node: str) -> Device:
        """The device called /dev/loop3 or loop3, whoever attached it.

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
                f"the fd is open on partition {partition} of {device.node}, and not on all of it"
            )
        return device

    async def named_by_fd(self, file: int | SupportsFileno) -> Named[Device]:
        """The device that an fd names, or that it names a partition of.

        Raises NoSuchDevice, Ambiguous, and OSError where sysfs does not tell.
        """
        with OwnedFd(os.dup(_fileno(file))) as fd:
            partition = partition_named(fd.fileno())
            asking = self._link.start_passing(
                PATH, NAME, "GetDevice", "h", [0], fd.move(), returns=[is_path]
            )
        (path,) = await asyncio.shield(asking)
        return Named(await self._found(path), partition)

    async def detach_by_fd(self, file: int | SupportsFileno, *, lazy: bool = False) -> bool:
        """As Device.detach, on the device that an fd names, see device_by_fd.

        Raises NoSuchDevice, Ambiguous, InvalidArgs for an fd on a partition, and what Device.detach
        does.
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
        fd = OwnedFd(os.dup(_fileno(file)))
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

        An fd on a partition means the partition itself, not its entry in the table. It takes
        `size_limit` alone, which is its size then, 0 being as much as there is room for.
        Raises NoSuchDevice, Ambiguous, and what Device.resize does.
        """
        options = resize_options(offset, size_limit, force, allow_overlap)
        fd = OwnedFd(os.dup(_fileno(file)))
        resizing = self._link.start_passing(
            PATH, NAME, "Resize", "ha{sv}", [0, options], fd, returns=[is_a(int)]
        )
        (size,) = await asyncio.shield(resizing)
        return int(size)

    async def _found(self, path: str) -> Device:
        found = await properties(self._link, path)
        return self._device(path, found.node, found.diskseq)

    async def devices(self) -> list[tuple[Device, Properties]]:
        """All bound loop devices of the machine, and what they are."""
        found = await objects(self._link)
        return [(self._made(path, told), told) for path, told in found.items()]

    def changes(self, device: Device | None = None) -> Changes[Device]:
        """What happens to devices, to all of them or to one, as an iterator.

            async with client.changes() as changes:
                async for kind, device, properties, names in changes: ...

        From the start of the block on nothing is missed: what is there by then is in
        `changes.devices`. While there is no loopd nothing is told; what has changed by the time
        that there is one again is told then. For one device the iterator ends when it is gone.
        Raises Disconnected when the connection to the bus is lost.
        """
        if device is None:
            return Changes(self._link, self._made)
        return Changes(self._link, lambda *_: device, device.path, device.wait_ended)

    async def daemon(self) -> Daemon:
        """What loopd tells of itself: its version, its limits of devices, and its settings.

        Raises Failed if that is not what a loopd tells.
        """
        (found,) = await self._link.call(
            PATH, PROPERTIES, "GetAll", "s", [NAME], returns=[is_a(dict)]
        )
        return Daemon.decode(found)

    async def uid(self) -> int:
        """The uid that loopd knows the caller by, which is another in a user namespace."""
        return await self._link.uid()

    def _made(self, path: str, told: Properties) -> Device:
        return self._device(path, told.node, told.diskseq)


def _ends_with(device: Properties, connection: str) -> bool:
    return (
        device.lifetime == "connection" and device.holder in (connection, "") and not device.holds
    )


class Attaching:
    """An Attach to come: `await` it, or use it with `async with`."""

    def __init__(self, attach: Callable[[], Awaitable[Device]]) -> None:
        self._attach = attach
        self._device: Device

    def __await__(self) -> Generator[Any, None, Device]:
        return self._attach().__await__()

    async def __aenter__(self) -> Device:
        self._device = await self._attach()
        return self._device

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._device.ensure_detached()


@contextlib.asynccontextmanager
async def attach(
    file: File,
    *,
    address: str | None = None,
    interactive: bool = False,
    **options: Unpack[AttachOptions],
) -> AsyncIterator[Device]:
    """Attach a file for the time of an `async with` block, over a connection of its own.

    The options are those of Client.attach, the rest those of Client.connect.
    """
    async with await Client.connect(address, interactive=interactive) as client:
        async with client.attach(file, **options) as device:
            yield device


def _own(file: File, *, read_only: bool | None, direct_io: bool | None) -> OwnedFd:
    """An fd of ours on a file."""
    if isinstance(file, str | bytes | os.PathLike):
        return open_file(file, read_only=read_only, direct_io=direct_io)
    return OwnedFd(os.dup(_fileno(file)))


def _fileno(file: int | SupportsFileno) -> int:
    return file if isinstance(file, int) else file.fileno()
