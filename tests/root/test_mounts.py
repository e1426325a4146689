# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own mount table, in a mount namespace where it can be changed."""

import subprocess
import sys
from pathlib import Path

from tests.harness.area import CHECKOUT

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from loopd import kernel, mounts

reads = []
whole = mounts._whole
mounts._whole = lambda fd: (reads.append(fd), whole(fd))[1]
table = mounts.Table(Path("/proc/self/mountinfo"))
directory = sys.argv[1]

def kind(path):
    fd = os.open(path, os.O_PATH)
    try:
        return table.filesystem(kernel.statx(fd).stx_mnt_id, -1)
    finally:
        os.close(fd)

def look():
    print(kind(directory), kind(directory), len(reads))

look()
for kind_of in "ramfs", "tmpfs":
    subprocess.run(["mount", "-t", kind_of, "none", directory], check=True)
    look()
subprocess.run(["umount", directory], check=True)
look()
"""


def test_a_table_is_read_again_only_when_it_has_changed(tmp_path: Path) -> None:
    below = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    found = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", PROGRAM, tmp_path],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    kinds = (below, "ramfs", "tmpfs", "ramfs")
    assert found == [f"{kind} {kind} {count}" for count, kind in enumerate(kinds, start=1)]
