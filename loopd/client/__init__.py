# SPDX-License-Identifier: LGPL-2.1-or-later
"""A typed client of loopd for asyncio programs; `loopd.client.blocking` is the same for all others.

    async with attach("disk.img") as device:
        print(device.node)

A device lives as long as the connection that attached it. Errors are those of `loopd.errors`, and
`errors.BusError` where there is nobody to talk to. The caller's own rights open the files.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Protocol, Self

from .. import dial
from ..fd import OwnedFd
from .device import Device, Lifetime, Lock, properties, resize_options
from .image import Path, open_file
from .link import Link, Options, checked, make_options
from .memory import Progress, copy_into_memory
from .properties import Properties
from .watch import DEVICE, NAME, OBJECT_MANAGER, PATH

__all__ = [
    "Attaching",
    "Client",
    "Device",
    "File",
    "Lifetime",
    "Lock",
    "Progress",
    "SupportsFileno",
    "attach",
]


class SupportsFileno(Protocol):
    """Whatever has an fd, such as an open file."""

    def fileno(self) -> int:
        """The fd."""


File = Path | int | SupportsFileno
"""A file to open by its path, or an fd."""


class Client:
    """A connection to loopd, to be used with `async with`: what it attached ends with it."""

    def __init__(self, link: Link) -> None:
        self._link = link

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
        `read_only` as the fd is open; `offset` in bytes, a multiple of 512; `size_limit` in bytes,
        to the end of the file; `sector_size` in bytes, 512 or that of a block device, while 0 means
        as the partition table says; `partition_scan`, to have devices for the partitions, too,
        which are there when this returns; `direct_io` as configured, and without where the file
        does not allow it;
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
            return await self._attach(_own(file, read_only=read_only, direct_io=direct_io), options)

        return Attaching(attach)

    async def _attach(self, fd: OwnedFd, options: Options) -> Device:
        attaching = self._link.start_passing(PATH, NAME, "Attach", "ha{sv}", [0, options], fd)
        try:
            path, node, diskseq = await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(self._undo)
            raise
        return Device(self._link, path, node, diskseq)

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
            PATH, NAME, "GetDeviceByNode", "s", [checked("node", "s", node)]
        )
        return await self._found(path)

    async def device_by_fd(self, file: int | SupportsFileno) -> Device:
        """The device that an fd names: it is open, in any mode, on the device or its backing file.

        Of the devices with that backing file the caller's own come first.
        Raises NoSuchDevice, Ambiguous.
        """
        fd = OwnedFd(os.dup(_fileno(file)))
        asking = self._link.start_passing(PATH, NAME, "GetDevice", "h", [0], fd)
        (path,) = await asyncio.shield(asking)
        return await self._found(path)

    async def resize_by_fd(
        self,
        file: int | SupportsFileno,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
    ) -> int:
        """As Device.resize, on the device that an fd names; returns the size now. All in bytes.

        An fd on a partition means the partition itself, not its entry in the table. It takes
        `size_limit` alone, which is its size then, 0 being as much as there is room for.
        Raises NoSuchDevice, Ambiguous, and what Device.resize does.
        """
        options = resize_options(offset, size_limit, force)
        fd = OwnedFd(os.dup(_fileno(file)))
        resizing = self._link.start_passing(PATH, NAME, "Resize", "ha{sv}", [0, options], fd)
        (size,) = await asyncio.shield(resizing)
        return int(size)

    async def _found(self, path: str) -> Device:
        found = await properties(self._link, path)
        return Device(self._link, path, found.node, found.diskseq)

    async def devices(self) -> list[tuple[Device, Properties]]:
        """All bound loop devices of the machine, and what they are."""
        (objects,) = await self._link.call(PATH, OBJECT_MANAGER, "GetManagedObjects")
        found = []
        for path, interfaces in objects.items():
            if DEVICE in interfaces:
                told = Properties.decode(interfaces[DEVICE])
                found.append((Device(self._link, path, told.node, told.diskseq), told))
        return sorted(found, key=lambda pair: pair[1].number)


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
    file: File, *, address: str | None = None, interactive: bool = False, **options: Any
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
