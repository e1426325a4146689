# SPDX-License-Identifier: LGPL-2.1-or-later
"""Colours, and how wide a terminal is: for people at a terminal that can, unless they say no.

NO_COLOR of any value says no, see https://no-color.org.
"""

import os
import shutil
from typing import TextIO


class Style:
    """How to write to a stream: plainly, unless it is a terminal."""

    def __init__(self, stream: TextIO | None) -> None:
        self.on_terminal = stream is not None and stream.isatty()
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._colours = self.on_terminal and not dumb and not os.environ.get("NO_COLOR")

    @property
    def width(self) -> int:
        """Columns of the terminal; COLUMNS says otherwise."""
        return shutil.get_terminal_size().columns

    def bold(self, text: str) -> str:
        """For headings."""
        return self._in("1", text)

    def red(self, text: str) -> str:
        """For what went wrong, or is gone."""
        return self._in("31", text)

    def green(self, text: str) -> str:
        """For what is new."""
        return self._in("32", text)

    def yellow(self, text: str) -> str:
        """For what is about to go, or has changed."""
        return self._in("33", text)

    def _in(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text
