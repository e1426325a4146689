# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports between packages go down only, there are no cycles, and some things have one place."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "loopd"

# The packages that the modules of a package may import from, beside their own. `loopd` has the
# modules that all others may use.
BASE = {"loopd"}
DAEMON = BASE | {"loop", "bus", "daemon"}
RULES = {
    "loopd": set(),
    "loop": BASE,
    "bus": BASE,
    "daemon": BASE | {"loop", "bus"},
    "daemon.host": DAEMON,
    "daemon.devices": DAEMON | {"daemon.host"},
    "daemon.actions": DAEMON | {"daemon.host", "daemon.devices"},
    "daemon.server": DAEMON | {"daemon.host", "daemon.devices", "daemon.actions"},
    "client": BASE | {"loop", "bus"},
    "cli": BASE | {"loop", "client"},
}
# What puts the daemon together is above all of it, and __main__ above that.
TOP = {"daemon.main", "daemon.assembly", "daemon.lifecycle", "__main__"}


def name_of(path: Path) -> str:
    """The dotted name of a source file, without the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if FILES[name].name != "__init__.py"]


def package_of(module: str) -> str:
    """The package of a module; a package is in itself."""
    if FILES[module].name == "__init__.py":
        return module or "loopd"
    return module.rpartition(".")[0] or "loopd"


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """The modules of ours that a module imports, and the top-level names of others."""
    ours, others = set(), set()
    package = FILES[module].relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("loopd") for alias in node.names), module
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            where = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                where = (*package[: len(package) - node.level + 1], *where)
            elif where[0] == "loopd":
                where = where[1:]
            else:
                others.add(where[0])
                continue
            for alias in node.names:
                inner = ".".join((*where, alias.name))
                ours.add(inner if inner in FILES else ".".join(where))
    return ours, others


def test_each_package_has_a_rule() -> None:
    assert {package_of(module) for module in FILES} == {*RULES}


@pytest.mark.parametrize("package", RULES)
def test_imports_between_packages_go_down_only(package: str) -> None:
    upwards = [
        f"{module} imports {other}"
        for module in FILES
        if package_of(module) == package and module not in TOP
        for other in imports_of(module)[0]
        # The package itself is its version.
        if other and package_of(other) not in {package, *RULES[package]}
    ]
    assert not upwards


def test_only_the_program_imports_what_puts_the_daemon_together() -> None:
    users = {module for module in FILES if imports_of(module)[0] & TOP}
    assert users <= TOP


@pytest.mark.parametrize("package", RULES)
def test_no_modules_of_a_package_import_each_other(package: str) -> None:
    graph = {
        module: {other for other in imports_of(module)[0] if package_of(other) == package}
        for module in MODULES
        if package_of(module) == package
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(" imports ".join(exc.args[1]))


def test_the_kernel_library_is_synchronous_and_knows_no_bus() -> None:
    for module in FILES:
        if package_of(module) == "loop":
            assert not imports_of(module)[1] & {"asyncio", "dbus_next", "dbus_fast"}, module


@pytest.mark.parametrize("package", ["loopd.loop", "loopd.bus", "loopd.client", "loopd.cli"])
def test_what_is_not_the_daemon_loads_none_of_it(package: str) -> None:
    program = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for each in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "    if not each.name.endswith('_child'):\n"  # a program, not to be imported
        "        importlib.import_module(each.name)\n"
        "print(*[name for name in sys.modules if name.startswith('loopd.daemon')])\n"
        f"print({package!r} == 'loopd.loop' and 'asyncio' in sys.modules)"
    )
    assert run(program) == ["False"]


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("dbus_next", {"bus.codec"}),
        ("dbus_fast", {"bus.codec"}),
        ("pyudev", {"daemon.host.uevents"}),
        ("concurrent", {"daemon.pool", "daemon.threads"}),
    ],
)
def test_a_library_is_known_in_one_place(library: str, modules: set[str]) -> None:
    users = {name for name in FILES if library in imports_of(name)[1]}
    assert users == modules & {*FILES}


def test_two_modules_know_systemd() -> None:
    """One takes what it has kept for us, the other tells it what happens."""
    users = [name for name in FILES if "systemd" in imports_of(name)[1]]
    assert users == ["daemon.host.journal", "daemon.host.systemd"]


def test_only_the_modules_for_kernel_calls_issue_ioctls() -> None:
    users = {
        module
        for module in FILES
        if any(
            isinstance(node, ast.Attribute) and node.attr == "ioctl"
            for node in ast.walk(ast.parse(FILES[module].read_text()))
        )
    }
    assert users == {"loop.kernel", "loop.vfs"} & {*FILES}


def test_loopd_does_not_load_what_it_does_not_need() -> None:
    """It would start later for it, and be larger for as long as it runs."""
    program = "import sys, loopd.__main__; print(*{'gi', '_ssl', 'asyncio'} & {*sys.modules})"
    assert run(program) == ["asyncio"]


def run(program: str) -> list[str]:
    """Run a program where loopd can be imported; return the words that it prints."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    return done.stdout.split()
