# SPDX-License-Identifier: LGPL-2.1-or-later
"""An X server that shows nothing, and examples/window.py on it."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness.area import CHECKOUT
from tests.harness.bus import PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.process import Log, Process

PROGRAM = Path(__file__).with_name("window_program.py")


@contextmanager
def x_server(screen: Path | None = None) -> Iterator[str]:
    """The name of a display, for as long as the block lasts; anyone may use it.

    What is on its screen is in a file in the directory `screen`, if that is given.
    """
    read_end, write_end = os.pipe()
    try:
        command = ["Xvfb", "-displayfd", str(write_end), "-nolisten", "tcp", "-ac"]
        command += ["-screen", "0", "800x600x24", *(["-fbdir", str(screen)] if screen else [])]
        with Process(command, name="Xvfb", pass_fds=[write_end]) as process:
            os.close(write_end)
            write_end = -1
            Deadline().wait_readable([read_end, process.pidfd], "Xvfb")
            yield f":{os.read(read_end, 64).decode().strip()}"
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


class Window:
    """The window as a user sees it, until the end of the `with` block."""

    def __init__(
        self, bus: PrivateBus, display: str, user: str, home: Path, *images: str | Path
    ) -> None:
        """Start it with images, as a user with an empty home."""
        self._log = Log("window.py")
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home),
            "DISPLAY": display,
            "DBUS_SYSTEM_BUS_ADDRESS": bus.address,
            "DBUS_SESSION_BUS_ADDRESS": "disabled:",
            # Nothing of a desktop is there, nor anything that draws but the processor.
            "GDK_BACKEND": "x11",
            "GSK_RENDERER": "cairo",
            "GTK_A11Y": "none",
            "GSETTINGS_BACKEND": "memory",
        }
        self._process = subprocess.Popen(
            ["/usr/bin/python3", PROGRAM, CHECKOUT / "examples" / "window.py", *images],
            env=environment,
            cwd="/",
            user=user,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.fileno(),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                self._process.kill()
            with self._process:
                pass
        finally:
            self._log.close()
        if kind is None:
            assert (self._process.returncode, self._log.text) == (0, "")

    def do(self, command: str, argument: object = "") -> Any:
        """Have the program carry out a line; see there."""
        assert self._process.stdin
        assert self._process.stdout
        print(command, argument, file=self._process.stdin, flush=True)
        Deadline().wait_readable([self._process.stdout.fileno()], f"the window: {command}")
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"the window has ended: {self._log.text}")
        return json.loads(line)
