# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl: the commands, on top of `loopd.client`, and how each of them ends.

Those that keep a device are in `attachment`. What the arguments may be stands in `arguments`, how
results look in `output`, what errors mean in `outcome`.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

from ..client import Client, Device
from ..client.image import name_file
from ..errors import BusError, LoopError
from . import output
from .arguments import node_of, parse
from .attachment import attach, hold, run
from .outcome import SIGNALLED, ExitCode, RunExitCode, exit_code, sentence
from .signals import Interrupted
from .stream import give_up_stdout, say

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
        give_up_stdout()
        return SIGNALLED + signal.SIGPIPE
    except OSError as exc:
        give_up_stdout()
        say(sentence(exc))
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
        say(_about(found, exc))
        return failed or exit_code(exc)


def _about(found: argparse.Namespace, exc: Exception) -> str:
    """The sentence, and what it is about where the sentence does not say that."""
    subject = getattr(found, "file", None) or getattr(found, "target", None)
    return sentence(exc) if subject is None else _about_target(subject, exc)


def _about_target(target: str, exc: Exception) -> str:
    name, text = output.name(target), sentence(exc)
    return text if name in text or isinstance(exc, OSError | BusError) else f"{name}: {text}"


# --- the commands -------------------------------------------------------------------------------


async def _detach(found: argparse.Namespace, client: Client) -> int:
    status, results = ExitCode.OK, []
    for target in found.targets:
        try:
            device = await _device(client, target)
            gone = await device.detach(lazy=found.lazy)
        except (LoopError, OSError) as exc:
            say(_about_target(target, exc))
            status = status or exit_code(exc)
            continue
        results.append({"object": device.path, "node": device.node, "gone": gone})
        if not gone:
            say(output.farewell(device.node, gone=False))
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
    async def connected(found: argparse.Namespace) -> int:
        async with await Client.connect(interactive=found.interactive) as client:
            return await command(found, client)

    return lambda found: asyncio.run(connected(found))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attach": attach,
    "hold": hold,
    "detach": _with_client(_detach),
    "resize": _with_client(_resize),
    "list": _with_client(_list),
    "show": _with_client(_show),
    "run": run,
}
