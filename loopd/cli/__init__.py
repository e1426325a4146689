# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl: the commands, on top of `loopd.client`, and the signals that end them.

Results go to stdout, everything else to stderr. What the arguments may be stands in `arguments`,
how results look in `output`, what errors mean in `outcome`.
"""

import argparse
import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from ..client import Client, Device
from ..client.image import name_file, open_file
from ..client.properties import Properties
from ..client.watch import Ended
from ..errors import BusError, LoopError
from ..fd import OwnedFd
from . import output
from .arguments import node_of, parse
from .outcome import SIGNALLED, ExitCode, RunExitCode, exit_code, sentence
from .signals import Interrupted, Signals

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# The terminal sends these to everyone in the foreground, and so to the command itself.
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)

_EXPECTED = (LoopError, BusError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `loopctl`; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the locale has no letters for is no reason to fail.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        status = _main(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _give_up_stdout()
        return SIGNALLED + signal.SIGPIPE
    except OSError as exc:
        _give_up_stdout()
        _say(sentence(exc))
        return ExitCode.FAILED
    return status


def _main(arguments: Sequence[str]) -> int:
    try:
        found = parse(arguments)
    except SystemExit as exc:
        return int(exc.code or 0)
    failed = RunExitCode.FAILED if found.command == "run" else None
    try:
        return _COMMANDS[found.command](found)
    except BrokenPipeError:
        raise
    except Interrupted as exc:
        return SIGNALLED + exc.number
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT
    except _EXPECTED as exc:
        _say(_about(found, exc))
        return failed or exit_code(exc)


def _about(found: argparse.Namespace, exc: Exception) -> str:
    """The sentence, and what it is about where the sentence does not say that."""
    subject = getattr(found, "file", None) or getattr(found, "target", None)
    return sentence(exc) if subject is None else _about_target(subject, exc)


def _about_target(target: str, exc: Exception) -> str:
    name, text = _name(target), sentence(exc)
    return text if name in text or isinstance(exc, OSError | BusError) else f"{name}: {text}"


# --- attach and run -----------------------------------------------------------------------------


def _attach(found: argparse.Namespace) -> int:
    # Opened before any signal is taken care of: a filesystem may hang, and Ctrl-C has to help.
    with open_file(found.file, read_only=found.read_only or None) as file:
        return asyncio.run(_hold(found, file))


async def _hold(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(_connect(found)) as client:
            device, properties = await signals.unless(_attached(client, found, file))
            _announce(found, device)
            name, mode = _name(found.file), "read-only" if properties.read_only else "read-write"
            _say(
                f"{device.node} is {name} ({output.size(properties.size)}, {mode}) until this "
                "ends: press Ctrl-C, or send SIGTERM"
            )
            try:
                ended = await signals.unless(device.wait_ended())
            except Interrupted:
                _say(_farewell(device, gone=await device.ensure_detached()))
                return ExitCode.OK
            _say(_why(device, ended))
            return ExitCode.NO_DEVICE if ended is Ended.DETACHED else ExitCode.UNAVAILABLE


def _run(found: argparse.Namespace) -> int:
    with open_file(found.file, read_only=found.read_only or None) as file:
        return asyncio.run(_run_with_device(found, file))


async def _run_with_device(found: argparse.Namespace, file: OwnedFd) -> int:
    with Signals() as signals:
        async with await signals.unless(_connect(found)) as client:
            device, _ = await signals.unless(_attached(client, found, file))
            try:
                _announce(found, device, only_json=True)
                status = await _run_command(found.run, device, signals)
            finally:
                gone = await _detached_at_last(device)
            if not gone:
                _say(_farewell(device, gone=False))
            return status


async def _detached_at_last(device: Device) -> bool:
    try:
        return await device.ensure_detached()
    except LoopError as exc:
        _say(f"{device.node}: {sentence(exc)}")  # the command's exit status counts for more
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
            _say(_why(device, ended.result()))
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
        _say(f"cannot run {_name(command[0])}: {os.strerror(exc.errno or errno.EIO)}")
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
    device = await client.attach(
        file,
        read_only=found.read_only or None,
        offset=found.offset,
        size_limit=found.sizelimit,
        sector_size=found.sector_size,
        direct_io=None if found.direct_io is None else found.direct_io == "on",
        reference=found.loop_ref,
        allow_overlap=found.allow_overlap or None,
    )
    return device, await device.properties()


def _announce(found: argparse.Namespace, device: Device, *, only_json: bool = False) -> None:
    """Print the device, at once: whoever started loopctl waits for it."""
    if found.json:
        value = {"object": device.path, "node": device.node, "diskseq": device.diskseq}
        print(output.as_json(value), flush=True)
    elif not only_json:
        print(device.node, flush=True)


def _farewell(device: Device, *, gone: bool) -> str:
    if gone:
        return f"detached {device.node}"
    return f"{device.node} is still in use, and goes when its last user closes it"


def _why(device: Device, ended: Ended) -> str:
    return {
        Ended.DETACHED: f"somebody has detached {device.node}",
        Ended.DAEMON_LEFT: f"loopd has stopped, and {device.node} with it",
        Ended.BUS_LOST: f"the bus has closed the connection, and {device.node} goes with it",
    }[ended]


# --- the others ---------------------------------------------------------------------------------


async def _detach(found: argparse.Namespace, client: Client) -> int:
    status, results = ExitCode.OK, []
    for target in found.targets:
        try:
            device = await _device(client, target)
            gone = await device.detach(lazy=found.lazy)
        except (LoopError, OSError) as exc:
            _say(_about_target(target, exc))
            status = status or exit_code(exc)
            continue
        results.append({"object": device.path, "node": device.node, "gone": gone})
        if not gone:
            _say(_farewell(device, gone=False))
    if found.json:
        print(output.as_json({"devices": results}))
    return status


async def _resize(found: argparse.Namespace, client: Client) -> int:
    device = await _device(client, found.target)
    size = await device.resize(offset=found.offset, size_limit=found.sizelimit, force=found.force)
    if found.json:
        print(output.as_json({"object": device.path, "node": device.node, "size": size}))
    else:
        print(f"{device.node}: {output.exact_size(size)}")
    return ExitCode.OK


async def _list(found: argparse.Namespace, client: Client) -> int:
    devices = await client.devices()
    if found.json:
        shown = [output.properties_for_json(device.path, each) for device, each in devices]
        print(output.as_json({"devices": shown}))
    elif devices:
        for_terminal = sys.stdout is not None and sys.stdout.isatty()
        for line in output.device_list([each for _, each in devices], for_terminal=for_terminal):
            print(line)
    return ExitCode.OK


async def _show(found: argparse.Namespace, client: Client) -> int:
    device = await _device(client, found.target)
    properties = await device.properties()
    if found.json:
        print(output.as_json(output.properties_for_json(device.path, properties)))
    else:
        for line in output.properties(properties):
            print(line)
    return ExitCode.OK


async def _device(client: Client, target: str) -> Device:
    if node := node_of(target):
        return await client.device_by_node(node)
    with name_file(target) as file:
        return await client.device_by_fd(file)


def _with_client(
    command: Callable[[argparse.Namespace, Client], Awaitable[int]],
) -> Callable[[argparse.Namespace], int]:
    async def run(found: argparse.Namespace) -> int:
        async with await _connect(found) as client:
            return await command(found, client)

    return lambda found: asyncio.run(run(found))


async def _connect(found: argparse.Namespace) -> Client:
    return await Client.connect(interactive=not found.no_ask_password)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attach": _attach,
    "detach": _with_client(_detach),
    "resize": _with_client(_resize),
    "list": _with_client(_list),
    "show": _with_client(_show),
    "run": _run,
}


# --- streams -----------------------------------------------------------------------------------


def _say(text: str) -> None:
    """Tell the person at the terminal; that nobody can read it is no error."""
    with contextlib.suppress(OSError):
        print(f"loopctl: {text}", file=sys.stderr, flush=True)


def _name(text: str) -> str:
    return output.printable(os.fsencode(text))


def _give_up_stdout() -> None:
    """Keep the interpreter from writing what is left once more at its end."""
    with OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)) as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
