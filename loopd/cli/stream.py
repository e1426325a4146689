# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's streams and its terminal: results go to stdout, everything else to stderr."""

import contextlib
import os
import sys

from loopd.fd import OwnedFd

from .style import Style


def provide_streams() -> None:
    """Have the three standard streams, also where loopctl was started without one of them.

    The next file that is opened, such as an image, would get its number, and be what a command that
    loopctl runs reads from or writes to. What would be read from a missing stdin or written to a
    missing stdout is an error; what would be told on stderr is lost.
    """
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest number that is free
            os.set_inheritable(opened, True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


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
