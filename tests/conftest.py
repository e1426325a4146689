# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures for all tests: buses, authorities, daemons, callers, and the watch for leaks.

`daemon` and `caller` are ready to use; make_daemon, make_polkit and make_caller make more, and end
them with the test.  `authority` is what `daemon` asks: in tests/root the real polkitd with rules
that allow everything, elsewhere a double that does.  A module or directory says how its daemons are
started by a fixture `daemon_options` of its own.  In tests/bus what asks for `library`, and so for
a daemon, runs once under each D-Bus library, unless it has the mark `one_library`; elsewhere the
mark `both_libraries` does it.
"""

import gc
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from loopd.loop import mounts
from tests.harness import broker, company, leaks, process, requirement
from tests.harness.area import area as make_area
from tests.harness.broker import BUSES
from tests.harness.bus import PrivateBus
from tests.harness.caller import TEMPLATE, Caller, template_of_callers
from tests.harness.daemon import LIBRARIES, Daemon, template_of
from tests.harness.polkit import RULES_ALLOW_ALL, Answer, PolkitDouble, RealPolkit
from tests.harness.scheduling import ByFile
from tests.harness.template import all_shared
from tests.harness.udev import Udev

# Tests that live outside of test modules; before anything imports them.
pytest.register_assert_rewrite("tests.harness.behaviours", "tests.machine.crowd")

hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(
    "ci" if os.environ.get("CI") or os.environ.get("LOOPD_REQUIRE") else "here"
)


def pytest_configure(config: pytest.Config) -> None:
    """Register our marks, become the parent of orphans, and let children hear every signal."""
    # A shell that runs the tests in the background has them ignored, which children inherit.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            # Not for us either; but what is handled is at its default in a child.
            signal.signal(number, lambda *_: None)
    config.addinivalue_line("markers", "both_libraries: runs under each D-Bus library")
    config.addinivalue_line("markers", "one_library: is above what the D-Bus library does")
    config.addinivalue_line("markers", "both_buses: runs on dbus-daemon and on dbus-broker")
    leaks.adopt_orphans()
    mounts.prepare()  # they stay open, and are no leak of the first test that looks at a file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Say which tests `pytest -n 2` runs in one process."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its category, and skip those of root without root."""
    for item in items:
        category = requirement.category_of(item.path)
        if category in ("bus", "root", "machine", "kernel"):
            item.add_marker(category)
        if category in ("root", "machine", "kernel") and os.getuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what asks for a D-Bus library or a bus on each of them, where that is wanted.

    One library on the second bus is enough, as what depends on the bus lies below the library.
    Above the reading and writing of messages one is enough as well: tests/root has the other one.
    """
    wanted = requirement.category_of(metafunc.definition.path) == "bus"
    wanted = wanted or metafunc.definition.get_closest_marker("both_libraries") is not None
    mark = metafunc.definition.get_closest_marker("both_buses")
    both_buses = mark is not None and mark.args != (False,)
    both_buses = both_buses and "bus_type" in metafunc.fixturenames
    if both_buses and not (wanted and "library" in metafunc.fixturenames):
        metafunc.parametrize("bus_type", BUSES, indirect=True)
    elif both_buses:
        pairs = [(library, "dbus-daemon") for library in LIBRARIES]
        pairs += [(LIBRARIES[-1], "dbus-broker")]
        metafunc.parametrize(("library", "bus_type"), pairs, indirect=True)
    elif wanted and "library" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("one_library")
        enough = one is not None and one.args != (False,)
        metafunc.parametrize("library", LIBRARIES[:1] if enough else LIBRARIES, indirect=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the watch for leaks, which collects garbage around each test, what is here to stay."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Forbid skips where they are, and show what the children of a failed test printed."""
    report = yield
    requirement.enforce(item, report)
    if report.failed:
        report.sections += [
            (f"{log.name} printed", log.text) for log in process.logs if log.text.strip()
        ]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Forbid the skip of a whole module, too."""
    report = yield
    requirement.enforce(collector, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Let tests run beside others that can, with what is set up for them.

    Those of tests/machine are alone for as long as it takes.
    """
    if requirement.category_of(item.path) not in ("bus", "root") or os.getuid() != 0:
        return (yield)
    is_alone = item.get_closest_marker("alone") is not None
    with company.alone() if is_alone else company.together():
        return (yield)


@pytest.fixture(autouse=True)
def _no_leaks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail a test of tests/bus, tests/root or tests/machine that leaves something behind."""
    process.logs.clear()
    if requirement.category_of(request.path) not in ("bus", "root", "machine"):
        yield
        return
    before = leaks.Snapshot.take([tmp_path_factory.getbasetemp().resolve()])
    yield
    left = before.leaks()
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture(scope="session", autouse=True)
def _templates(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have loopd and callers forked, where there are tests that start many."""
    if not any(each.path.parent.name in ("bus", "root") for each in request.session.items):
        yield
        return
    wanted = {f"loopd {each}": template_of(each) for each in (None, *LIBRARIES)}
    with all_shared(wanted | {TEMPLATE: template_of_callers()}):
        yield


@pytest.fixture
def area() -> Iterator[Path]:
    """A directory of this test's that every uid may enter."""
    with make_area("files") as path:
        yield path


@pytest.fixture(scope="session")
def bus_type(request: pytest.FixtureRequest) -> type[PrivateBus]:
    """The kind of bus that `bus` is, and that worlds have."""
    name: str = getattr(request, "param", "dbus-daemon")
    if name == "dbus-broker" and not broker.installed():
        pytest.skip("dbus-broker is not installed")
    if name == "dbus-broker" and os.getuid() != 0:
        pytest.skip("only root can start dbus-broker")
    return BUSES[name]


@pytest.fixture
def bus(bus_type: type[PrivateBus]) -> Iterator[PrivateBus]:
    """A private bus."""
    with bus_type() as private:
        yield private


@pytest.fixture
def polkit(bus: PrivateBus) -> Iterator[PolkitDouble]:
    """A double of polkit on `bus` that allows everything until it is told otherwise."""
    with PolkitDouble(bus, Answer.ALLOW) as double:
        yield double


@pytest.fixture
def make_polkit(bus: PrivateBus) -> Iterator[Callable[[str], RealPolkit]]:
    """Start the real polkitd on `bus` with the given rules."""
    with ExitStack() as stack:
        yield lambda rules: stack.enter_context(RealPolkit(bus, rules))


@pytest.fixture
def authority(request: pytest.FixtureRequest) -> PolkitDouble | RealPolkit:
    """The polkit that `daemon` asks, which allows everything: real in tests/root, else a double."""
    if requirement.category_of(request.path) != "root":
        double: PolkitDouble = request.getfixturevalue("polkit")
        return double
    real: RealPolkit = request.getfixturevalue("make_polkit")(RULES_ALLOW_ALL)
    return real


@pytest.fixture
def library(request: pytest.FixtureRequest) -> str | None:
    """The D-Bus library that daemons use; None leaves it to them."""
    name: str | None = getattr(request, "param", None)
    if name and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def daemon_options() -> dict[str, Any]:
    """What `daemon` and make_daemon give to Daemon; for modules and directories to override."""
    return {}


@pytest.fixture
def make_daemon(
    bus: PrivateBus, library: str | None, daemon_options: dict[str, Any]
) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon on `bus`; the arguments are those of Daemon."""
    with ExitStack() as stack:

        def make(**options: Any) -> Daemon:
            given = {"library": library} | daemon_options | options
            return stack.enter_context(Daemon(bus, **given))

        yield make


@pytest.fixture
def daemon(authority: object, make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon on `bus` that has an authority to ask."""
    return make_daemon()


@pytest.fixture
def make_caller(bus: PrivateBus) -> Iterator[Callable[..., Caller]]:
    """Start a caller as the named user."""
    with ExitStack() as stack:

        def make(user: str | None = "nobody") -> Caller:
            try:
                return stack.enter_context(Caller(bus, user))
            except PermissionError as exc:
                pytest.skip(str(exc))

        yield make


@pytest.fixture
def caller(make_caller: Callable[..., Caller]) -> Caller:
    """A caller that is nobody."""
    return make_caller("nobody")


@pytest.fixture
def udev() -> Iterator[Udev]:
    """A running udevd."""
    with Udev() as running:
        yield running
