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
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from .. import dial, errors
from ..fd import OwnedFd
from .image import Path, open_file
from .link import Link, Options, Unavailable, make_options, text
from .properties import Properties
from .watch import DEVICE, NAME, OBJECT_MANAGER, PATH, PROPERTIES, Ended


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
        direct_io: bool | None = None,
        reference: str | None = None,
        allow_overlap: bool | None = None,
    ) -> "Attaching":
        """Attach a file; to be awaited for the device, or used with `async with` to detach it, too.

        `file` is a path, opened as `open_file` does, or an fd, which stays the caller's. None
        means loopd's default:
        `read_only` as the fd is open; `offset` in bytes, a multiple of 512; `size_limit` in bytes,
        to the end of the file; `sector_size` in bytes, 512; `direct_io` as configured, and without
        where the file does not allow it; `reference`, a free name of at most 62 bytes;
        `allow_overlap`, to map bytes that another device maps.

        Raises OSError where the file cannot be opened, and on the bus InvalidArgs,
        UnsupportedFile, UntrustedFilesystem, Overlap, AccessDenied,
        InteractiveAuthorizationRequired, LimitsExceeded, NotSupported, TimedOut, ErrnoError.
        """
        options = make_options(
            ("read-only", "b", read_only),
            ("offset", "t", offset),
            ("size-limit", "t", size_limit),
            ("sector-size", "u", sector_size),
            ("direct-io", "b", direct_io),
            ("reference", "s", reference),
            ("allow-overlap", "b", allow_overlap),
        )
        return Attaching(partial(self._attach, file, options, read_only))

    async def _attach(self, file: File, options: Options, read_only: bool | None) -> "Device":
        if isinstance(file, str | bytes | os.PathLike):
            fd = open_file(file, read_only=read_only)
        else:
            fd = OwnedFd(os.dup(_fileno(file)))
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

    async def device_by_node(self, node: str) -> "Device":
        """The device called /dev/loop3 or loop3, whoever attached it.

        Raises InvalidArgs, NoSuchDevice.
        """
        (path,) = await self._link.call(PATH, NAME, "GetDeviceByNode", "s", [text("node", node)])
        return await self._found(path)

    async def device_by_fd(self, file: int | SupportsFileno) -> "Device":
        """The device that an fd names: it is open, in any mode, on the device or its backing file.

        Of the devices with that backing file the caller's own come first.
        Raises NoSuchDevice, Ambiguous.
        """
        fd = OwnedFd(os.dup(_fileno(file)))
        asking = self._link.start_passing(PATH, NAME, "GetDevice", "h", [0], fd)
        (path,) = await asyncio.shield(asking)
        return await self._found(path)

    async def _found(self, path: str) -> "Device":
        properties = await _properties(self._link, path)
        return Device(self._link, path, properties.node, properties.diskseq)

    async def devices(self) -> list[tuple["Device", Properties]]:
        """All bound loop devices of the machine, and what they are."""
        (objects,) = await self._link.call(PATH, OBJECT_MANAGER, "GetManagedObjects")
        found = []
        for path, interfaces in objects.items():
            if DEVICE in interfaces:
                properties = Properties.decode(interfaces[DEVICE])
                device = Device(self._link, path, properties.node, properties.diskseq)
                found.append((device, properties))
        return sorted(found, key=lambda pair: pair[1].number)


class Attaching:
    """An Attach to come: `await` it, or use it with `async with`."""

    def __init__(self, attach: Callable[[], Awaitable["Device"]]) -> None:
        self._attach = attach
        self._device: Device

    def __await__(self) -> Generator[Any, None, "Device"]:
        return self._attach().__await__()

    async def __aenter__(self) -> "Device":
        self._device = await self._attach()
        return self._device

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._device.ensure_detached()


class Device:
    """A device object of loopd. It stands for one attachment and never for a later one."""

    def __init__(self, link: Link, path: str, node: str, diskseq: int) -> None:
        self._link = link
        self.path = path
        """The object path."""
        self.node = node
        """Such as /dev/loop3."""
        self.diskseq = diskseq
        """The kernel's number of this attachment."""

    def __repr__(self) -> str:
        return f"<Device {self.node} diskseq={self.diskseq}>"

    async def detach(self, *, lazy: bool = False) -> bool:
        """Detach it; true when it is gone, false when the kernel will finish at the last close.

        `lazy` is for devices that are mounted or exclusively open, which otherwise raise
        DeviceBusy. Raises AccessDenied, NoSuchDevice, UnknownObject.
        """
        options = make_options(("lazy", "b", lazy or None))
        return bool((await self._call("Detach", "a{sv}", [options]))[0])

    async def ensure_detached(self) -> bool:
        """Detach it whatever uses it; true when it is gone, however that came.

        Raises AccessDenied.
        """
        # What is out of reach goes with the connection, or has gone with loopd.
        with contextlib.suppress(errors.NoSuchDevice, errors.UnknownObject, errors.BusError):
            return await self.detach(lazy=True)
        return True

    async def resize(
        self,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
    ) -> int:
        """Take up the file's size, or set offset and limit; returns the size now. All in bytes.

        A `size_limit` of 0 is none. `force` shrinks a device that is in use, which otherwise
        raises DeviceBusy. Raises InvalidArgs, AccessDenied, NoSuchDevice, UnknownObject.
        """
        options = make_options(
            ("offset", "t", offset), ("size-limit", "t", size_limit), ("force", "b", force or None)
        )
        return int((await self._call("Resize", "a{sv}", [options]))[0])

    async def open(self, mode: Literal["r", "rw"] = "r") -> OwnedFd:
        """Open the device itself, which needs no right to its node; the fd is the caller's.

        It never allows more than the backing file's did. Raises AccessDenied, NoSuchDevice,
        NotSupported, UnknownObject.
        """
        body, fds = await self._link.call_with_fds(
            self.path, DEVICE, "Open", "sa{sv}", [text("mode", mode), {}]
        )
        if body != [0] or len(fds) != 1:
            for fd in fds:
                fd.close()
            raise errors.Failed("loopd did not send the file descriptor that it announced")
        return fds[0]

    async def sync(self) -> None:
        """Write to the disk what the device has taken.

        Raises ErrnoError where that fails, AccessDenied, NoSuchDevice, UnknownObject.
        """
        await self._call("Sync", "a{sv}", [{}])

    async def properties(self) -> Properties:
        """What the device is now.

        Raises UnknownObject once it is gone.
        """
        return await _properties(self._link, self.path)

    async def wait_ended(self) -> Ended:
        """Wait until the device is detached or out of reach, by whatever cause."""
        with self._link.watch.watched(self.path) as ended:
            try:
                await self._link.subscribe()
                # Whatever came before the subscription shows in the properties.
                if (await self.properties()).state != "attached":
                    return Ended.DETACHED
            except (errors.UnknownObject, errors.NoSuchDevice):
                return Ended.DETACHED
            except Unavailable:
                return Ended.DAEMON_LEFT
            except errors.BusError:
                return Ended.BUS_LOST
            return await ended

    async def _call(self, member: str, signature: str, body: Sequence[Any]) -> list[Any]:
        return await self._link.call(self.path, DEVICE, member, signature, body)


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


async def _properties(link: Link, path: str) -> Properties:
    (found,) = await link.call(path, PROPERTIES, "GetAll", "s", [DEVICE])
    return Properties.decode(found)


def _fileno(file: int | SupportsFileno) -> int:
    return file if isinstance(file, int) else file.fileno()
