# SPDX-License-Identifier: LGPL-2.1-or-later
"""Emulated machines with loopd's package installed: one of each release, one after the other.

The package is that of the checkout, or the file that LOOPD_PACKAGE names.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import package, roots
from tests.harness.emulated import Emulated, disk

# How long emulation may take is no business of loopd's: its own deadlines are for real machines.
_SETTINGS = b"""
[deadlines]
authorization = 120
operation = 120
"""
_PATIENCE = """
cd /usr/lib/loopd
sed -i 's/^_CPU_SECONDS = .*/_CPU_SECONDS = 60/' $(find -name partition_table_child.py)
sed -i 's/^_TIMEOUT = .*/_TIMEOUT = 100.0/' $(find -name partition_table.py)
python3 -m compileall -q .
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Show what the machine of a failed test has to say."""
    report = yield
    machine = getattr(item, "funcargs", {}).get("machine")
    if report.failed and machine is not None:
        said = machine.result("journalctl", "--no-pager", "--output=short-monotonic", "--lines=60")
        report.sections.append(("the machine's journal", said.stdout))
    return report


@pytest.fixture(scope="session", params=roots.KERNELS.values(), ids=list(roots.KERNELS))
def booted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Emulated]:
    """A machine with loopd."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    try:
        root = roots.make(request.param)
    except roots.CannotMakeError as exc:
        pytest.skip(str(exc))
    if given := os.environ.get("LOOPD_PACKAGE"):
        file = Path(given)
    else:
        file = package.build(tmp_path_factory.mktemp("package"))
    with Emulated(request.param, disk(root), root) as machine:
        machine.write("/etc/loopd.toml", _SETTINGS)
        deb = machine.write(f"/root/{file.name}", file.read_bytes())
        machine.run("dpkg", "--force-unsafe-io", "--install", deb)
        machine.shell(_PATIENCE)
        yield machine


@pytest.fixture
def machine(booted: Emulated) -> Iterator[Emulated]:
    """That machine, with nothing attached before and after."""
    booted.run("dmesg", "--clear")
    yield booted
    left = booted.shell("udevadm settle --timeout=250; losetup --list --noheadings")
    if left:
        booted.run("systemctl", "stop", "loopd")  # with them
    said = booted.run("dmesg", "--level=emerg,alert,crit,err")
    assert (left, said) == ("", "")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory for images, which are made here and copied into the machine."""
    return tmp_path
