# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's streams and its terminal: results go to stdout, everything else to stderr."""

import contextlib
import os
import sys

from loopd.fd import OwnedFd

from .style import Style


def provide_streams() -> None:
    """Open the standard streams that loopctl was started without.

    The next file that loopctl opens, such as an image, would get the number of the missing stream,
    and a command that loopctl runs would read or write that file. Reading a stdin or writing a
    stdout that was missing is an error; text for a missing stderr is lost.
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
    """Print a notice on stderr; a closed stderr is no error."""
    _say("loopctl:", text)


def complain(text: str) -> None:
    """Print an error on stderr."""
    _say(Style(sys.stderr).red("loopctl:"), text)


def _say(who: str, text: str) -> None:
    with contextlib.suppress(OSError):
        print(who, text, file=sys.stderr, flush=True)


def give_up_stdout() -> None:
    """Keep the interpreter from writing the rest of the buffer at its end."""
    with OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)) as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def in_foreground() -> bool:
    """Whether the terminal's keys reach our process group, as signals and as what is typed."""
    try:
        with OwnedFd(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
