# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's `attach`, `hold` and `run`: a device for as long as they last, and what ends them.

A filesystem may hang, and Ctrl-C has to help: files are opened before any signal is handled, and
whatever takes its time afterwards is given up when one comes.
"""

import argparse
import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from ..client import Client, Device
from ..client.image import open_file
from ..client.properties import Properties
from ..client.watch import Ended
from ..errors import LoopError
from ..fd import OwnedFd
from . import output
from .outcome import SIGNALLED, ExitCode, RunExitCode, sentence
from .progress import ProgressBar
from .readiness import tell_ready, tell_stopping
from .signals import Interrupted, Signals
from .stream import say

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# The terminal sends these to everyone in the foreground, and so to the command itself.
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


def attach(found: argparse.Namespace) -> int:
    """`loopctl attach`; returns its exit status."""
    return hold(found)


def hold(found: argparse.Namespace) -> int:
    """`loopctl hold`; returns its exit status."""
    with _opened(found) as file:
        return asyncio.run(_hold(found, file))


def _opened(found: argparse.Namespace) -> OwnedFd:
    if found.in_memory:
        return open_file(found.file, read_only=True, direct_io=False)
    return open_file(found.file, read_only=found.read_only or None, direct_io=_direct_io(found))


def _direct_io(found: argparse.Namespace) -> bool | None:
    return None if found.direct_io is None else found.direct_io == "on"


async def _hold(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(Client.connect(interactive=found.interactive)) as client:
            device, properties = await signals.unless(_attached(client, found, file))
            description = _description(found, properties)
            try:
                _announce(found, device, properties)
                say(f"{description} until this ends: press Ctrl-C, or send SIGTERM")
                await signals.unless(tell_ready(properties, description))
                ended = await signals.unless(device.wait_ended())
            except Interrupted:
                tell_stopping()
                say(output.farewell(device.node, gone=await device.ensure_detached()))
                return ExitCode.OK
            say(_why(device, ended))
            return ExitCode.NO_DEVICE if ended is Ended.DETACHED else ExitCode.UNAVAILABLE


def run(found: argparse.Namespace) -> int:
    """`loopctl run`; returns its exit status."""
    with _opened(found) as file:
        return asyncio.run(_run_with_device(found, file))


async def _run_with_device(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(Client.connect(interactive=found.interactive)) as client:
            device, properties = await signals.unless(_attached(client, found, file))
            try:
                _announce(found, device, properties, only_json=True)
                status = await _run_command(found.run, device, signals)
            finally:
                gone = await _detached_at_last(device)
            if not gone:
                say(output.farewell(device.node, gone=False))
            return status


async def _detached_at_last(device: Device) -> bool:
    try:
        return await device.ensure_detached()
    except LoopError as exc:
        say(f"{device.node}: {sentence(exc)}")  # the command's exit status counts for more
        return True


async def _run_command(arguments: Sequence[str], device: Device, signals: Signals) -> int:
    signals.check()
    child = _start([argument.replace("{}", device.node) for argument in arguments], device)
    if not isinstance(child, subprocess.Popen):
        return child

    def forward(number: int) -> None:
        if number not in _FROM_TERMINAL or not _in_foreground():
            child.send_signal(number)

    signals.redirect(_FORWARDED, forward)
    with _exit_of(child) as exited:
        ended = asyncio.ensure_future(device.wait_ended())
        waiting: set[asyncio.Future[Any]] = {exited, ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():
            say(_why(device, ended.result()))
            await exited
        ended.cancel()
        await asyncio.wait({ended})
    signals.release()
    status = child.wait()
    return status if status >= 0 else SIGNALLED - status


def _start(command: Sequence[str], device: Device) -> subprocess.Popen[bytes] | RunExitCode:
    try:
        return subprocess.Popen(command, env={**os.environ, "LOOPDEV": device.node})
    except OSError as exc:
        say(f"cannot run {output.name(command[0])}: {os.strerror(exc.errno or errno.EIO)}")
        missing = exc.errno == errno.ENOENT
        return RunExitCode.NOT_FOUND if missing else RunExitCode.CANNOT_EXECUTE


@contextlib.contextmanager
def _exit_of(child: subprocess.Popen[bytes]) -> Iterator[asyncio.Future[None]]:
    """A future that is done when the child has ended."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        loop.remove_reader(pidfd.fileno())
        exited.set_result(None)

    with OwnedFd(os.pidfd_open(child.pid)) as pidfd:
        loop.add_reader(pidfd.fileno(), end)
        try:
            yield exited
        finally:
            loop.remove_reader(pidfd.fileno())


def _in_foreground() -> bool:
    """Whether the terminal's keys send their signals to our process group."""
    try:
        with OwnedFd(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


async def _attached(
    client: Client, found: argparse.Namespace, file: OwnedFd
) -> tuple[Device, Properties]:
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
            allow_overlap=found.allow_overlap or None,
            number=found.number,
            in_memory=found.in_memory,
            progress=progress,
        )
    return device, await device.properties()


def _announce(
    found: argparse.Namespace, device: Device, properties: Properties, *, only_json: bool = False
) -> None:
    """Print the device, at once: whoever started loopctl waits for it."""
    if found.json:
        value = {
            "object": device.path,
            "node": device.node,
            "diskseq": device.diskseq,
            "partitions": output.partitions_for_json(properties),
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


def _why(device: Device, ended: Ended) -> str:
    return {
        Ended.DETACHED: f"somebody has detached {device.node}",
        Ended.DAEMON_LEFT: f"loopd has stopped, and {device.node} with it",
        Ended.BUS_LOST: f"the bus has closed the connection, and {device.node} goes with it",
    }[ended]
