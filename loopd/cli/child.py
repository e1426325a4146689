# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command that `run` and `open` run: signals are passed on to it, its exit status is theirs."""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loopd.client import Device
from loopd.client.watch import Ended
from loopd.fd import OwnedFd

from . import output
from .outcome import SIGNALLED, RunExitCode
from .signals import Signals
from .stream import complain, in_foreground, say

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# The terminal sends these to everyone in the foreground, and so to the command itself.
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


async def run_command(
    command: Sequence[str],
    device: Device,
    signals: Signals,
    *,
    variables: Mapping[str, str],
    fds: Sequence[int] = (),
) -> int:
    """Run a command to its end, say if the device ends before that; returns its exit status.

    `variables` are added to the environment, `fds` are inherited under their numbers.
    """
    signals.check()
    child = _start(command, variables, fds)
    if not isinstance(child, subprocess.Popen):
        return child

    def forward(number: int) -> None:
        if number not in _FROM_TERMINAL or not in_foreground():
            child.send_signal(number)

    signals.redirect(_FORWARDED, forward)
    with _exit_of(child) as exited:
        ended = asyncio.ensure_future(device.wait_ended())
        waiting: set[asyncio.Future[Any]] = {exited, ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():
            say(why(device, ended.result()))
            await exited
        ended.cancel()
        await asyncio.wait({ended})
    signals.release()
    status = child.wait()
    return status if status >= 0 else SIGNALLED - status


def why(device: Device, ended: Ended) -> str:
    """What to say of a device that ended."""
    return {
        Ended.DETACHED: f"somebody has detached {device.node}",
        Ended.DAEMON_LEFT: f"loopd has stopped, and {device.node} with it",
        Ended.BUS_LOST: f"the bus has closed the connection, and {device.node} goes with it",
    }[ended]


def _start(
    command: Sequence[str], variables: Mapping[str, str], fds: Sequence[int]
) -> subprocess.Popen[bytes] | RunExitCode:
    try:
        return subprocess.Popen(command, env={**os.environ, **variables}, pass_fds=fds)
    except OSError as exc:
        complain(f"cannot run {output.name(command[0])}: {os.strerror(exc.errno or errno.EIO)}")
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
