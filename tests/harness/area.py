# SPDX-License-Identifier: LGPL-2.1-or-later
"""Temporary directories that every uid may reach, and where the checkout is.

pytest's own tmp_path is closed to other users, whose programs these tests run.  All directories of
one test process begin with PREFIX, which tells its files from those of a neighbour's run.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The top of the source tree."""

TOKEN = f"loopd-test-{os.getpid()}-"
"""In the name of everything that this process makes and others could see."""

PREFIX = Path("/tmp") / TOKEN
MACHINES_PREFIX = Path("/var/tmp") / TOKEN
"""The same for booted machines, which have a /tmp of their own."""


@contextmanager
def area(purpose: str, mode: int = 0o755, parent: Path = PREFIX.parent) -> Iterator[Path]:
    """Yield a new directory that every uid may enter; remove it with all it holds."""
    # Not TMPDIR, which may lead into a directory of one user.
    path = Path(tempfile.mkdtemp(prefix=f"{PREFIX.name}{purpose}-", dir=parent))
    try:
        path.chmod(mode)
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def small_tmpfs(directory: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs where only its own processes see it; yield the way to it."""
    directory.mkdir()
    script = f'mount -t tmpfs -o size={size} none "$1" && echo mounted && read -r _'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "mounted\n"
        yield Path(f"/proc/{holder.pid}/root{directory}")
