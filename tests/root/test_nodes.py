# SPDX-License-Identifier: LGPL-2.1-or-later
"""A /dev in which something else is in the place of a loop device's node, or no node is made."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT
from tests.harness.images import MIB, make_plain

PROGRAM = """
import os, subprocess, sys
from loopd.loop import attach as attachment, backing_file as backing, kernel, loop_device as loopdev
from loopd.loop.attach import Numbers, Driver
from loopd.errors import LoopError
from loopd.fd import OwnedFd
from loopd.loop.request import AttachRequest

how, image = sys.argv[1:]
tries, made = [], []
add, remove = kernel.loop_ctl_add, loopdev.remove

def adding(control_fd, number):
    made.append(add(control_fd, number))
    return made[-1]

kernel.loop_ctl_add = adding
get_free = kernel.loop_ctl_get_free
with OwnedFd(kernel.open_loop_control()) as control:
    number = add(control.fileno(), -1)
    # Another user's program may have it as well: to be seen is only what becomes of ours.
    kernel.loop_ctl_get_free = lambda fd: tries.append(number) or number
    mount = lambda *args: subprocess.run(["mount", *args], check=True)
    if how == "file":
        mount("--bind", image, f"/dev/loop{number}")
    elif how == "device":
        mount("--bind", "/dev/null", f"/dev/loop{number}")
    else:
        mount("-t", "tmpfs", "none", "/dev")
        os.mknod("/dev/loop-control", 0o20600, os.makedev(10, 237))
    wanted = number if how == "wanted" else None
    if wanted is not None:
        mount("-t", "tmpfs", "none", "/dev")
        os.mknod("/dev/loop-control", 0o20600, os.makedev(10, 237))
        open(f"/dev/loop{number}", "w").close()
    driver = Driver()
    file = OwnedFd(os.open(image, os.O_RDWR))
    examined = backing.examine(file.fileno())
    request = AttachRequest(number=wanted, direct_io=False)
    try:
        device = attachment.attach(file, examined, request, driver=driver)
    except LoopError as exc:
        print(type(exc).__name__, len(tries) + len(made), exc)
    else:
        print(device.number != number, driver.configures)
        loopdev.detach(device)
        device.close()
    for each in (number, *made):
        remove(each)
"""


def attach(how: str, image: Path) -> str:
    """Attach an image in a mount namespace with such a /dev; what came of it."""
    command = ["unshare", "--mount", "--propagation=private", sys.executable, "-c", PROGRAM]
    done = subprocess.run([*command, how, image], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("what", ["file", "device"])
def test_a_node_that_is_something_else_is_passed_over_and_teaches_nothing(
    tmp_path: Path, what: str
) -> None:
    image = make_plain(tmp_path / "image", MIB)
    assert attach(what, image) == "True True\n"
    assert image.stat().st_size == MIB


def test_a_wanted_device_whose_node_is_something_else_is_named(tmp_path: Path) -> None:
    answer = attach("wanted", make_plain(tmp_path / "image", MIB))
    assert answer.startswith("NotSupported")
    assert "is no loop device: remove the file in its place" in answer


def test_a_dev_without_new_nodes_is_named_at_once(tmp_path: Path) -> None:
    name, tries, text = attach("tmpfs", make_plain(tmp_path / "image", MIB)).split(" ", 2)
    assert name == "NotSupported"
    assert int(tries) <= 3
    assert "devtmpfs" in text
