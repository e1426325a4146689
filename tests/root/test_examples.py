# SPDX-License-Identifier: LGPL-2.1-or-later
"""The programs in examples/ are built and run, by an ordinary user, on a private bus."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import loops
from tests.harness.area import CHECKOUT
from tests.harness.deadline import Deadline
from tests.harness.images import make_gpt
from tests.harness.process import Process
from tests.harness.window import Window, x_server
from tests.harness.world import USER, World

EXAMPLES = CHECKOUT / "examples"
XML = CHECKOUT / "dbus" / "org.example.Loop1.xml"
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]


def run(world: World, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program as the user, to its end."""
    done = subprocess.run(
        command,
        user=USER,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "DBUS_SYSTEM_BUS_ADDRESS": world.bus.address},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def build(*command: str | Path, cwd: Path = CHECKOUT) -> None:
    """Run what must succeed, and has nothing to say."""
    if not shutil.which(str(command[0])):
        pytest.skip(f"not installed: {command[0]}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def flags(package: str) -> list[str]:
    """What a compiler is told of a library."""
    done = subprocess.run(
        ["pkg-config", "--cflags", "--libs", package], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"not installed: {package}")
    return done.stdout.split()


class Running(Process):
    """An example that stays, and whose lines are read as they come."""

    def __init__(self, world: World, *command: str | Path) -> None:
        read_end, self._stdin = os.pipe()
        self._world = world
        super().__init__(
            command,
            name="example",
            user=USER,
            environment={"DBUS_SYSTEM_BUS_ADDRESS": world.bus.address},
            stdin=read_end,
        )
        os.close(read_end)

    def end_input(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
        self._stdin = -1

    def stop(self, timeout: float | None = None) -> int:
        self.end_input()
        return super().stop(timeout)

    def wait_printed(self, pattern: str) -> re.Match[str]:
        """Wait until it has printed something, each look being paced by a call on the bus."""
        deadline = Deadline()
        while not (found := re.search(pattern, self.log.text, re.MULTILINE)):
            if not deadline.remaining or self.status is not None:
                raise TimeoutError(f"no {pattern!r} in {self.log.text!r}")
            self._world.device_count()
        return found


def bound(node: str, image: Path) -> loops.BoundLoop | None:
    """The device, as long as it is over this image: others may be given the number."""
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    return loop if loop and loop.backing_file == str(image) else None


def was_detached(world: World, node: str, image: Path) -> bool:
    """Whether somebody has asked for it: a device also goes with the program that attached it."""
    lines = world.daemon.process.log.text.splitlines()
    last = [line for line in lines if f" of {node} for " in line][-1]
    return last.startswith("loopd: Detach ") and not bound(node, image)


# Python with Gio


def test_follow_tells_what_becomes_of_the_device_and_detaches_it(world: World) -> None:
    image = make_gpt(world.new_path(), owner=USER)
    with Running(world, EXAMPLES / "follow.py", image) as follow:
        node = follow.wait_printed(rf"^(/dev/loop\d+) is {image}$")[1]
        partitions = follow.wait_printed(
            rf"^{node}p1: .*\n{node}p2: partition 2 at \d+, \d+ bytes$"
        )
        assert partitions
        path = world.caller().manager("GetDeviceByNode", "s", node)[0]
        follow.wait_printed(f"^{node}: Holds is 1$")
        world.caller().device(path, "SetReference", "sa{sv}", "changed", {})
        follow.wait_printed(f"^{node}: Reference is 'changed'$")
        follow.signal(signal.SIGINT)
        assert follow.wait() == 0
    assert was_detached(world, node, image)


def test_follow_hears_that_somebody_has_detached_it(world: World) -> None:
    with Running(world, EXAMPLES / "follow.py", world.image()) as follow:
        node = follow.wait_printed(r"^(/dev/loop\d+) is ")[1]
        follow.wait_printed(f"^{node}: Holds is 1$")
        caller = world.caller()
        caller.detach(caller.manager("GetDeviceByNode", "s", node)[0])
        follow.wait_printed(f"^{node} is gone$")
        assert follow.wait() == 0


def test_follow_says_in_a_sentence_what_is_wrong(world: World) -> None:
    done = run(world, EXAMPLES / "follow.py", "/nowhere", check=False)
    assert (done.returncode, done.stderr) == (1, "follow.py: /nowhere: No such file or directory\n")
    done = run(world, EXAMPLES / "follow.py", "/dev/null", check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"follow\.py: [^\n:]*regular file[^\n]*\n", done.stderr), done.stderr


# C with sd-bus


def test_attach_in_c_attaches_tells_and_detaches(world: World) -> None:
    program = world.new_path()
    build("cc", *WARNINGS, EXAMPLES / "attach.c", "-o", program, *flags("libsystemd"))
    image = make_gpt(world.new_path(), owner=USER)
    with Running(world, program, image) as attach:
        node = attach.wait_printed(rf"^(/dev/loop\d+) {image.stat().st_size}$")[1]
        attach.wait_printed(rf"^{node}p1 \d+\n{node}p2 \d+$")
        assert bound(node, image)
        attach.end_input()
        assert attach.wait() == 0
    assert was_detached(world, node, image)
    done = run(world, program, "/dev/null", check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"Attach: .* \(org\.example\.Loop1\.Error\.\w+\)\n", done.stderr)


# C made by gdbus-codegen


def test_code_made_of_the_interface_attaches_and_lists(world: World) -> None:
    program, code = world.new_path(), world.new_path()
    code.mkdir()
    named = ["--c-namespace", "Loop", "--c-generate-autocleanup", "all"]
    generate = ["gdbus-codegen", "--glib-min-required", "2.64", "--output-directory", code]
    makes = ["--c-generate-object-manager", "--generate-c-code", "loop1"]
    build(*generate, *named, *makes, "--generate-docbook", "loop1", XML)
    sources = [EXAMPLES / "devices.c", code / "loop1.c"]
    build("cc", *WARNINGS, f"-I{code}", *sources, "-o", program, *flags("gio-unix-2.0"))
    image = world.image()
    attached = world.caller().attach(world.image())
    done = run(world, program, image)
    first, *devices = done.stdout.splitlines()
    assert re.fullmatch(rf"/dev/loop\d+ is {image} until this program ends", first)
    assert f"{first.split()[0]} {image.stat().st_size} {image}" in devices
    assert any(line.startswith(f"{attached.node} ") for line in devices)
    done = run(world, program, "/dev/null", check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"devices: [^\n]*regular file[^\n]*\n", done.stderr), done.stderr


# busctl


@pytest.mark.alone  # what is detached twice is to be nobody else's the second time
def test_devices_sh_lists_and_detaches(world: World) -> None:
    attached = world.caller().attach(image := world.image())
    script = EXAMPLES / "devices.sh"
    lines = run(world, script, "list").stdout.splitlines()
    assert f"{attached.node} {image.stat().st_size} 65534 connection" in lines
    assert run(world, script, "detach", attached.node).stdout == ""
    assert not bound(attached.node, image)
    done = run(world, script, "detach", attached.node, check=False)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert run(world, script, check=False).returncode == 2


# The window


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    if not shutil.which("Xvfb"):
        pytest.skip("not installed: Xvfb")
    with x_server() as name:
        yield name


def open_window(world: World, display: str, *images: str | Path) -> Window:
    home = world.new_path()
    home.mkdir()
    shutil.chown(home, USER)
    return Window(world.bus, display, USER, home, *images)


def details_of(labels: list[str], image: Path) -> str:
    """What the window says of an image, which begins with its node."""
    return labels[labels.index(image.name) + 1]


def test_the_window_shows_attaches_and_detaches(world: World, display: str) -> None:
    image = make_gpt(world.new_path(), owner=USER)
    with open_window(world, display, image) as window:
        first = details_of(window.do("wait", "2 partitions"), image)
        # Another program of the user's has one, too, and root, whose does not concern the user.
        caller = world.caller()
        others = world.caller(None).attach(world.image())
        second = caller.attach(another := world.image(), "r")
        labels = window.do("wait", another.name)
        assert (
            details_of(labels, another) == f"{second.node} · 1.0\N{NO-BREAK SPACE}MiB · read-only"
        )
        assert not any(label.startswith(f"{others.node} ") for label in labels)
        caller.detach(second.path)
        window.do("wait-not", another.name)
        window.do("click", "Detach")
        window.do("wait", "Nothing is attached.")
        assert not bound(first.split()[0], image)


def test_the_window_shows_what_loopd_has_against_it(world: World, display: str) -> None:
    with open_window(world, display, "/dev/null") as window:
        assert "the passed fd is neither a regular file nor a block device" in window.do(
            "wait", "regular file"
        )


def test_what_is_attached_goes_with_the_window(world: World, display: str) -> None:
    with open_window(world, display, image := world.image()) as window:
        details = details_of(window.do("wait", image.name), image)
        loop = bound(details.split()[0], image)
        assert loop
    loops.wait_unbound(loop.number, loop.diskseq)
