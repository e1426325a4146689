# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's commands that ask loopd and end: detach, resize, rescan, list, show and set."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from loopd.client import Client, Device
from loopd.client.image import name_file
from loopd.client.properties import Properties
from loopd.errors import LoopError

from . import columns, notices, output
from .connection import associated, connected, find, find_disk, find_partition
from .outcome import ExitCode, about, exit_code
from .readiness import settle
from .stream import complain, say
from .style import Style
from .values import node_of


def detach(found: argparse.Namespace) -> int:
    """`loopctl detach`; returns its exit status."""
    return _run(_detach, found, asking=True)


def resize(found: argparse.Namespace) -> int:
    """`loopctl resize`; returns its exit status."""
    return _run(_resize, found, asking=True)


def rescan(found: argparse.Namespace) -> int:
    """`loopctl rescan`; returns its exit status."""
    return _run(_rescan, found, asking=True)


def list_devices(found: argparse.Namespace) -> int:
    """`loopctl list`; returns its exit status."""
    return _run(_list, found)


def show(found: argparse.Namespace) -> int:
    """`loopctl show`; returns its exit status."""
    return _run(_show, found)


def change(found: argparse.Namespace) -> int:
    """`loopctl set`; returns its exit status."""
    return _run(_set, found, asking=True)


def _run(
    command: Callable[[argparse.Namespace, Client], Awaitable[int]],
    found: argparse.Namespace,
    *,
    asking: bool = False,
) -> int:
    async def run() -> int:
        async with connected(found, asking=asking) as client:
            return await command(found, client)

    return asyncio.run(run())


async def _detach(found: argparse.Namespace, client: Client) -> int:
    status, results = ExitCode.OK, []
    for target in found.targets or await _chosen(found, client):
        try:
            device = await find_disk(client, target) if isinstance(target, str) else target
            gone = await device.detach(lazy=found.lazy)
        except (LoopError, OSError) as exc:
            complain(about(target if isinstance(target, str) else target.node, exc))
            status = status or exit_code(exc)
            continue
        results.append({"object": device.path, "node": device.node, "gone": gone})
        if not gone:
            say(output.farewell(device.node, gone=False))
    if found.json:
        print(output.as_json({"devices": results}))
    return status


async def _chosen(found: argparse.Namespace, client: Client) -> list[Device]:
    """The devices that are not named one by one: the last one first, which may use another."""
    if found.all:
        uid = await client.uid()
        devices = [device for device, told in await client.devices() if told.owner == uid]
    else:
        devices = [device for device, _ in await associated(client, found.associated)]
    return sorted(devices, key=lambda each: -each.diskseq)


async def _resize(found: argparse.Namespace, client: Client) -> int:
    device, partition = await find(client, found.target)
    if partition is None:
        node = device.node
        size = await device.resize(
            offset=found.offset,
            size_limit=found.sizelimit,
            force=found.force,
            allow_overlap=found.allow_overlap,
        )
    else:
        node = (await find_partition(device, partition)).node
        with name_file(node) as named:
            size = await client.resize_by_fd(
                named,
                offset=found.offset,
                size_limit=found.sizelimit,
                force=found.force,
                allow_overlap=found.allow_overlap,
            )
    if found.json:
        print(output.as_json({"object": device.path, "node": node, "size": size}))
    else:
        print(f"{node}: {output.exact_size(size)}")
    return ExitCode.OK


async def _rescan(found: argparse.Namespace, client: Client) -> int:
    device = await find_disk(client, found.target)
    await device.rescan_partitions()
    await settle(found, device)
    properties = await device.properties()
    if found.json:
        value = {
            "object": device.path,
            "node": device.node,
            **output.partitions_for_json(properties),
        }
        print(output.as_json(value))
    else:
        for each in properties.partitions:
            print(each.node)
    if properties.missing_partitions:
        say(output.missing_partitions(properties))
    return ExitCode.OK


async def _wanted(found: argparse.Namespace, client: Client) -> list[Properties]:
    """The devices to list."""
    if found.target is not None:
        return [await (await find_disk(client, found.target)).properties()]
    if found.associated is None:
        return [told for _, told in await client.devices()]
    try:
        pairs = await associated(client, found.associated)
    except FileNotFoundError:
        return []  # as losetup has it: no device has a file that is not there
    return [told for _, told in pairs if found.offset in (None, told.offset)]


async def _list(found: argparse.Namespace, client: Client) -> int:
    devices = await _wanted(found, client)
    names = tuple(columns.COLUMNS) if found.output_all else found.output or columns.DEFAULT
    if found.json:
        shown = [columns.for_json(each, names) for each in devices]
        print(output.as_json({"loopdevices": shown}))
        return ExitCode.OK
    if not devices:
        return ExitCode.OK
    style, headings = Style(sys.stdout), not found.noheadings
    in_bytes = found.bytes or found.raw or not style.on_terminal
    rows = columns.listed(devices, names, in_bytes=in_bytes, headings=headings)
    if found.raw:
        lines = columns.raw(rows)
    elif not style.on_terminal:
        lines = ["\t".join(row) for row in rows]
    else:
        lines = columns.aligned(rows, names, style.width)
        for index, each in enumerate(devices, start=len(lines) - len(devices)):
            if each.state != "attached":
                lines[index] = style.yellow(lines[index])
        if headings:
            lines[0] = style.bold(lines[0])
    for line in lines:
        print(line)
    return ExitCode.OK


async def _show(found: argparse.Namespace, client: Client) -> int:
    device, number = await find(client, found.target)
    label = Style(sys.stdout).bold
    if number is not None:
        partition = await find_partition(device, number)
        if found.json:
            value = {"object": device.path, "disk": device.node, **partition._asdict()}
            print(output.as_json(value))
            return ExitCode.OK
        lines = output.partition(partition, device.node, label)
    else:
        properties = await device.properties()
        if found.json:
            print(output.as_json(output.properties_for_json(device.path, properties)))
            return ExitCode.OK
        lines = output.properties(properties, label)
    for line in lines:
        print(line)
    return ExitCode.OK


async def _set(found: argparse.Namespace, client: Client) -> int:
    device = await find_disk(client, found.target)
    if found.sector_size is not None:
        await device.set_sector_size(found.sector_size)
    if found.direct_io is not None:
        wanted = found.direct_io == "on"
        if await device.set_direct_io(wanted) is not wanted:
            await _tell_why_buffered(found.target, device)
    if found.loop_ref is not None:
        await device.set_reference(found.loop_ref)
    if found.lifetime is not None:
        await device.set_lifetime(found.lifetime)
    if found.autoclear is not None:  # which goes by the lifetime
        await device.set_autoclear(found.autoclear == "on")
    if found.json:
        print(output.as_json(output.properties_for_json(device.path, await device.properties())))
    return ExitCode.OK


async def _tell_why_buffered(target: str, device: Device) -> None:
    properties = await device.properties()
    if node_of(target):
        say(notices.without_direct_io(properties, None))
        return
    with name_file(target) as file:
        say(notices.without_direct_io(properties, file))
