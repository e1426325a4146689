# SPDX-License-Identifier: LGPL-2.1-or-later
"""A progress bar on stderr for long copies, only on a terminal.

Nothing depends on the bar. Where rich is not installed, or cannot draw, there is no bar.
"""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_QUICK = 0.5
"""Seconds that a copy takes before it gets a bar."""


class ProgressBar:
    """To be used with `with`, and called with the bytes that are done and the bytes in all."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begun = time.monotonic()
        self._wanted = (
            sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        )
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        # The next text, such as the question for a password, gets the line for itself.
        if done == total:
            self._end()
        elif self._wanted and time.monotonic() - self._begun >= _QUICK:
            self._show(done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _show(self, done: int, total: int) -> None:
        try:
            if self._bar is None:
                self._bar = _new_bar()
            _draw(self._bar, self._what, done, total)
        except (ImportError, OSError):  # no rich, or no terminal any more
            self._wanted = False

    def _end(self) -> None:
        self._wanted = False
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.stop()


def _new_bar() -> "Progress":
    # Imported late: few copies take so long, and the import takes as long as many a command.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)
    console.width -= len("^C ")  # which a terminal shows behind the bar, to be erased with it
    name = Column(no_wrap=True, overflow="ellipsis", max_width=console.width // 2)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )


def _draw(bar: "Progress", what: str, done: int, total: int) -> None:
    if bar.task_ids:
        bar.update(bar.task_ids[0], completed=done, refresh=True)
        return
    bar.start()
    bar.console.show_cursor(True)  # if loopctl is killed, the cursor would stay hidden
    bar.add_task(what, completed=done, total=total)
