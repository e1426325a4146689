# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports go down only, and what may be in one place only is in that place."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "loopd"

# A module may import those of the rows below its own, and none beside it. A package is its
# __init__.
LAYERS = (
    ("__main__",),
    ("daemon", "cli"),
    ("cli.attachment", "cli.commands", "cli.monitoring", "cli.opening", "client.blocking"),
    ("cli.child", "cli.connection", "cli.notices", "cli.readiness"),
    ("cli.arguments", "service", "client"),
    ("cli.columns", "cli.losetup", "cli.outcome", "cli.values", "client.changes", "client.device"),
    ("client.settling",),
    ("cli.output", "options", "bus", "introspection", "client.link"),
    ("operations", "attaching", "announcer", "client.absence"),
    ("manager", "passthrough", "cli.signals", "client.properties", "client.watch", "client.image"),
    ("ending", "proposal", "restoring"),
    ("lifetimes", "questions"),
    (
        "registry",
        "locks",
        "monitor",
        "polkit",
        "logind",
        "wire",
        "dial",
        "session",
        "backlog",
        "records",
        "spares",
        "listing",
    ),
    (
        "device",
        "threads",
        "tasks",
        "config",
        "client.memory",
        "turns",
        "call",
        "outbox",
        "idle",
        "fdstore",
        "cli.agent",
        "uevents",
    ),
    (
        "budget",
        "pool",
        "leases",
        "loopops",
        "overlap",
        "marker",
        "supervisor",
        "cli.progress",
        "cli.stream",
    ),
    ("attachment", "closes", "cli.formats", "cli.style"),
    ("loopdev",),
    ("binding", "partition"),
    ("loopinfo", "request", "table", "udevlinks"),
    ("access", "blockdev", "backing", "codec", "instance"),
    ("namespaces",),
    ("kernel", "mounts", "errors", "fd", "frame"),
    ("vfs",),
    ("uapi", "storage", "tablereader", "journal"),
    ("",),  # the package itself, which holds the version
)
RANK = {name: -row for row, names in enumerate(LAYERS) for name in names}


def file_of(module: str) -> Path:
    """Where a module's source is."""
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def name_of(path: Path) -> str:
    """The dotted name of a source file, without the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(map(name_of, PACKAGE.rglob("*.py")))


@cache
def imports_of(module: str) -> tuple[set[str], set[str]]:
    """The modules of ours that a module imports, and the top-level names of others."""
    ours, others = set(), set()
    path = file_of(module)
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                inner = ".".join((*base, alias.name))
                ours.add(inner if inner in RANK else ".".join(base))
    return ours, others


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    assert module in RANK, "a new module wants a place in the layers"
    ours, _ = imports_of(module)
    upwards = {name for name in ours if RANK[name] >= RANK[module]}
    assert not upwards


@pytest.mark.parametrize(
    "module",
    [
        *(
            "uapi",
            "vfs",
            "kernel",
            "namespaces",
            "blockdev",
            "backing",
            "loopinfo",
            "table",
            "tablereader",
        ),
        *("partition", "binding", "loopdev", "attachment", "loopops", "marker", "udevlinks"),
    ],
)
def test_what_is_synchronous_knows_no_event_loop_and_no_bus(module: str) -> None:
    ours, others = imports_of(module)
    assert "asyncio" not in others
    assert not ours & {"codec", "wire", "bus", "threads", "tasks"}


@pytest.mark.parametrize(
    ("library", "module"),
    [
        ("dbus_next", "codec"),
        ("dbus_fast", "codec"),
        ("pyudev", "monitor"),
    ],
)
def test_one_module_knows_a_library(library: str, module: str) -> None:
    assert [name for name in MODULES if library in imports_of(name)[1]] == [module]


def test_threads_of_the_daemon_start_in_a_pool_and_work_in_one_place() -> None:
    users = [name for name in MODULES if "concurrent" in imports_of(name)[1]]
    assert users == ["pool", "threads"]
    starting = [name for name in MODULES if re.search(r"\bThread\(", file_of(name).read_text())]
    assert starting == ["cli.notices", "client.memory", "pool"]
    users = [name for name in MODULES if "pool" in imports_of(name)[0]]
    assert users == ["threads"]


def test_two_modules_know_systemd() -> None:
    """One tells it how we are, the other what happens."""
    users = [name for name in MODULES if "systemd" in imports_of(name)[1]]
    assert users == ["journal", "supervisor"]


def test_two_modules_issue_ioctls() -> None:
    users = [
        module
        for module in MODULES
        if any(
            isinstance(node, ast.Attribute) and node.attr == "ioctl"
            for node in ast.walk(ast.parse(file_of(module).read_text()))
        )
    ]
    assert users == ["kernel", "vfs"]


def test_loopd_does_not_load_what_it_does_not_need() -> None:
    """It would start later for it, and be larger for as long as it runs."""
    program = "import sys, loopd.__main__; print(*{'gi', '_ssl', 'asyncio'} & {*sys.modules})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["asyncio"]
