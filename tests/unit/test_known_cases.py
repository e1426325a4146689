# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/known-cases.md says what there is, and the unit forbids what it says."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT

DOCUMENT = CHECKOUT / "docs" / "known-cases.md"
NAME = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """Return each case by its name, with the files and names of its tests."""
    found = {}
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or set(cells[0]) <= set("-"):
            continue
        if cells[3] == "tests":
            continue
        case = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cells[0])
        # In brackets: in what, but for the rules, whose names end so.
        case = case if case.startswith("Transport rule") else case.partition(" (")[0]
        found[case] = NAME.findall(cells[3])
    return found


ROWS = rows()


@cache
def docstrings(path: Path) -> dict[str, str]:
    """Return the docstring of each test of a file."""
    tree = ast.parse(path.read_text())
    return {
        node.name: " ".join((ast.get_docstring(node) or "").split())
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def test_there_are_all_cases_and_rules() -> None:
    rules = [case for case in ROWS if case.startswith("Transport rule")]
    assert len(rules) == 16
    assert len(ROWS) - len(rules) >= 25


@pytest.mark.parametrize("case", ROWS)
def test_each_case_has_tests_that_are_named_after_it(case: str) -> None:
    assert ROWS[case]
    for file, name in ROWS[case]:
        found = docstrings(CHECKOUT / file)
        assert name in found, f"{file} has no {name}"
        assert case in found[name], f"{file}::{name} does not say what it is a test of"


def expanded(words: list[str]) -> set[str]:
    """Return the system calls that groups of them come to."""
    calls: set[str] = set()
    for word in words:
        if not word.startswith("@"):
            calls.add(word)
            continue
        done = subprocess.run(
            ["systemd-analyze", "--no-pager", "syscall-filter", word],
            check=True,
            capture_output=True,
            text=True,
        )
        lines = [line.strip() for line in done.stdout.splitlines()[1:]]
        calls |= expanded([line for line in lines if line and not line.startswith("#")])
    return calls


@pytest.mark.lint
def test_the_unit_forbids_what_mounts() -> None:
    """CVE-2025-6019: no call that mounts anything is left to the unit, or to what it starts."""
    unit = (CHECKOUT / "systemd" / "loopd.service.in").read_text()
    allowed: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        if line.startswith("~"):
            allowed -= expanded(line[1:].split())
        else:
            allowed |= expanded(line.split())
    assert "openat" in allowed
    mounting = expanded(["@mount"]) | {"mount", "move_mount", "open_tree", "fsmount"}
    assert allowed & mounting == set()
    assert "NoNewPrivileges=yes" in unit.splitlines()
