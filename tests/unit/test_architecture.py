# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stories in docs/architecture.md: each function is there, and the one above it calls it."""

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT

PACKAGE = CHECKOUT / "loopd"
DOCUMENT = CHECKOUT / "docs" / "architecture.md"
STORIES = ("Attach", "Detach", "A client dies", "A restart")
LINE = re.compile(r"( *)- `([\w.]+)`(?: \(as `(\w+)`\))?: \S.*")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Step:
    """A function in a story, and the name by which its caller knows it."""

    name: str
    known_as: str
    depth: int
    caller: "Step | None" = field(repr=False)


def steps(story: str) -> list[Step]:
    """The functions of a story, in order."""
    text = DOCUMENT.read_text()
    (told,) = re.findall(rf"^### {story}\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE)
    found: list[Step] = []
    for line in told.splitlines():
        if not line.lstrip().startswith("- "):
            assert not line or line.startswith(" "), line
            continue
        match = LINE.fullmatch(line)
        assert match, line
        depth = len(match[1])
        above = [each for each in found if each.depth < depth]
        caller = above[-1] if depth else None
        found.append(Step(match[2], match[3] or match[2].rpartition(".")[2], depth, caller))
    return found


def path_of(name: str) -> tuple[Path, list[str]]:
    """The file of a function, and the names of what it is in there."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:length]).with_suffix(".py")
        if path.exists():
            return path, parts[length:]
    raise AssertionError(f"there is no module of {name}")


@cache
def tree_of(path: Path) -> ast.Module:
    """A module, parsed."""
    return ast.parse(path.read_text())


def function(name: str) -> Function:
    """The function of this name, of a class or of another function, too."""
    path, names = path_of(name)
    found: ast.AST = tree_of(path)
    for each in names:
        inside = [
            node
            for node in ast.walk(found)
            if isinstance(node, Function | ast.ClassDef) and node.name == each
        ]
        assert inside, f"{path.relative_to(CHECKOUT)} has no {'.'.join(names)}"
        found = inside[0]
    assert isinstance(found, Function), f"{name} is no function"
    return found


def names_in(tree: ast.AST) -> set[str]:
    """The names that are used somewhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
    return found


@cache
def passed_on() -> set[str]:
    """The names of functions that somebody is given to call, or that a function given so calls."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                for argument in [*node.args, *(each.value for each in node.keywords)]:
                    is_name = isinstance(argument, ast.Name | ast.Attribute)
                    if is_name or isinstance(argument, ast.Lambda):
                        found |= names_in(argument)
    return found


@cache
def bodies(name: str) -> frozenset[str]:
    """The names that the functions of one name use."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, Function) and node.name == name:
                found |= names_in(node)
    return frozenset(found)


@pytest.mark.parametrize("story", STORIES)
def test_the_functions_of_a_story_are_there_and_are_called_by_the_one_above(story: str) -> None:
    told = steps(story)
    assert len(told) > 5
    for step in told:
        function(step.name)
        if step.caller is None:
            continue
        used = names_in(function(step.caller.name))
        assert step.known_as in used, f"{step.caller.name} does not call {step.known_as}"
        own = step.name.rpartition(".")[2]
        if step.known_as != own:
            # Somebody has passed it to the caller, or a function of that name that calls it.
            assert own in passed_on() or own in bodies(step.known_as), f"{own} is passed to nobody"


def test_the_stories_go_from_the_bus_to_the_kernel() -> None:
    for story, end in (("Attach", "loop_configure"), ("Detach", "loop_clr_fd")):
        names = [step.name for step in steps(story)]
        assert names[0].startswith(("bus.", "daemon.server."))
        assert f"loop.kernel.{end}" in names
