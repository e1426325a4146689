# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl: runs the command that was named, and turns its end into an exit status.

Each command has a module of its name, with its options and its action. `arguments` reads the
command line, `output` and `columns` lay out results, `outcome` says what errors mean.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from loopd.errors import BusError, LoopError

from .arguments import parse
from .outcome import SIGNALLED, ExitCode, RunExitCode, about, exit_code, sentence
from .signals import Interrupted
from .stream import complain, give_up_stdout, provide_streams

_EXPECTED = (LoopError, BusError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `loopctl`; returns its exit status."""
    provide_streams()
    for stream in (sys.stdout, sys.stderr):
        # A file name may have letters that the locale lacks: they are escaped.
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
        return int(found.action(found))
    except BrokenPipeError:
        raise
    except Interrupted as exc:
        return SIGNALLED + exc.number
    except KeyboardInterrupt:
        return SIGNALLED + signal.SIGINT
    except _EXPECTED as exc:
        complain(_about(found, exc))
        if isinstance(exc, OSError) and exc.filename is None:
            give_up_stdout()  # the interpreter would report it again
        return failed or exit_code(exc)


def _about(found: argparse.Namespace, exc: Exception) -> str:
    """The sentence, with the file or device in front unless the sentence names it."""
    subject = getattr(found, "file", None) or getattr(found, "target", None)
    return sentence(exc) if subject is None else about(subject, exc)
