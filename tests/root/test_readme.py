# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README shows is run, as an ordinary user on a private bus with the real polkitd."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopd import config
from tests.harness.area import CHECKOUT
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.wire import CallError
from tests.harness.world import USER, World, make_world

README = (CHECKOUT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[str]:
    """The lines at a prompt that begin with a program, without their remarks."""
    lines = re.findall(rf"^    \$ ({program} .*)$", README, re.MULTILINE)
    return [re.sub(r"\s+#.*$", "", line) for line in lines]


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with make_world(authority=RULES_ALLOW_ALL) as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


def run(
    world: World, command: list[str], user: str | None = USER, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of a user on the private bus."""
    environment = os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": world.bus.address} | variables
    return subprocess.run(
        command,
        user=user,
        cwd=world.files,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("program", blocks("python"), ids=["gio", "blocking"])
def test_the_python_programs_run(world: World, program: str) -> None:
    image = world.image()
    done = run(
        world,
        ["/usr/bin/python3", "-W", "error::ResourceWarning", "-c", program, str(image)],
        PYTHONPATH=str(CHECKOUT),
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"/dev/loop\d+ is here until", done.stdout)
    assert not done.stderr


def test_the_settings_are_the_defaults(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    path = tmp_path / "loopd.toml"
    path.write_text(text)
    assert config.load(path) == config.Config()
    # And none is left out.
    settings = {**vars(config.Config()), **vars(config.Limits()), **vars(config.Deadlines())}
    assert [name for name in settings if not re.search(rf"^\[?{name}\b", text, re.MULTILINE)] == []


def test_the_rule_lets_the_group_attach_and_open(area: Path) -> None:
    (rule,) = blocks("js")
    assert "disk-images" in rule
    with make_world(authority=rule.replace("disk-images", "games")) as world, world.test():
        member = world.caller("games")
        attached = member.attach(world.image(owner="games"))
        member.open_device(attached.path, "r").close()
        member.detach(attached.path)
        with pytest.raises(CallError, match="InteractiveAuthorizationRequired"):
            world.caller("nobody").attach(world.image(owner="nobody"))


@pytest.mark.parametrize(
    "command", [each for each in commands("busctl") if not re.search(r" h \d", each)]
)
def test_the_busctl_calls_without_an_fd_work(world: World, command: str) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    kernel_name = attached.node.removeprefix("/dev/")
    command = command.replace("loop3_41", attached.path.rpartition("/")[2])
    command = re.sub(r"\bloop3\b", kernel_name, command)
    done = run(world, shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert done.stdout
