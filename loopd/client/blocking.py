# SPDX-License-Identifier: LGPL-2.1-or-later
"""`loopd.client` for programs without asyncio: the same names, arguments and errors, and they wait.

    with attach("disk.img") as device:
        print(device.node)

Each client has an event loop of its own, which runs during calls only. A client and its devices
belong to one thread.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Self

from .. import client
from ..fd import OwnedFd
from . import File, Lifetime, Lock, SupportsFileno
from .properties import Properties
from .watch import Ended


class Client:
    """A connection to loopd, to be used with `with`: what it attached ends with it."""

    def __init__(self, runner: asyncio.Runner, client: client.Client) -> None:
        self._runner = runner
        self._client = client

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

    def attach(self, file: File, **options: Any) -> "Device":
        """As loopd.client.Client.attach; the device detaches itself when used with `with`."""

        async def attach() -> client.Device:
            return await self._client.attach(file, **options)

        return Device(self._runner, self._runner.run(attach()))

    def device_by_node(self, node: str) -> "Device":
        """As loopd.client.Client.device_by_node."""
        return Device(self._runner, self._runner.run(self._client.device_by_node(node)))

    def device_by_fd(self, file: int | SupportsFileno) -> "Device":
        """As loopd.client.Client.device_by_fd."""
        return Device(self._runner, self._runner.run(self._client.device_by_fd(file)))

    def resize_by_fd(
        self,
        file: int | SupportsFileno,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
    ) -> int:
        """As loopd.client.Client.resize_by_fd."""
        resizing = self._client.resize_by_fd(
            file, offset=offset, size_limit=size_limit, force=force
        )
        return self._runner.run(resizing)

    def devices(self) -> list[tuple["Device", Properties]]:
        """As loopd.client.Client.devices."""
        found = self._runner.run(self._client.devices())
        return [(Device(self._runner, device), properties) for device, properties in found]


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
        self, *, offset: int | None = None, size_limit: int | None = None, force: bool = False
    ) -> int:
        """As loopd.client.Device.resize."""
        resizing = self._device.resize(offset=offset, size_limit=size_limit, force=force)
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

    def wait_ended(self) -> Ended:
        """As loopd.client.Device.wait_ended."""
        return self._runner.run(self._device.wait_ended())


@contextlib.contextmanager
def attach(
    file: File, *, address: str | None = None, interactive: bool = False, **options: Any
) -> Iterator[Device]:
    """As loopd.client.attach."""
    with Client.connect(address, interactive=interactive) as connected:
        with connected.attach(file, **options) as device:
            yield device
