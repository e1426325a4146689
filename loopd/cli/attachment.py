# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's `attach`, `hold` and `run`: how a device comes, and for the last two, how it ends.

A filesystem may hang, and Ctrl-C has to help: files are opened before any signal is handled, and
whatever takes its time afterwards is given up when one comes.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import time

from loopd import errors
from loopd.client import Client, Device, Lifetime
from loopd.client.image import open_file
from loopd.client.properties import Properties
from loopd.client.watch import Ended
from loopd.errors import LoopError, NotSupported
from loopd.fd import OwnedFd
from loopd.loop.uapi import MAX_REFERENCE

from . import notices, output
from .agent import agent
from .child import run_command, why
from .connection import connect
from .outcome import ExitCode, sentence
from .progress import ProgressBar
from .readiness import settle, tell_ready, tell_stopping
from .signals import Interrupted, Signals
from .stream import complain, say
from .style import Style

# Seconds in which loopd has noticed that a Hold is closed, and between looks.
_LETTING_GO = 1.0
_PAUSE = 0.01
# How long the holder of a lease on the file has. A file server asks its client first.
_LEASE_WAIT = 10.0

_UNTIL = {"user": "until you have logged out", "system": "until somebody detaches it"}


def attach(found: argparse.Namespace) -> int:
    """`loopctl attach`; returns its exit status."""
    if found.lifetime == "connection":
        return hold(found)
    with _opened(found) as file:
        return asyncio.run(_attach(found, file))


def hold(found: argparse.Namespace) -> int:
    """`loopctl hold`; returns its exit status."""
    if found.loop_ref is None:
        found.loop_ref = _default_reference(getattr(found, "default_loop_ref", None))
    with _opened(found) as file:
        return asyncio.run(_hold(found, file))


def _default_reference(name: str | None) -> str | None:
    """A name that nobody has chosen, and that is nobody's mistake: of a unit, for one."""
    if name is None or len(os.fsencode(name)) <= MAX_REFERENCE:
        return name
    say(
        f"the device has no name, because {output.name(name)} is longer than {MAX_REFERENCE} "
        "bytes: --loop-ref gives it one"
    )
    return None


def run(found: argparse.Namespace) -> int:
    """`loopctl run`; returns its exit status."""
    with _opened(found) as file:
        return asyncio.run(_run_with_device(found, file))


def _opened(found: argparse.Namespace) -> OwnedFd:
    if found.in_memory:
        return open_file(found.file, read_only=True, direct_io=False, lease_wait=_LEASE_WAIT)
    return open_file(
        found.file,
        read_only=found.read_only or None,
        direct_io=False if (found.offset or 0) % 512 else _direct_io(found),
        lease_wait=_LEASE_WAIT,
    )


def _direct_io(found: argparse.Namespace) -> bool | None:
    return None if found.direct_io is None else found.direct_io == "on"


async def _attach(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            root = await signals.unless(client.uid()) == 0
            lifetime: Lifetime = found.lifetime or ("system" if root else "user")
            try:
                device, properties = await signals.unless(_attached(client, found, file, lifetime))
            except NotSupported as exc:
                raise NotSupported(_without_lifetime(exc)) from exc
            try:
                signals.check()
                _announce(found, device, properties)
                await notices.tell(found, file, properties)
            except (Interrupted, OSError):
                # Nobody knows of it, so nobody would detach it.
                await device.ensure_detached()
                raise
            if Style(sys.stderr).on_terminal:
                say(f"{_description(found, properties)} {_UNTIL[lifetime]}")
            return ExitCode.OK


def _without_lifetime(exc: NotSupported) -> str:
    """What to do where a device cannot be kept for as long as was asked for."""
    if "logind" not in str(exc):
        return str(exc)
    return f"{exc}; 'loopctl hold' keeps a device while it runs, 'loopctl run' while a command does"


async def _hold(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            device, properties = await signals.unless(_attached(client, found, file))
            description = _description(found, properties)
            try:
                _announce(found, device, properties)
                await notices.tell(found, file, properties)
                say(f"{description} until this ends: press Ctrl-C, or send SIGTERM")
                tell_ready(description)
                ended = await signals.unless(device.wait_ended())
            except Interrupted:
                tell_stopping()
                say(output.farewell(device.node, gone=await device.ensure_detached()))
                return ExitCode.OK
            complain(why(device, ended))
            return ExitCode.NO_DEVICE if ended is Ended.DETACHED else ExitCode.UNAVAILABLE


async def _run_with_device(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(connect(found)) as client:
            device, properties = await signals.unless(_attached(client, found, file))
            command = [argument.replace("{}", device.node) for argument in found.run]
            try:
                _announce(found, device, properties, only_json=True)
                await notices.tell(found, file, properties)
                variables = {"LOOPDEV": device.node}
                # Whatever becomes of loopctl, the node is no other device's as long as it is used.
                with await signals.unless(device.hold()) as held:
                    status = await run_command(
                        command, device, signals, variables=variables, fds=[held.fileno()]
                    )
            finally:
                gone = await _detached_at_last(device)
            if not gone:
                say(output.farewell(device.node, gone=False))
            return status


async def _detached_at_last(device: Device) -> bool:
    """Detach a device, unless what the command has started, and left behind, keeps it."""
    try:
        if await _is_held(device):
            say(f"what the command has left running keeps {device.node}, which goes with the last")
            return True
        return await device.ensure_detached()
    except LoopError as exc:
        complain(f"{device.node}: {sentence(exc)}")  # the command's exit status counts for more
        return True


async def _is_held(device: Device) -> bool:
    """Whether somebody holds it still, when loopd has had the time to notice who does not."""
    deadline = time.monotonic() + _LETTING_GO
    with contextlib.suppress(errors.NoSuchDevice, errors.UnknownObject, errors.BusError):
        while (await device.properties()).holds:
            if time.monotonic() > deadline:
                return True
            await asyncio.sleep(_PAUSE)
    return False


async def _attached(
    client: Client, found: argparse.Namespace, file: OwnedFd, lifetime: Lifetime | None = None
) -> tuple[Device, Properties]:
    async with agent(wanted=found.interactive):
        with ProgressBar(f"copying {output.name(os.path.basename(found.file))}") as progress:
            device = await client.attach(
                file,
                read_only=found.read_only or None,
                offset=found.offset,
                size_limit=found.sizelimit,
                sector_size=found.sector_size,
                partition_scan=found.partscan or None,
                direct_io=_direct_io(found),
                reference=found.loop_ref,
                lock=found.lock,
                lifetime=lifetime,
                allow_overlap=found.allow_overlap or None,
                number=found.number,
                in_memory=found.in_memory,
                progress=progress,
            )
        try:
            await settle(found, device)
            return device, await device.properties()
        except BaseException:
            # Nobody has heard of it, so nobody would detach it.
            await device.ensure_detached()
            raise


def _announce(
    found: argparse.Namespace, device: Device, properties: Properties, *, only_json: bool = False
) -> None:
    """Print the device, at once: whoever started loopctl waits for it."""
    if found.json:
        value = {
            "object": device.path,
            "node": device.node,
            "diskseq": device.diskseq,
            **output.partitions_for_json(properties),
        }
        print(output.as_json(value), flush=True)
    elif not only_json:
        print(device.node, flush=True)


def _description(found: argparse.Namespace, device: Properties) -> str:
    mode = "read-only" if device.read_only else "read-write"
    copy = "a copy of " if found.in_memory else ""
    text = f"{device.node} is {copy}{output.name(found.file)} ({output.size(device.size)}, {mode})"
    if device.partitions:
        text += f", with {', '.join(each.node for each in device.partitions)},"
    return text
