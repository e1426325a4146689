# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file and the options of Client.attach, and how they are written in a call."""

import os
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Protocol, TypedDict, Unpack

from loopd.fd import OwnedFd

from .device import Device, Lifetime, Lock
from .image import Path, open_file
from .link import Options, make_options
from .memory import Progress


class SupportsFileno(Protocol):
    """An object that has an fd, such as an open file."""

    def fileno(self) -> int:
        """The fd."""


File = Path | int | SupportsFileno
"""A file to open by its path, or an fd."""


class AttachOptions(TypedDict, total=False):
    """The options of Client.attach. None, or no such key, means the default of loopd."""

    read_only: bool | None
    """Make the device read-only; by default it is as the fd is open."""
    offset: int | None
    """Where in the file the device starts, in bytes. Direct I/O needs a multiple of 512."""
    size_limit: int | None
    """The most bytes that the device has; by default it goes to the end of the file."""
    sector_size: int | None
    """In bytes; by default 512, or that of a block device. 0 takes that of the partition table."""
    partition_scan: bool | None
    """Have devices for the partitions, too. They are there when attach returns."""
    direct_io: bool | None
    """Bypass the page cache, where the file allows it; by default as loopd.toml says."""
    reference: str | None
    """A free name of at most 62 bytes."""
    lock: Lock | None
    """The BSD lock that the device has from the start, see Device.lock."""
    lifetime: Lifetime | None
    """How long the device is kept; by default as long as this connection."""
    allow_overlap: bool | None
    """Attach the file even if another device maps the same bytes."""
    number: int | None
    """That of /dev/loop3 and no other; for root and those who may manage others' devices."""
    in_memory: bool
    """Attach a copy in memory, without direct I/O. Holes stay holes.

    The copy is writable unless `read_only` is true. Writes are lost with the device and never reach
    the file.
    """
    progress: Progress | None
    """Called while the file is copied into memory, with the bytes done and the bytes in all.

    The calls come on the event loop, at most 20 times a second.
    """


# The options that go over the bus: the key, the type, and the name in Python.
_ON_THE_BUS = (
    ("read-only", "b", "read_only"),
    ("offset", "t", "offset"),
    ("size-limit", "t", "size_limit"),
    ("sector-size", "u", "sector_size"),
    ("partition-scan", "b", "partition_scan"),
    ("direct-io", "b", "direct_io"),
    ("reference", "s", "reference"),
    ("lock", "s", "lock"),
    ("lifetime", "s", "lifetime"),
    ("allow-overlap", "b", "allow_overlap"),
    ("number", "u", "number"),
)


def encoded(**options: Unpack[AttachOptions]) -> Options:
    """The a{sv} of an Attach. Raises InvalidArgs, and TypeError for an option that is unknown."""
    if unknown := options.keys() - AttachOptions.__annotations__.keys():
        raise TypeError(f"attach() has no option {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {**options}
    if options.get("in_memory"):
        values["direct_io"] = False
    return make_options(*((key, kind, values.get(name)) for key, kind, name in _ON_THE_BUS))


def opened(file: File, **options: Unpack[AttachOptions]) -> OwnedFd:
    """An fd of our own on the file, open as the options need it. Raises OSError."""
    if not isinstance(file, str | bytes | os.PathLike):
        return OwnedFd(os.dup(fileno(file)))
    if options.get("in_memory"):
        return open_file(file, read_only=True, direct_io=False)
    aligned = (options.get("offset") or 0) % 512 == 0
    return open_file(
        file,
        read_only=options.get("read_only"),
        direct_io=options.get("direct_io") if aligned else False,
    )


def fileno(file: int | SupportsFileno) -> int:
    """The number of an fd."""
    return file if isinstance(file, int) else file.fileno()


class Attaching:
    """An Attach that has not begun: `await` it, or use it with `async with`."""

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
