# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopd.client` for programs without asyncio: the same names, arguments and errors, and they wait.

    with attach("disk.img") as device:
        print(device.node)

Each client has an event loop of its own, which runs during calls only. A client and its devices
belong to one thread. Changes wait in the connection meanwhile, and who lets very many of them wait
is disconnected by the bus.
"""

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self, Unpack

from loopd import client
from loopd.fd import OwnedFd

from .changes import Change
from .client import AttachOptions, File, Named, Reconnected, SupportsFileno
from .device import SETTLING, Lifetime, Lock
from .properties import Daemon, Properties
from .watch import Ended


class Client:
    """A connection to loopd, to be used with `with`: what it attached ends with it."""

    def __init__(self, runner: asyncio.Runner, client: client.Client) -> None:
        self._runner = runner
        self._client = client
        self._devices: weakref.WeakValueDictionary[str, Device] = weakref.WeakValueDictionary()

    @classmethod
    def connect(cls, address: str | None = None, *, interactive: bool = False) -> Self:
        """As loopd.client.Client.connect."""
        with contextlib.ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner())
            connecting = client.Client.connect(address, interactive=interactive)
            connected = runner.run(connecting)
            stack.pop_all()
        return cls(runner, connected)

    def close(self) -> None:
        """Leave the bus; whatever was attached over this connection is detached."""
        self._client.close()
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def reconnect(self) -> Reconnected["Device"]:
        """As loopd.client.Client.reconnect."""
        there, gone = self._runner.run(self._client.reconnect())
        return Reconnected(tuple(map(self._device, there)), tuple(map(self._device, gone)))

    def attach(self, file: File, **options: Unpack[AttachOptions]) -> "Device":
        """As loopd.client.Client.attach; the device detaches itself when used with `with`."""

        async def attach() -> client.Device:
            return await self._client.attach(file, **options)

        return self._device(self._runner.run(attach()))

    def device_by_node(self, node: str) -> "Device":
        """As loopd.client.Client.device_by_node."""
        return self._device(self._runner.run(self._client.device_by_node(node)))

    def device_by_fd(self, file: int | SupportsFileno) -> "Device":
        """As loopd.client.Client.device_by_fd."""
        return self._device(self._runner.run(self._client.device_by_fd(file)))

    def named_by_fd(self, file: int | SupportsFileno) -> "Named[Device]":
        """As loopd.client.Client.named_by_fd."""
        device, partition = self._runner.run(self._client.named_by_fd(file))
        return Named(self._device(device), partition)

    def detach_by_fd(self, file: int | SupportsFileno, *, lazy: bool = False) -> bool:
        """As loopd.client.Client.detach_by_fd."""
        return self._runner.run(self._client.detach_by_fd(file, lazy=lazy))

    def daemon(self) -> Daemon:
        """As loopd.client.Client.daemon."""
        return self._runner.run(self._client.daemon())

    def uid(self) -> int:
        """As loopd.client.Client.uid."""
        return self._runner.run(self._client.uid())

    def resize_by_fd(
        self,
        file: int | SupportsFileno,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
        allow_overlap: bool = False,
    ) -> int:
        """As loopd.client.Client.resize_by_fd."""
        resizing = self._client.resize_by_fd(
            file,
            offset=offset,
            size_limit=size_limit,
            force=force,
            allow_overlap=allow_overlap,
        )
        return self._runner.run(resizing)

    def devices(self) -> list[tuple["Device", Properties]]:
        """As loopd.client.Client.devices."""
        found = self._runner.run(self._client.devices())
        return [(self._device(device), properties) for device, properties in found]

    def changes(self, device: "Device | None" = None) -> "Changes":
        """As loopd.client.Client.changes, for a `with` block and a plain `for`."""
        only = None if device is None else device._device  # noqa: SLF001 - it is ours
        return Changes(self._runner, self._client.changes(only), self._device)

    def _device(self, device: client.Device) -> "Device":
        made = self._devices.get(device.path)
        if made is None:
            made = self._devices[device.path] = Device(self._runner, device)
        return made


class Changes:
    """As loopd.client.Changes."""

    def __init__(
        self,
        runner: asyncio.Runner,
        changes: client.Changes[client.Device],
        make: "Callable[[client.Device], Device]",
    ) -> None:
        self._runner = runner
        self._changes = changes
        self._make = make

    def __enter__(self) -> Self:
        self._runner.run(self._changes.__aenter__())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.run(self._changes.__aexit__(exc_type, exc, traceback))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change["Device"]:
        try:
            change = self._runner.run(self._changes.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None
        return Change(change.kind, self._make(change.device), change.properties, change.names)

    @property
    def devices(self) -> list[tuple["Device", Properties]]:
        """As loopd.client.Changes.devices."""
        return [(self._make(device), told) for device, told in self._changes.devices]


class Device:
    """As loopd.client.Device."""

    def __init__(self, runner: asyncio.Runner, device: client.Device) -> None:
        self._runner = runner
        self._device = device
        self.path = device.path
        """The object path."""
        self.node = device.node
        """Such as /dev/loop3."""
        self.diskseq = device.diskseq
        """The kernel's number of this attachment."""

    @property
    def gone(self) -> bool:
        """As loopd.client.Device.gone."""
        return self._device.gone

    def __repr__(self) -> str:
        return repr(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.run(self._device.ensure_detached())

    def detach(self, *, lazy: bool = False) -> bool:
        """As loopd.client.Device.detach."""
        return self._runner.run(self._device.detach(lazy=lazy))

    def resize(
        self,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
        allow_overlap: bool = False,
    ) -> int:
        """As loopd.client.Device.resize."""
        resizing = self._device.resize(
            offset=offset, size_limit=size_limit, force=force, allow_overlap=allow_overlap
        )
        return self._runner.run(resizing)

    def open(self, mode: Literal["r", "rw"] = "r", *, partition: int | None = None) -> OwnedFd:
        """As loopd.client.Device.open."""
        return self._runner.run(self._device.open(mode, partition=partition))

    def hold(self) -> OwnedFd:
        """As loopd.client.Device.hold."""
        return self._runner.run(self._device.hold())

    def set_lifetime(self, lifetime: Lifetime) -> None:
        """As loopd.client.Device.set_lifetime."""
        self._runner.run(self._device.set_lifetime(lifetime))

    def lock(self, kind: Lock) -> None:
        """As loopd.client.Device.lock."""
        self._runner.run(self._device.lock(kind))

    def set_autoclear(self, enable: bool) -> None:
        """As loopd.client.Device.set_autoclear."""
        self._runner.run(self._device.set_autoclear(enable))

    def set_direct_io(self, enable: bool) -> bool:
        """As loopd.client.Device.set_direct_io."""
        return self._runner.run(self._device.set_direct_io(enable))

    def set_reference(self, reference: str) -> None:
        """As loopd.client.Device.set_reference."""
        self._runner.run(self._device.set_reference(reference))

    def set_sector_size(self, size: int) -> None:
        """As loopd.client.Device.set_sector_size."""
        self._runner.run(self._device.set_sector_size(size))

    def rescan_partitions(self) -> int:
        """As loopd.client.Device.rescan_partitions."""
        return self._runner.run(self._device.rescan_partitions())

    def sync(self) -> None:
        """As loopd.client.Device.sync."""
        self._runner.run(self._device.sync())

    def properties(self) -> Properties:
        """As loopd.client.Device.properties."""
        return self._runner.run(self._device.properties())

    def settled(self, timeout: float = SETTLING) -> bool:
        """As loopd.client.Device.settled."""
        return self._runner.run(self._device.settled(timeout))

    def wait_ended(self) -> Ended:
        """As loopd.client.Device.wait_ended."""
        return self._runner.run(self._device.wait_ended())


@contextlib.contextmanager
def attach(
    file: File,
    *,
    address: str | None = None,
    interactive: bool = False,
    **options: Unpack[AttachOptions],
) -> Iterator[Device]:
    """As loopd.client.attach."""
    with Client.connect(address, interactive=interactive) as connected:
        with connected.attach(file, **options) as device:
            yield device
