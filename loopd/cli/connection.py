# SPDX-License-Identifier: LGPL-2.1-or-later
"""How loopctl's commands reach loopd and find the devices that people name."""

import argparse
import contextlib
import os
from collections.abc import AsyncIterator

from loopd import errors
from loopd.client import Client, Device, Named
from loopd.client.image import name_file
from loopd.client.properties import Partition, Properties
from loopd.errors import InvalidArgs, NoSuchDevice

from .agent import agent
from .output import printable
from .stream import complain
from .values import node_of


async def connect(found: argparse.Namespace) -> Client:
    """A client. An administrator is told of mistakes in loopd's settings, once a command."""
    client = await Client.connect(interactive=found.interactive)
    if os.geteuid() != 0:
        return client
    try:
        # One that does not answer this may answer the command.
        with contextlib.suppress(errors.LoopError):
            # The root of a user namespace is somebody else.
            error = "" if await client.uid() else (await client.daemon()).configuration_error
            if error:
                complain(f"{printable(error)}; put that right, and restart loopd")
    except BaseException:
        client.close()
        raise
    return client


@contextlib.asynccontextmanager
async def connected(found: argparse.Namespace, *, asking: bool = False) -> AsyncIterator[Client]:
    """A client; with `asking`, questions for a password can be answered in the terminal."""
    async with await connect(found) as client:
        async with agent(wanted=asking and found.interactive):
            yield client


async def find(client: Client, target: str) -> Named[Device]:
    """The device that a DEVICE-OR-FILE names, or the partition of one."""
    if node := node_of(target):
        return Named(await client.device_by_node(node.disk), node.partition)
    with name_file(target) as file:
        return await client.named_by_fd(file)


async def find_disk(client: Client, target: str) -> Device:
    """The device that a DEVICE-OR-FILE names, for what cannot be done to a partition.

    Raises InvalidArgs for a partition.
    """
    device, partition = await find(client, target)
    if partition is not None:
        raise InvalidArgs(f"{device.node}p{partition} is a partition: name the disk, {device.node}")
    return device


async def find_partition(device: Device, number: int) -> Partition:
    """A partition of a device. Raises NoSuchDevice."""
    for partition in (await device.properties()).partitions:
        if partition.number == number:
            return partition
    raise NoSuchDevice(f"{device.node} has no partition {number}")


async def associated(client: Client, file: str) -> list[tuple[Device, Properties]]:
    """All devices that have this file, or this block device, behind them."""
    with name_file(file) as named:
        status = os.fstat(named.fileno())
    wanted = (status.st_dev, status.st_ino)
    return [
        (device, found)
        for device, found in await client.devices()
        if (found.backing_device, found.backing_inode) == wanted
    ]
