# SPDX-License-Identifier: LGPL-2.1-or-later
"""Temporary directories that every uid may reach, and where the checkout is.

pytest's own tmp_path is closed to other users, whose programs these tests run.  All directories of
one test process begin with PREFIX, which tells its files from those of a neighbour's run.
"""

import os
import shutil
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
