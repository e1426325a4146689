# SPDX-License-Identifier: LGPL-2.1-or-later
"""The behaviours of tests/harness/behaviours.py, each on Debian's own kernels.

They run in the machine, all in one go, on the modules of the package. udevd does not run meanwhile:
it would lock and open devices, and for seconds. What became of each behaviour is a test here.
"""

import io
import tarfile
from collections import defaultdict
from xml.etree import ElementTree

import pytest

from tests.harness import behaviours
from tests.harness.area import CHECKOUT
from tests.harness.emulated import Emulated

NAMES = [name for name in vars(behaviours) if name.startswith("test_")]

_HARNESS = "__init__ area behaviours deadline images lab loops script scripted".split()
_SOCKETS = ("systemd-udevd-control.socket", "systemd-udevd-kernel.socket")
_RESULTS = "/root/results.xml"
_TIMEOUT = 1800.0


def _files() -> bytes:
    """A tar of what they need of the checkout."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("tests/__init__.py", *(f"tests/harness/{each}.py" for each in _HARNESS)):
            tar.add(CHECKOUT / name, name)
        tar.add(CHECKOUT / "tests/root/test_real_kernel.py", "tests/root/test_real_kernel.py")
    return stream.getvalue()


@pytest.fixture(scope="session")
def outcomes(booted: Emulated) -> dict[str, list[str]]:
    """What became of each: nothing where it passed, else what pytest tells, for each parameter."""
    booted.run("mkdir", "--parents", "/root/checkout")
    booted.run("tar", "-x", "-C", "/root/checkout", stdin=_files())
    booted.run("systemctl", "stop", "loopd")
    booted.run("systemctl", "stop", "systemd-udevd.service", *_SOCKETS)
    # The root's pytest is older than the checkout wants.
    ended = booted.result(
        *("env", "-C", "/root/checkout", "PYTHONPATH=/usr/lib/loopd:/root/checkout"),
        *("/usr/bin/python3", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir=/root/checkout"),
        *("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning"),
        *("--noconftest", f"--junit-xml={_RESULTS}", "tests/root/test_real_kernel.py"),
        timeout=_TIMEOUT,
    )
    # They leave devices.
    booted.shell("modprobe --remove loop; modprobe loop")
    booted.run("systemctl", "start", *_SOCKETS)
    found = defaultdict(list)
    try:
        told = ElementTree.fromstring(booted.run("cat", _RESULTS))
    except AssertionError:
        pytest.fail(f"no results: {ended.stdout}")
    for case in told.iter("testcase"):
        name, _, _ = case.attrib["name"].partition("[")
        found[name].append("\n".join(each.text or each.attrib["message"] for each in case))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_behaves(outcomes: dict[str, list[str]], name: str) -> None:
    assert outcomes.get(name)
    assert not any(outcomes[name]), "\n".join(outcomes[name])
