# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log lines: their fields, what is never in them, and how many one user can cause."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopd.daemon.host import journal

USER, OTHER = 1000, 1001


def record(message: str, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("loopd.test").makeRecord(
        "loopd.test", level, "file.py", 1, message, (), None, extra=extra
    )


# What a line may say


def line(made: logging.LogRecord) -> str:
    return journal.Lines("loopd: %(message)s").format(made)


@given(st.text(st.characters(), max_size=300))
def test_a_line_is_one_line_whatever_a_client_has_written_into_it(text: str) -> None:
    """Forged log lines."""
    shown = line(record("Resize: %s".replace("%s", text.replace("%", "%%"))))
    assert len(shown.splitlines()) == 1
    assert not any(ord(each) < 0x20 or 0x7F <= ord(each) < 0xA0 for each in shown)
    shown.encode()  # no lone surrogates


@pytest.mark.parametrize(
    "text", ["a\nloopd: b", "\x1b[2J", "a\rb", "\x9b31m", "\u202etxt.exe", "\u2028", "\udcff", "\0"]
)
def test_what_could_be_taken_for_more_than_text_is_replaced(text: str) -> None:
    assert "\N{REPLACEMENT CHARACTER}" in line(record(text))


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Größe: 5 MiB, 日本語, /dev/loop3, fine"
    assert line(record(text)) == f"loopd: {text}"


def test_a_long_line_is_cut() -> None:
    assert len(line(record("x" * 100_000))) < 2000


def test_a_traceback_keeps_its_lines_and_nothing_else() -> None:
    try:
        raise ValueError("bad\x1b[31m\nvalue")
    except ValueError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
    shown = line(made)
    assert shown.startswith("loopd: it failed\nTraceback")
    assert "\x1b" not in shown
    assert "ValueError: bad\N{REPLACEMENT CHARACTER}[31m" in shown


# Fields


class Sent(list[dict[str, str]]):
    """What the journal was sent."""

    def __call__(self, message: str, **fields: str) -> None:
        self.append({"MESSAGE": message, **fields})


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def to_journal(sent: Sent) -> Callable[..., None]:
    handler = journal.Journal(sent)
    handler.setFormatter(journal.Lines("%(message)s"))

    def send(message: str, level: int = logging.INFO, **extra: Any) -> None:
        handler.handle(record(message, level, **extra))

    return send


def test_fields_of_a_record_are_fields_of_the_journal(
    to_journal: Callable[..., None], sent: Sent
) -> None:
    to_journal(
        "Attach: done",
        ACTION="Attach",
        RESULT="done",
        DEVICE="/dev/loop3",
        DISKSEQ=41,
        SENDER=":1.7",
        UID=1000,
    )
    assert sent == [
        {
            "MESSAGE": "Attach: done",
            "PRIORITY": "6",
            "SYSLOG_IDENTIFIER": "loopd",
            "CODE_FUNC": "loopd.test",
            "ACTION": "Attach",
            "RESULT": "done",
            "DEVICE": "/dev/loop3",
            "DISKSEQ": "41",
            "SENDER": ":1.7",
            "UID": "1000",
        }
    ]


def test_no_field_but_ours_is_sent_and_none_holds_control_characters(
    to_journal: Callable[..., None], sent: Sent
) -> None:
    to_journal("x", DEVICE="/dev/x\nPRIORITY=0", CODE_ARGS="secret", OTHER="y", UID=None)
    assert sent[0]["DEVICE"] == "/dev/x\N{REPLACEMENT CHARACTER}PRIORITY=0"
    assert set(sent[0]) == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "CODE_FUNC", "DEVICE"}


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3")],
)
def test_levels_are_the_journals_priorities(
    to_journal: Callable[..., None], sent: Sent, level: int, priority: str
) -> None:
    to_journal("x", level)
    assert sent[0]["PRIORITY"] == priority


# How many


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def passed(limit: journal.Limit, count: int, **extra: Any) -> int:
    return sum(bool(limit.filter(record("x", **extra))) for _ in range(count))


def test_one_user_fills_no_journal() -> None:
    """Forged log lines."""
    clock = Clock()
    limit = journal.Limit(clock)
    first = passed(limit, 100_000, UID=USER)
    assert 10 < first < 100
    clock.now += 3600
    hour = 0
    for _ in range(3600):
        clock.now += 1
        hour += passed(limit, 100, UID=USER)
    assert hour < 2000


def test_other_users_lines_and_roots_and_our_own_are_not_lost_by_it() -> None:
    limit = journal.Limit(Clock())
    passed(limit, 100_000, UID=USER)
    assert passed(limit, 10, UID=OTHER) == 10
    assert passed(limit, 10_000, UID=0) == 10_000
    assert passed(limit, 10) == 10
    assert limit.filter(record("lost the bus", logging.ERROR))


def test_lines_about_nobody_have_a_limit_of_their_own_but_errors() -> None:
    limit = journal.Limit(Clock())
    assert passed(limit, 100_000) < 1000
    assert limit.filter(record("lost the bus", logging.ERROR))
    assert passed(limit, 10, UID=USER) == 10


def test_how_many_were_left_out_is_told_by_the_next_line() -> None:
    clock = Clock()
    limit = journal.Limit(clock)
    kept = passed(limit, 1000, UID=USER)
    clock.now += 10
    made = record("Detach: done", UID=USER)
    assert limit.filter(made)
    assert f"({1000 - kept} lines before this one were left out" in line(made)
    made = record("again", UID=USER)
    assert limit.filter(made)
    assert line(made) == "loopd: again"


def test_users_who_cause_nothing_are_forgotten() -> None:
    clock = Clock()
    limit = journal.Limit(clock)
    for uid in range(1, 10_000):
        clock.now += 10
        passed(limit, 1, UID=uid)
    assert len(limit._budgets) <= journal._MANY


# Where they go


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_go_to_standard_error_unless_that_is_the_journal(
    root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with open(reading) as pipe, open(writing, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        root_logger.handlers.clear()  # pytest's own
        journal.start(debug=False)
        logging.getLogger("loopd").info("hello\x07", extra={"UID": 5})
        assert pipe.readline() == "loopd: hello\N{REPLACEMENT CHARACTER}\n"
        root_logger.handlers.clear()
        status = os.fstat(writing)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        journal.start(debug=False)
        (handler,) = root_logger.handlers
        assert isinstance(handler, journal.Journal)


def test_without_systemds_library_lines_go_to_standard_error(
    root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_is_journal", lambda fd: True)
    monkeypatch.setitem(sys.modules, "systemd.journal", None)
    with open(os.devnull, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        root_logger.handlers.clear()  # pytest's own
        journal.start(debug=True)
        (handler,) = root_logger.handlers
        assert isinstance(handler, logging.StreamHandler)
    assert root_logger.level == logging.DEBUG
