# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd's Debian package: built from the checkout, and put into a booted machine."""

import shutil
import subprocess
from pathlib import Path

from tests.harness.area import CHECKOUT
from tests.harness.booted import Machine


def build(directory: Path, version: str | None = None) -> Path:
    """Build the package, of the version that the sources say or another, and return its file."""
    done = subprocess.run(
        ["make", "--silent", "deb", *([f"VERSION={version}"] if version else [])],
        cwd=CHECKOUT,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(shutil.copy(CHECKOUT / done.stdout.split()[-1], directory))


def install(machine: Machine, package: Path) -> None:
    """Install a package, also over an older one, as root does it."""
    file = Path(shutil.copy(package, machine.files))
    machine.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--install", file)
    file.unlink()
