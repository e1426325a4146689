# SPDX-License-Identifier: LGPL-2.1-or-later
"""Direct I/O where the real kernel has reasons not to: the file's disk has larger sectors."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd.loop import change, query
from tests.harness.area import area as make_area
from tests.harness.images import MIB
from tests.harness.lab import Lab
from tests.harness.lab import lab as make_lab


@pytest.fixture
def lab(area: Path) -> Iterator[Lab]:
    with make_lab(area, real=True) as made:
        yield made


@contextmanager
def filesystem_on(node: str) -> Iterator[Path]:
    """A directory of a new ext4 filesystem, which only the mounting process sees."""
    environment = os.environ | {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    subprocess.run(["mkfs.ext4", "-q", "-F", node], check=True, env=environment)
    with make_area("mount") as directory:
        script = f"mount -t ext4 {node} {directory} && echo mounted && read -r _"
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == "mounted\n"
            yield Path(f"/proc/{holder.pid}/root{directory}")


def test_direct_io_that_the_disk_below_does_not_allow_is_done_without(lab: Lab) -> None:
    """A4, A8: the kernel binds the file all the same, and says so afterwards."""
    lower = lab.attach(lab.sparse(16 * MIB), sector_size=4096)
    with filesystem_on(lower.node) as directory:
        path = directory / "image"
        path.write_bytes(bytes(MIB))
        small = lab.attach(path, direct_io=True, sector_size=512)
        assert not query.status(small.number).direct_io
        assert lab.script.calls.count("loop_configure") == 3  # the lower one's, and two attempts
        assert not change.set_direct_io(small, enable=True)
        lab.detach(small)
        large = lab.attach(path, direct_io=True, sector_size=4096)
        assert query.status(large.number).direct_io
        lab.detach(large)
