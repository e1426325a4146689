# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log lines go: the journal with fields, or standard error; safe to show, never too many.

A line is about a user where its `extra` has a UID, and each user has so many lines only, because
who calls loopd over and over must not push everybody else's lines out of the journal.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping

FIELDS = ("ACTION", "DEVICE", "DISKSEQ", "RESULT", "SENDER", "UID")
"""The keys of `extra` that become fields of the journal, beside MESSAGE and PRIORITY."""

# Lines about a user, or about nobody: so many at once, and then one in so many seconds.
_BURST = 60
_PAUSE = 2.0
_BURST_OF_NOBODY = 300
_PAUSE_OF_NOBODY = 0.1
_ROOT = "0"
_MANY = 256
_LONGEST = 1000
# Control characters, lone surrogates, and what turns around the text that follows.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_BUT_NEWLINE = re.compile(_UNSAFE.pattern.replace("\0-\x1f", "\0-\x09\x0b-\x1f"))
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}


def start(*, debug: bool) -> None:
    """Send all that is logged where it belongs; `debug` includes every step."""
    send = _journal() if _is_journal(sys.stderr.fileno()) else None
    handler = Journal(send) if send else logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines("%(message)s" if send else "loopd: %(message)s"))
    if not debug:
        handler.addFilter(Limit())
    # Of each record logging finds out where it was made and by which process, which no line has.
    logging._srcfile = None  # noqa: SLF001  as its documentation says
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.addHandler(handler)


def _is_journal(fd: int) -> bool:
    """Whether systemd connected an fd to the journal; it says so in the environment."""
    status = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _journal() -> Callable[..., None] | None:
    try:
        from systemd.journal import send
    except ImportError:
        return None
    sender: Callable[..., None] = send
    return sender


class Lines(logging.Formatter):
    """One line a record, of nothing but characters to be shown; a traceback keeps its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Format it."""
        return _UNSAFE_BUT_NEWLINE.sub("\N{REPLACEMENT CHARACTER}", super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        """Format the line itself."""
        message = safe(record.message)
        if left_out := getattr(record, "left_out", 0):
            message += f" ({left_out} lines before this one were left out: too many)"
        record.message = message
        return super().formatMessage(record)


def safe(text: str) -> str:
    """A text without what a terminal could take for more than text, and not too long."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text[:_LONGEST])


class Limit(logging.Filter):
    """Lets so many lines pass about each user, and notes how many it did not."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._budgets: dict[str | None, _Budget] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether there is room for it, as there is for root's and for our own errors always."""
        about = getattr(record, "UID", None)
        uid = None if about is None else str(about)
        if uid == _ROOT or (uid is None and record.levelno >= logging.ERROR):
            return True
        budget = self._budgets.get(uid)
        if budget is None:
            if len(self._budgets) >= _MANY:
                self._budgets = {k: v for k, v in self._budgets.items() if not v.full}
            nobody = uid is None
            budget = self._budgets[uid] = _Budget(
                _BURST_OF_NOBODY if nobody else _BURST,
                _PAUSE_OF_NOBODY if nobody else _PAUSE,
                self._now,
            )
        left_out = budget.take()
        if left_out is None:
            return False
        record.left_out = left_out
        return True


class _Budget:
    def __init__(self, burst: int, pause: float, now: Callable[[], float]) -> None:
        self._burst = burst
        self._pause = pause
        self._now = now
        self._left = float(burst)
        self._filled = now()
        self._left_out = 0

    def take(self) -> int | None:
        """How many were left out before this one; None if it is, too."""
        self._fill()
        if self._left < 1:
            self._left_out += 1
            return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out

    @property
    def full(self) -> bool:
        self._fill()
        return self._left >= self._burst

    def _fill(self) -> None:
        now = self._now()
        self._left = min(self._left + (now - self._filled) / self._pause, self._burst)
        self._filled = now


class Journal(logging.Handler):
    """Sends records to the journal.

    systemd's own handler would also send the arguments of each message as they came.
    """

    def __init__(self, send: Callable[..., None]) -> None:
        """`send` is that of systemd.journal."""
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Send it."""
        fields: Mapping[str, str] = {
            name: safe(str(value))
            for name in FIELDS
            if (value := getattr(record, name, None)) is not None
        }
        try:
            self._send(
                self.format(record),
                PRIORITY=str(_PRIORITIES.get(record.levelno, 7)),
                SYSLOG_IDENTIFIER="loopd",
                # Else the library looks for it on the stack, in a third of the time of a line.
                CODE_FUNC=record.name,
                **fields,
            )
        # What cannot be logged cannot be helped.
        except OSError:
            self.handleError(record)
