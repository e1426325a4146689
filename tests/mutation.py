# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breaks a module in small ways, each in a copy of the checkout, and lists what no test notices.

    python -m tests.mutation MODULE COUNT SEED TEST...

A mutant that survives is a promise without a test, or no mistake at all: somebody has to look.
"""

import ast
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

from tests.harness.area import CHECKOUT, area

_TIMEOUT = 120
_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_NOT_COPIED = shutil.ignore_patterns(".*", "build", "__pycache__")

Change = Callable[[], None]


def _replace(parent: ast.AST, field: str, value: object) -> Change:
    return lambda: setattr(parent, field, value)


def _drop(body: list[ast.stmt], index: int) -> Change:
    def change() -> None:
        body[index] = ast.copy_location(ast.Pass(), body[index])

    return change


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _in_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """All that is in functions, which is what is done."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                yield from ast.walk(statement)


def changes(tree: ast.Module) -> list[tuple[int, str, Change]]:
    """Return the ways to break a module: the line, what is done, and how."""
    found: dict[tuple[int, int, str], tuple[int, str, Change]] = {}

    def add(node: ast.stmt | ast.expr, what: str, change: Change) -> None:
        found[node.lineno, node.col_offset, what] = (node.lineno, what, change)

    for node in _in_functions(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPPOSITES:
            opposite = _OPPOSITES[type(node.ops[0])]()
            add(node, "compare otherwise", _replace(node, "ops", [opposite, *node.ops[1:]]))
        elif isinstance(node, ast.BoolOp):
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            add(node, "and for or", _replace(node, "op", other))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = not node.value if isinstance(node.value, bool) else node.value + 1
            add(node, f"{node.value} becomes {value}", _replace(node, "value", value))
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            for value in (True, False)[isinstance(node, ast.While) :]:
                add(node, f"always {value}", _replace(node, "test", ast.Constant(value)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            twice = ast.UnaryOp(ast.Not(), node.operand)
            add(node, "not is dropped", _replace(node, "operand", twice))
        for body in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            for index, each in enumerate(body if isinstance(body, list) else ()):
                if not _is_text(each) and not isinstance(each, ast.Pass):
                    add(each, "dropped", _drop(body, index))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for index, each in enumerate(function.body):
                if not _is_text(each):
                    add(each, "dropped", _drop(function.body, index))
    return [*found.values()]


def mutants(source: str, count: int, seed: int) -> Iterator[tuple[int, str, str]]:
    """Draw so many; yield the line, what was done, and the text that comes of it."""
    tree = ast.parse(source)
    drawn = random.Random(seed).sample(range(len(changes(tree))), count)
    for index in drawn:
        broken = deepcopy(tree)
        line, what, change = changes(broken)[index]
        change()
        yield line, what, ast.unparse(ast.fix_missing_locations(broken))


def passes(directory: Path, tests: list[str]) -> bool:
    """Whether the tests of a copy pass."""
    # By an interrupt, which ends what the tests have started.
    command = ["timeout", "--signal=INT", "--kill-after=30", str(_TIMEOUT)]
    command += [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=directory, check=False, capture_output=True)
    return done.returncode == 0


def main(module: str, count: int, seed: int, tests: list[str]) -> int:
    """Try some mutants; the exit status is 0 if the tests noticed all of them."""
    with area("mutation") as directory:
        shutil.copytree(CHECKOUT, directory, ignore=_NOT_COPIED, dirs_exist_ok=True)
        path = directory / module
        source = path.read_text()
        if not passes(directory, tests):
            sys.exit("the tests fail as it is")
        survivors = 0
        for line, what, text in mutants(source, count, seed):
            path.write_text(text)
            if passes(directory, tests):
                survivors += 1
                print(f"{module}:{line}: {what}: {source.splitlines()[line - 1].strip()}")
        print(f"{module}: {count - survivors} of {count} noticed")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
