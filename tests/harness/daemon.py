# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd itself as a child process on a private bus, under either D-Bus library.

The library is chosen from outside: a module that is None in sys.modules cannot be imported.  In
the same way a `prelude` of Python, run in the daemon's interpreter before the daemon, replaces
functions of loopd.loop.kernel by others.  Nothing in the product knows of the tests.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import template as templates
from tests.harness import wire
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.process import Process, children_of
from tests.harness.raw import BUS
from tests.harness.template import Template

LIBRARIES = ("dbus_next", "dbus_fast")

_RUN = "import runpy; runpy.run_module('loopd', run_name='__main__', alter_sys=True)"
_HIDE = "import sys; sys.modules['{}'] = None"
_LISTEN = Path(__file__).with_name("listen_program.py")

_COMPLAINTS = re.compile(
    r"Traceback \(most recent call last\)|ResourceWarning|was never (awaited|retrieved)"
    r"|Task was destroyed"
)


class Daemon:
    """A running loopd; the `with` block begins when it owns its name.

    It fails the test that it ends on its own, or prints a traceback, an unclosed resource or a
    forgotten task, unless `complaints` are allowed.
    """

    def __init__(
        self,
        bus: PrivateBus,
        *,
        library: str | None = None,
        config: str | None = None,
        prelude: str = "",
        runtime_directory: Path | None = None,
        arguments: Sequence[str | Path] = (),
        environment: Mapping[str, str] | None = None,
        complaints: bool = False,
        wait_ready: bool = True,
        within: Sequence[str] = (),
        stored: Sequence[tuple[str, int]] | None = None,
        forked: bool = True,
    ) -> None:
        """Prepare a daemon.

        `library` is one of LIBRARIES, None leaves the choice to loopd; `config` is the text of its
        configuration file (empty when None); the runtime directory is a private one when None;
        `within` is a command that runs the one which follows it; `stored` are fds from the
        store of a former one, with their names; one that is not to be `forked` from a template
        has an interpreter of its own.
        """
        self._bus = bus
        self._library = library
        self._config = config or ""
        self._prelude = prelude
        self._runtime_directory = runtime_directory
        self._arguments = arguments
        self._environment = dict(environment or {})
        self._complaints = complaints
        self._wait_ready = wait_ready
        self._within = within
        self._stored = stored
        self._forked = forked and not within
        self._ended = False
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(area("daemon"))
            self.config_path = directory / "loopd.toml"
            self.config_path.write_text(self._config)
            self.runtime_directory = self._runtime_directory or directory / "run"
            self.runtime_directory.mkdir(exist_ok=True, parents=True)
            self.process = stack.enter_context(self._start())
            if self._wait_ready:
                self._bus.wait_owned(LOOPD, process=self.process)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._exit:
            early = self.process.status
            if early is None:
                self.process.stop()
        # A failure of the test itself is the better story.
        if kind is not None:
            return
        if early is not None and not self._ended:
            raise AssertionError(f"loopd ended on its own ({early}):\n{self.log}")
        if not self._complaints and _COMPLAINTS.search(self.log):
            raise AssertionError(f"loopd complained:\n{self.log}")

    def _start(self) -> Process:
        arguments = [
            *("--config", self.config_path),
            *("--runtime-directory", self.runtime_directory),
            *self._arguments,
        ]
        environment = {"DBUS_SYSTEM_BUS_ADDRESS": self._bus.address, **self._environment}
        fds = [fd for _, fd in self._stored or ()]
        if fds:
            environment["LISTEN_FDS"] = str(len(fds))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self._stored or ())
        template = templates.shared.get(f"loopd {self._library}")
        if template and self._forked:
            return template.start(
                "loopd",
                f"{self._prelude}\n{_RUN}",
                arguments,
                environment=environment,
                fds=fds,
            )
        listen = [sys.executable, "-I", "-S", _LISTEN, *map(str, fds), "--"] if fds else []
        return Process(
            [
                *self._within,
                *listen,
                *(sys.executable, "-W", "default::ResourceWarning", "-c", self._program()),
                *arguments,
            ],
            name="loopd",
            environment={"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", **environment},
            pass_fds=fds,
        )

    def _program(self) -> str:
        hidden = [each for each in LIBRARIES if self._library and each != self._library]
        return "\n".join([*(_HIDE.format(each) for each in hidden), self._prelude, _RUN])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.process.log.text

    def fds(self) -> dict[int, str]:
        """Return its open fds and what each is."""
        found = {}
        directory = f"/proc/{self.pid}/fd"
        for name in os.listdir(directory):
            try:
                found[int(name)] = os.readlink(f"{directory}/{name}")
            except FileNotFoundError:
                continue  # closed between the two looks
            except OSError as exc:
                if exc.errno != errno.ENAMETOOLONG:
                    raise
                found[int(name)] = "a path that is longer than a page"
        return found

    def fd_count(self) -> int:
        """Return the number of its open fds."""
        return len(self.fds())

    def wait_fds(
        self, wanted: Callable[[dict[int, str]], bool], what: str, timeout: float | None = None
    ) -> dict[int, str]:
        """Wait until its fds are as `wanted`, for helper threads close some a little later.

        Nobody is told of a close elsewhere, so each look is paced by a call that it answers.
        """
        deadline = Deadline(timeout)
        with self._bus.connect() as client:
            while not wanted(fds := self.fds()):
                if not deadline.remaining:
                    raise TimeoutError(f"{what}: its fds are {fds}")
                _ping(client.call, deadline)
        return fds

    def same_fds(self, timeout: float | None = None) -> "SameFds":
        """Return a context manager after which the daemon must have the number of fds it had."""
        return SameFds(self, timeout)

    def threads(self) -> int:
        """Return the number of its threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def children(self) -> list[int]:
        """Return its child processes."""
        return children_of(self.pid)

    def rss(self) -> int:
        """Return the bytes of memory it has resident."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def terminate(self, timeout: float | None = None) -> int:
        """End it by SIGTERM; return its exit status."""
        self._ended = True
        self.process.signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._ended = True
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends on its own, as this test expects; return its exit status."""
        self._ended = True
        return self.process.wait(timeout)


class SameFds:
    """Compares the daemon's fds at both ends of a `with` block."""

    def __init__(self, daemon: Daemon, timeout: float | None) -> None:
        """Remember whom to watch, and how long closing may take."""
        self._daemon = daemon
        self._timeout = timeout

    def __enter__(self) -> Self:
        self._before = self._daemon.fds()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._daemon.wait_fds(
                lambda fds: len(fds) == len(self._before),
                f"loopd to have the {len(self._before)} fds it had ({self._before})",
                self._timeout,
            )


def template_of(library: str | None) -> Template:
    """What such daemons are forked from, under the name in `templates.shared`."""
    hidden = [each for each in LIBRARIES if library and each != library]
    return Template(["loopd.daemon.main"], hidden=hidden)


def _ping(call: Callable[..., Any], deadline: Deadline) -> None:
    """Have the daemon do something: any answer will do, even a refusal."""
    try:
        call(
            "/org/example/Loop1",
            f"{BUS}.Peer",
            "Ping",
            destination=LOOPD,
            timeout=deadline.remaining,
        )
    except wire.CallError:
        return
