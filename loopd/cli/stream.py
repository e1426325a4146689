# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's streams and its terminal: results go to stdout, everything else to stderr."""

import contextlib
import os
import sys

from ..fd import OwnedFd
from .style import Style


def say(text: str) -> None:
    """Tell the person at the terminal; that nobody can read it is no error."""
    _say("loopctl:", text)


def complain(text: str) -> None:
    """Tell what went wrong."""
    _say(Style(sys.stderr).red("loopctl:"), text)


def _say(who: str, text: str) -> None:
    with contextlib.suppress(OSError):
        print(who, text, file=sys.stderr, flush=True)


def give_up_stdout() -> None:
    """Keep the interpreter from writing what is left once more at its end."""
    with OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)) as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def in_foreground() -> bool:
    """Whether the terminal's keys reach our process group, as signals and as what is typed."""
    try:
        with OwnedFd(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
