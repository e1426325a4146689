# SPDX-License-Identifier: LGPL-2.1-or-later
"""Booted machines with loopd's package installed: one for each release of Debian.

Their roots, where they are not there yet, are made in the background while other tests run.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness import company, package, roots
from tests.harness.area import CHECKOUT
from tests.harness.booted import Machine
from tests.harness.caller import Caller
from tests.harness.logins import Login, Stranger
from tests.harness.requirement import category_of
from tests.harness.unit import Unit

_making: list[subprocess.Popen[bytes]] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these tests late: by then the roots are there, and tests/unit runs beside them."""
    late = {"machine": 1, "unit": 2}
    items.sort(key=lambda item: late.get(category_of(item.path) or "", 0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to make the roots that will be needed and are not there."""
    wanted = any(category_of(item.path) == "machine" for item in session.items)
    missing = [name for name, release in roots.RELEASES.items() if not release.path.is_dir()]
    if wanted and missing and os.getuid() == 0 and not session.config.option.collectonly:
        _making.append(
            subprocess.Popen(
                [sys.executable, "-m", roots.__name__, *missing],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )


def pytest_unconfigure() -> None:
    """Do not go on making roots when the tests have ended early."""
    for process in _making:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    _making.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Show what the machine of a failed test has to say."""
    report = yield
    machine = getattr(item, "funcargs", {}).get("machine")
    if report.failed and machine is not None:
        said = machine.result("journalctl", "--no-pager", "--output=short-monotonic", "--lines=80")
        report.sections.append(("the machine's journal", said.stdout))
    return report


@pytest.fixture(scope="session")
def _alone() -> Iterator[None]:
    """Have no other tests run meanwhile: a machine's udevd looks at every device."""
    with company.alone():
        yield


@pytest.fixture(scope="session", params=roots.RELEASES.values(), ids=list(roots.RELEASES))
def release(_alone: None, request: pytest.FixtureRequest) -> roots.Release:
    """A release of Debian."""
    chosen: roots.Release = request.param
    return chosen


@pytest.fixture(scope="session")
def root(release: roots.Release) -> Path:
    """The root of that release."""
    for program in ("systemd-nspawn", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    try:
        return roots.make(release)
    except roots.CannotMakeError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The package of this checkout, and the same with a higher version."""
    directory = tmp_path_factory.mktemp("packages")
    first = package.build(directory)
    _, version, _ = first.name.split("_")
    return [first, package.build(directory, f"{version}+test1")]


@pytest.fixture(scope="session")
def machine(release: roots.Release, root: Path, packages: list[Path]) -> Iterator[Machine]:
    """A booted machine with loopd, for all tests but those that would spoil it."""
    with package.machine_with(release, root, packages[0]) as booted:
        yield booted


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """Its loopd.service, as it is installed and not started yet."""
    loopd = Unit(machine)
    yield loopd
    loopd.reset()


@pytest.fixture
def callers(machine: Machine, unit: Unit) -> Iterator[ExitStack]:
    """What ends the callers of a test, before loopd is stopped."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def login(machine: Machine, callers: ExitStack) -> Callable[..., Login]:
    """Log a user in; the arguments are those of Login."""
    return lambda user, **options: callers.enter_context(Login(machine, user, **options))


@pytest.fixture
def stranger(machine: Machine, callers: ExitStack) -> Callable[..., Stranger]:
    """Start a program of a user's outside of any session."""
    return lambda user="root": callers.enter_context(Stranger(machine, user))


@pytest.fixture
def alice(login: Callable[..., Login]) -> Caller:
    """A user at the machine."""
    return login("alice")
