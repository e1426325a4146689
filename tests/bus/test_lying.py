# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl and the client library, where the service on the bus is not loopd, and lies."""

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopd.bus.codec import Variant as Told
from loopd.client import Client, errors
from loopd.fd import OwnedFd
from tests.harness.area import area
from tests.harness.bus import PrivateBus
from tests.harness.images import make_plain
from tests.harness.loopctl import Loopctl, copy_package
from tests.harness.loopd import DEVICE, PATH, LoopdDouble
from tests.harness.wire import Variant

ESCAPES = "\n\x1b]0;forged\x07\x9b31m"

DEVICE_LIES = {
    "Node": [
        Variant("s", f"/dev/loop3{ESCAPES}"),
        Variant("s", "/dev/loop3 --version"),
        Variant("s", "/dev/../etc/passwd"),
        Variant("s", "/dev/loop3\u202e"),
        Variant("s", "loop3"),
        Variant("s", ""),
        Variant("s", "/dev/" + "x" * 300),
        Variant("u", 3),
    ],
    "Lifetime": [Variant("s", f"user{ESCAPES}"), Variant("s", "for ever"), Variant("b", True)],
    "State": [Variant("s", f"attached{ESCAPES}"), Variant("s", ""), Variant("u", 1)],
    "Locked": [Variant("s", f"none{ESCAPES}"), Variant("s", "yes")],
    "Holder": [Variant("s", f":1.9{ESCAPES}"), Variant("s", "root"), Variant("t", 9)],
    "Partitions": [
        Variant("a(ustt)", [[1, f"/dev/loop3p1{ESCAPES}", 0, 512]]),
        Variant("as", ["/dev/loop3p1"]),
    ],
    "AttachedAt": [Variant("t", 2**64 - 1), Variant("x", -1)],
    "Size": [Variant("s", "large"), Variant("d", 1e300)],
    "BackingFile": [Variant("s", "/tmp/disk.img")],
    "Managed": [Variant("u", 1)],
    "Owner": [Variant("i", -1)],
}
ANSWER_LIES: list[tuple[str, str, list[Any]]] = [
    ("Attach", "ost", [PATH, f"/dev/loop3{ESCAPES}", 41]),
    ("Attach", "ost", ["/elsewhere", "/dev/loop3", 41]),
    ("Attach", "sst", [ESCAPES, "/dev/loop3", 41]),
    ("Attach", "os", [PATH, "/dev/loop3"]),
    ("Attach", "", []),
]
COMMANDS = {
    "list": "list",
    "list, all of it": "list --output-all",
    "list as JSON": "list --json --output-all",
    "show": "show loop3",
    "set": "set --lifetime user --json loop3",
    "detach": "detach --all",
    "resize": "resize loop3",
    "monitor": "monitor",
    "hold": "hold disk.img",
    "attach": "attach --lifetime user disk.img",
    "run": "run disk.img -- touch {}.ran ran",
    "open": "open loop3 -- touch ran",
}


@pytest.fixture
def double(bus: PrivateBus) -> Iterator[LoopdDouble]:
    with LoopdDouble(bus) as double:
        yield double


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    """A directory with the package that every uid can read."""
    with area("package") as directory:
        yield copy_package(directory)


@pytest.fixture
def loopctl(bus: PrivateBus, package: Path, area: Path) -> Loopctl:
    if os.getuid() != 0:
        pytest.skip("only root owns loopd's name")
    make_plain(area / "disk.img", 4096)
    return Loopctl(bus, package, area)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_lie_is_neither_shown_nor_passed_on(
    double: LoopdDouble, loopctl: Loopctl, area: Path, command: str
) -> None:
    """A lying service: each command ends with one sentence."""
    for name, lies in DEVICE_LIES.items():
        double.device = {name: lies[0]}
        status, out, err = loopctl.run(*COMMANDS[command].split(), user="root")
        assert status != 0, name
        assert re.fullmatch(r"loopctl: [ -~]+\n", err), (name, err)
        assert out == "", name
        assert not (area / "ran").exists(), name


@pytest.mark.parametrize(
    ("name", "lie"), [(name, lie) for name, lies in DEVICE_LIES.items() for lie in lies]
)
def test_a_property_that_no_device_has_is_no_property(
    bus: PrivateBus, double: LoopdDouble, name: str, lie: Variant
) -> None:
    """A lying service."""
    double.device = {name: lie}

    async def ask() -> None:
        async with await Client.connect(bus.address) as client:
            for question in (client.devices(), client.device_by_node("loop3")):
                with pytest.raises(errors.Failed, match="property"):
                    await question

    asyncio.run(ask())


@pytest.mark.parametrize(("member", "signature", "body"), ANSWER_LIES, ids=range(len(ANSWER_LIES)))
@pytest.mark.parametrize("command", ["hold", "attach", "run"])
def test_an_answer_that_is_none_attaches_nothing(
    double: LoopdDouble,
    loopctl: Loopctl,
    area: Path,
    command: str,
    member: str,
    signature: str,
    body: list[Any],
) -> None:
    """A lying service."""
    double.answers = {member: (signature, body)}
    status, out, err = loopctl.run(*COMMANDS[command].split(), user="root")
    assert status != 0
    assert out == ""
    assert re.fullmatch(r"loopctl: [ -~]+\n", err), err
    assert not (area / "ran").exists()


WRONG = [("u", [1]), ("s", ["x"]), ("", []), ("bb", [True, True]), ("a{os}", [{PATH: DEVICE}])]


@pytest.mark.parametrize(("signature", "body"), WRONG)
def test_every_answer_has_the_types_of_the_interface(
    bus: PrivateBus, double: LoopdDouble, signature: str, body: list[Any]
) -> None:
    """A number is one answer of these, and to one question of these."""

    async def ask() -> None:
        async with await Client.connect(bus.address) as client:
            device = await client.device_by_node("loop3")
            with OwnedFd(os.open(os.devnull, os.O_RDONLY)) as file:
                questions = {
                    "GetManagedObjects": client.devices,
                    "GetDeviceByNode": lambda: client.device_by_node("loop3"),
                    "GetDevice": lambda: client.device_by_fd(file),
                    "GetAll": client.daemon,
                    "Detach": device.detach,
                    "SetDirectIO": lambda: device.set_direct_io(True),
                }
                if signature != "u":
                    questions["Resize"] = device.resize
                    questions["RescanPartitions"] = device.rescan_partitions
                for member, question in questions.items():
                    double.answers = {member: (signature, body)}
                    if member == "GetManagedObjects" and signature == "a{os}":
                        assert await question() == []
                        continue
                    with pytest.raises(errors.Failed):
                        await question()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("Version", Variant("u", 1)),
        ("DeviceCount", Variant("s", "1")),
        ("MaxDevices", Variant("v", Variant("u", 1))),
    ],
)
def test_what_loopd_tells_of_itself_has_its_types(
    bus: PrivateBus, double: LoopdDouble, name: str, lie: Variant
) -> None:
    double.manager = {name: lie}

    async def ask() -> None:
        async with await Client.connect(bus.address) as client:
            with pytest.raises(errors.Failed, match=name):
                await client.daemon()

    asyncio.run(ask())


def test_mistakes_in_the_settings_are_told_to_root_on_one_line(
    double: LoopdDouble, loopctl: Loopctl
) -> None:
    double.manager = {"ConfigurationError": Variant("s", f"/etc/loopd.toml: x{ESCAPES}")}
    shown = re.compile(r"loopctl: /etc/loopd\.toml: x\\n\\x1b[ -~]+\n")
    for command in ("list", "hold disk.img"):
        with loopctl.start(*command.split(), user="root") as running:
            if command.startswith("hold"):
                running.line()
                running.signal(15)
            status, _, err = running.end()
        assert status == 0
        assert shown.match(err), err
    assert loopctl.run("list", user="nobody")[2] == ""


def test_a_loopd_that_does_not_tell_of_its_settings_is_older(
    double: LoopdDouble, loopctl: Loopctl
) -> None:
    assert loopctl.run("list", user="root")[2] == ""


def test_a_truth_of_every_kind_is_told(bus: PrivateBus, double: LoopdDouble) -> None:
    double.device = {
        "Node": Variant("s", "/dev/mapper/vg-home+1"),
        "Partitions": Variant("a(ustt)", [[1, "/dev/nvme0n1p1", 512, 1024]]),
        "Reference": Variant("s", f"any{ESCAPES}"),
        "Holder": Variant("s", ""),
        "Lifetime": Variant("s", ""),
        "Size": Variant("t", 2**64 - 1),
        "Novelty": Variant("(ss)", ["of a", "newer loopd"]),
    }

    async def ask() -> None:
        async with await Client.connect(bus.address) as client:
            ((device, told),) = await client.devices()
            assert device.node == told.node == "/dev/mapper/vg-home+1"
            assert told.size == 2**64 - 1
            assert told.updated({"State": Told("s", "detaching")}).state == "detaching"
            with pytest.raises(errors.Failed, match="state"):
                told.updated({"State": Told("s", ESCAPES)})

    asyncio.run(ask())
