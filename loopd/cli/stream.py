# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl's streams: results go to stdout, everything else to stderr."""

import contextlib
import os
import sys

from ..fd import OwnedFd


def say(text: str) -> None:
    """Tell the person at the terminal; that nobody can read it is no error."""
    with contextlib.suppress(OSError):
        print(f"loopctl: {text}", file=sys.stderr, flush=True)


def give_up_stdout() -> None:
    """Keep the interpreter from writing what is left once more at its end."""
    with OwnedFd(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)) as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
