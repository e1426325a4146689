# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documents show is run, as an ordinary user on a private bus with the real polkitd.

tests/harness/documents.py says what kinds of blocks there are.
"""

import os
import pwd
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopd.daemon import config
from tests.harness.area import CHECKOUT
from tests.harness.documents import DOCUMENTS, Block, blocks, name, session
from tests.harness.images import MIB, make_ext4
from tests.harness.logind import LogindDouble
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.udev import Udev
from tests.harness.wire import CallError
from tests.harness.world import USER, World, make_world

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
MANUAL = CHECKOUT / "docs" / "man" / "loopd.toml.5.rst"


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.info == kind]


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing, LogindDouble(shared.bus, pwd.getpwnam(USER).pw_uid):
        yield testing


@pytest.mark.parametrize(
    "document",
    [each for each in DOCUMENTS if any(block.info == "console" for block in blocks(each))],
    ids=name,
)
def test_its_commands_do_what_it_shows(world: World, area: Path, document: Path) -> None:
    os.chown(area, pwd.getpwnam(USER).pw_uid, -1)
    if document.name == "README.md":
        # What its reader has at hand.
        make_ext4(area / "disk.img", 16 * MIB, owner=USER)
    programs = {block.file: False for block in blocks(document) if block.info[:2] in ("py", "sh")}
    with session(USER, area, {"DBUS_SYSTEM_BUS_ADDRESS": world.bus.address}) as shell:
        for block in blocks(document):
            if block.file and block.file in programs:
                (area / block.file).write_text(block.text)
                (area / block.file).chmod(0o755)
            elif block.info == "console":
                for command in block.commands():
                    programs |= {each: True for each in programs if each and each in command.text}
                    shell.run(command)
    programs.pop(None, None)
    assert all(programs.values()), f"not run: {programs}"


@pytest.mark.parametrize("program", of_kind("python"), ids=str)
def test_the_programs_that_take_an_image_run(world: World, program: Block) -> None:
    done = subprocess.run(
        ["/usr/bin/python3", "-W", "error::ResourceWarning", "-c", program.text, world.image()],
        user=USER,
        cwd=world.files,
        env={"DBUS_SYSTEM_BUS_ADDRESS": world.bus.address, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"/dev/loop\d+ is here until", done.stdout)
    assert not done.stderr


@pytest.mark.parametrize("settings", of_kind("toml"), ids=str)
def test_the_settings_are_taken(tmp_path: Path, settings: Block) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text(settings.text)
    assert config.load(path) != config.Config()


def rules() -> list[str]:
    """The rules for polkit, in documents and in loopd.toml(5)."""
    found = re.findall(r"^  polkit\.addRule\(.*?^  \}\);$", MANUAL.read_text(), re.DOTALL | re.M)
    return [textwrap.dedent(each) for each in found] + [block.text for block in of_kind("js")]


def test_a_rule_lets_the_group_attach_and_open() -> None:
    rule, *others = rules()
    # One is shown in several places.
    assert others
    assert {each.strip() for each in others} == {rule.strip()}
    with make_world(authority=rule.replace("disk-images", "games")) as world, world.test():
        member = world.caller("games")
        attached = member.attach(world.image(owner="games"))
        member.open_device(attached.path, "r").close()
        member.detach(attached.path)
        with pytest.raises(CallError, match="InteractiveAuthorizationRequired"):
            world.caller("nobody").attach(world.image(owner="nobody"))


def busctl_calls() -> list[str]:
    """The calls of busctl that org.example.Loop1(5) shows and every version knows."""
    text = (CHECKOUT / "docs" / "man" / "org.example.Loop1.5.rst").read_text().replace("\\\n", "")
    calls = re.findall(r"^  \$ (busctl .*)$", text, re.MULTILINE)
    return [each for each in calls if not re.search(r" h \d", each)]


@pytest.mark.parametrize("command", busctl_calls())
def test_the_busctl_calls_without_an_fd_work(world: World, command: str) -> None:
    attached = world.caller().attach(world.image())
    command = command.replace("loop3_41", attached.path.rpartition("/")[2])
    command = re.sub(r"\bloop3\b", attached.node.removeprefix("/dev/"), command)
    done = subprocess.run(
        shlex.split(command),
        user=USER,
        env=os.environ | {"DBUS_SYSTEM_BUS_ADDRESS": world.bus.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.alone  # the rule is about the devices of others, too
def test_a_rule_of_udev_shows_what_users_attach(area: Path) -> None:
    (shown,) = of_kind("udev")
    rules = {
        path.name: path.read_text().replace("/run/loopd/", f"{area}/")
        for path in (CHECKOUT / "systemd").glob("*.rules")
    }
    with (
        Udev(rules | {"63-show-images.rules": shown.text}) as udev,
        make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world,
        world.test(),
    ):
        attached = world.caller().attach(world.image())
        udev.settle()
        found = udev.properties(attached.node)
        assert (found["UDISKS_IGNORE"], found["UDISKS_AUTO"]) == ("0", "0")
