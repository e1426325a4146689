# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd's Debian package: built from the checkout, and put into a booted machine."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.area import CHECKOUT
from tests.harness.booted import Machine
from tests.harness.roots import Release

_RULES = """
polkit.addRule(function (action, subject) {
    if (action.id == "org.example.loop1.keep" && subject.user == "carol") return polkit.Result.YES;
});
"""


def build(directory: Path, version: str | None = None) -> Path:
    """Build the package, of the version that the sources say or another, and return its file."""
    done = subprocess.run(
        ["make", "--silent", "deb", *([f"VERSION={version}"] if version else [])],
        cwd=CHECKOUT,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(shutil.copy(CHECKOUT / done.stdout.split()[-1], directory))


def install(machine: Machine, package: Path) -> None:
    """Install a package, also over an older one, as root does it."""
    file = Path(shutil.copy(package, machine.files))
    machine.run("dpkg", "--force-unsafe-io", "--install", file)
    file.unlink()


@contextmanager
def machine_without(release: Release, root: Path) -> Iterator[Machine]:
    """Boot a machine without loopd, where the administrator trusts carol with devices that stay."""
    with Machine(release, root) as booted:
        booted.write("/etc/polkit-1/rules.d/50-tests.rules", _RULES)
        yield booted


@contextmanager
def machine_with(release: Release, root: Path, package: Path) -> Iterator[Machine]:
    """Boot such a machine, and install a package."""
    with machine_without(release, root) as booted:
        install(booted, package)
        yield booted
