# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl: how its commands are found, and how each of them ends.

What they do is in `attachment`, `opening`, `monitoring` and `commands`. What the arguments may be
stands in `arguments`, how results look in `output` and `columns`, what errors mean in `outcome`.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from loopd.errors import BusError, LoopError

from . import commands
from .arguments import parse
from .attachment import attach, hold, run
from .monitoring import monitor
from .opening import open_device
from .outcome import SIGNALLED, ExitCode, RunExitCode, about, exit_code, sentence
from .signals import Interrupted
from .stream import complain, give_up_stdout, provide_streams

_EXPECTED = (LoopError, BusError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `loopctl`; returns its exit status."""
    provide_streams()
    for stream in (sys.stdout, sys.stderr):
        # A name that the locale has no letters for is no reason to fail.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        status = _main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        give_up_stdout()
        return SIGNALLED + signal.SIGPIPE
    except OSError as exc:
        give_up_stdout()
        complain(sentence(exc))
        return ExitCode.FAILED
    return status


def _main(arguments: Sequence[str]) -> int:
    try:
        found = parse(arguments)
    except SystemExit as exc:
        return int(exc.code or 0)
    failed = RunExitCode.FAILED if found.command in ("run", "open") else None
    try:
        return _COMMANDS[found.command](found)
    except BrokenPipeError:
        raise
    except Interrupted as exc:
        return SIGNALLED + exc.number
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT
    except _EXPECTED as exc:
        complain(_about(found, exc))
        if isinstance(exc, OSError) and exc.filename is None:
            give_up_stdout()  # it would be told once more
        return failed or exit_code(exc)


def _about(found: argparse.Namespace, exc: Exception) -> str:
    """The sentence, and what it is about where the sentence does not say that."""
    subject = getattr(found, "file", None) or getattr(found, "target", None)
    return sentence(exc) if subject is None else about(subject, exc)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attach": attach,
    "hold": hold,
    "detach": commands.detach,
    "resize": commands.resize,
    "rescan": commands.rescan,
    "list": commands.list_devices,
    "show": commands.show,
    "set": commands.change,
    "open": open_device,
    "monitor": monitor,
    "run": run,
}
