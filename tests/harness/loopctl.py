# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl as a program of some user's on a private bus, in pipes or at a terminal.

The package is copied to where every uid can read it, and run by Debian's Python, as an installed
one would be.
"""

import json
import os
import pty
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.harness.area import CHECKOUT
from tests.harness.bus import PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.world import USER

PYTHON = getattr(sys, "_base_executable", sys.executable)
_MAIN = "import sys; sys.path.insert(0, {!r}); from loopd.cli import main; sys.exit(main())"


class Running:
    """A loopctl under way; killed with its `with` block at the latest."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Take a process over."""
        self.process = process
        self._unread = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def line(self) -> str:
        """Wait for the next line on stdout."""
        deadline, stdout = Deadline(), self.process.stdout
        assert stdout is not None
        while b"\n" not in self._unread:
            deadline.wait_readable([stdout.fileno()], "a line of loopctl")
            data = os.read(stdout.fileno(), 4096)
            assert data, f"loopctl ended: {self.end()}"
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end; returns the exit status, the rest of stdout, and stderr."""
        out, err = self.process.communicate(timeout=30)
        return (
            self.process.returncode,
            (self._unread + (out or b"")).decode(),
            (err or b"").decode(),
        )


class Loopctl:
    """The program on one bus."""

    def __init__(self, bus: PrivateBus, package: Path, directory: Path) -> None:
        """Run the copy in `package`, in this directory."""
        self._address = bus.address
        self._program = [PYTHON, "-I", "-c", _MAIN.format(str(package))]
        self._directory = directory

    @contextmanager
    def start(
        self,
        *arguments: str | Path,
        user: str = USER,
        environment: Mapping[str, str] | None = None,
        before: tuple[str, ...] = (),
        **how: Any,
    ) -> Iterator[Running]:
        """Run loopctl as `user` in the test's directory; `before` is a program to start it."""
        account = pwd.getpwnam(user)
        streams: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        process = subprocess.Popen(
            [*before, *self._program, *map(str, arguments)],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LANG": "C.UTF-8",
                "DBUS_SYSTEM_BUS_ADDRESS": self._address,
                **(environment or {}),
            },
            cwd=self._directory,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            **(streams | how),
        )
        with process:
            try:
                yield Running(process)
            finally:
                process.kill()

    def run(self, *arguments: str | Path, **how: Any) -> tuple[int, str, str]:
        """Run loopctl to its end; returns exit status, stdout, stderr."""
        with self.start(*arguments, **how) as running:
            return running.end()

    def json(self, *arguments: str | Path, **how: Any) -> Any:
        """Run loopctl, which must succeed; returns what it tells as JSON."""
        status, out, err = self.run(*arguments, "--json", **how)
        assert (status, err) == (0, "")
        return json.loads(out)


def copy_package(directory: Path) -> Path:
    """Copy the package to a directory that every uid may enter; returns that.

    It is compiled as an installed one is: a user could not keep what Python compiles, so each run
    of a program would compile all of it again.
    """
    shutil.copytree(CHECKOUT / "loopd", directory / "loopd")
    subprocess.run([PYTHON, "-m", "compileall", "-q", directory], check=True, timeout=60)
    return directory


def number_of(node: str) -> int:
    """The number in the name of a device."""
    match = re.fullmatch(r"/dev/loop(\d+)", node)
    assert match, node
    return int(match[1])


def one_sentence(text: str) -> bool:
    """Whether this is how loopctl tells a problem."""
    return text.startswith("loopctl: ") and text.count("\n") == 1 and text.endswith("\n")


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal: the ends of who types and reads, and of the program."""
    with ExitStack() as stack:
        keyboard, screen = pty.openpty()
        stack.callback(os.close, keyboard)
        stack.callback(os.close, screen)
        yield keyboard, screen


def read_until(terminal_fd: int, pattern: str) -> str:
    """Read what a program writes to its terminal until it has written this."""
    seen, deadline = b"", Deadline()
    while not re.search(pattern, seen.decode(errors="replace")):
        deadline.wait_readable([terminal_fd], f"{pattern} after {seen!r}")
        seen += os.read(terminal_fd, 65536)
    return seen.decode()
