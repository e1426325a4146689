# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FUSE filesystem of one file, for everyone to see, served by a process of ours."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import area
from tests.harness.deadline import Deadline
from tests.harness.images import MIB
from tests.harness.process import Process

_PROGRAM = Path(__file__).with_name("fuse_program.py")


class Fuse:
    """A mounted filesystem; `file` is its file until the `with` block ends."""

    def __init__(self, size: int = MIB, kind: str = "fuse") -> None:
        """Prepare a filesystem of the type `kind`, fuse or fuse.something."""
        self._size = size
        self._kind = kind
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(area("fuse"))
            self.file = directory / "file"
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            try:
                command = [sys.executable, "-I", _PROGRAM, directory, self._kind, str(self._size)]
                command.append(str(writing))
                self.process = stack.enter_context(
                    Process(command, name="fuse", pass_fds=[writing])
                )
            finally:
                os.close(writing)
            stack.callback(_unmount, directory)
            Deadline().wait_readable([reading], "the mount")
            if not os.read(reading, 100):
                raise RuntimeError(f"the filesystem was not mounted:\n{self.process.log.text}")
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()


def _unmount(directory: Path) -> None:
    # Lazily: what is still open there fails from now on, and nothing waits for anybody.
    subprocess.run(["umount", "--lazy", directory], check=False, capture_output=True)
