# SPDX-License-Identifier: LGPL-2.1-or-later
"""Categories of tests, and where a skip is a failure.

A test's category is the directory it lies in (unit, bus, root, machine, kernel); those marked
`lint` are of category lint as well.  A skip in a category that LOOPD_REQUIRE lists
(root,bus,machine,lint) is reported as a failure with the skip's reason.
"""

import os
from pathlib import Path
from typing import Any

import pytest

CATEGORIES = ("unit", "bus", "root", "machine", "kernel")
_TESTS = Path(__file__).resolve().parents[1]


def category_of(path: Path) -> str | None:
    """Return the category of a test file, None outside of them all."""
    try:
        first = path.resolve().relative_to(_TESTS).parts[0]
    except (ValueError, IndexError):
        return None
    return first if first in CATEGORIES else None


def categories(node: pytest.Item | pytest.Collector) -> set[str]:
    """Return all categories of a test."""
    found = {category_of(node.path)} - {None}
    lint = {"lint"} if node.get_closest_marker("lint") else set()
    return {str(each) for each in found} | lint


def required() -> set[str]:
    """Return the categories in which nothing may be skipped."""
    return {each.strip() for each in os.environ.get("LOOPD_REQUIRE", "").split(",")} - {""}


def enforce(node: pytest.Item | pytest.Collector, report: Any) -> None:
    """Turn a skip into a failure where it is not allowed; an expected failure is no skip."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    broken = categories(node) & required()
    if broken:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"not allowed by LOOPD_REQUIRE ({', '.join(sorted(broken))}): {reason}"
