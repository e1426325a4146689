# SPDX-License-Identifier: LGPL-2.1-or-later
"""SECURITY.md promises nothing that has no test, and docs/promises.md says which ones it has."""

import re

import pytest

from tests.harness.area import CHECKOUT

PROMISES = CHECKOUT / "docs" / "promises.md"
_ROW = re.compile(r"^\| (?P<promise>.+?) \| (?P<tests>`tests/.+`) \|$", re.MULTILINE)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")

ROWS = {row["promise"]: _TEST.findall(row["tests"]) for row in _ROW.finditer(PROMISES.read_text())}


def promised() -> list[str]:
    """What SECURITY.md promises: each item of that part's lists."""
    text = (CHECKOUT / "SECURITY.md").read_text()
    _, _, rest = text.partition("\n## What is promised\n")
    part, _, _ = rest.partition("\n## ")
    items = re.findall(r"^- (.+(?:\n  .+)*)", part, re.MULTILINE)
    # Nothing else is in that part but headings and one paragraph, which says where the tests are.
    outside = re.sub(r"^- .+(?:\n  .+)*|^### .*", "", part, flags=re.MULTILINE)
    assert len(outside.split()) < 25
    return [" ".join(item.split()) for item in items]


def test_each_promise_has_its_row_and_no_row_is_without_a_promise() -> None:
    assert promised() == [*ROWS]
    assert len(ROWS) > 40


@pytest.mark.parametrize("promise", ROWS)
def test_its_tests_are_there(promise: str) -> None:
    assert ROWS[promise]
    for file, name in ROWS[promise]:
        assert f"\ndef {name}(" in (CHECKOUT / file).read_text(), f"{file} has no {name}"
