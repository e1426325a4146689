# SPDX-License-Identifier: LGPL-2.1-or-later
"""What loopctl has attached is ready when it says so: udev has made the links, if udev runs."""

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd.client import blocking
from tests.harness.area import CHECKOUT, area
from tests.harness.images import MIB, make_ext4, make_gpt
from tests.harness.loopctl import Loopctl, copy_package, number_of
from tests.harness.loops import look_at, partitions
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.udev import Udev
from tests.harness.world import USER, World, make_world

# Which nobody else on this machine is given.
TENTH = 52_000 + os.getpid() % 5_000
NUMBERS = range(TENTH * 10, TENTH * 10 + 10)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    """Where loopd leaves what its rules for udev look for."""
    with area("run") as directory:
        yield directory


@pytest.fixture(scope="module")
def gate() -> Iterator[Path]:
    """A file; while it is locked, udev does not come to an end with devices of these NUMBERS."""
    with area("gate") as directory:
        path = directory / "gate"
        path.touch()
        yield path


@pytest.fixture(scope="module")
def udev(runtime: Path, gate: Path) -> Iterator[Udev]:
    rules = {
        path.name: path.read_text().replace("/run/loopd/", f"{runtime}/")
        for path in (CHECKOUT / "systemd").glob("*.rules")
    }
    # Not while the device is new: udev has it locked meanwhile, and nothing could be attached.
    bound = f'KERNEL=="loop{TENTH}[0-9]", TEST=="loop/backing_file"'
    rules["99-gate.rules"] = f'{bound}, PROGRAM=="/usr/bin/flock -s {gate} true"\n'
    with Udev(rules) as running:
        yield running


@pytest.fixture(scope="module")
def shared(runtime: Path, udev: Udev) -> Iterator[World]:
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=runtime) as made:
        yield made


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


@pytest.fixture(scope="module")
def package() -> Iterator[Path]:
    with area("package") as directory:
        yield copy_package(directory)


@pytest.fixture
def loopctl(world: World, package: Path) -> Loopctl:
    return Loopctl(world.bus, package, world.files)


@contextmanager
def closed(gate: Path) -> Iterator[Callable[[], None]]:
    """Keep udev from coming to an end, until the function is called or the block ends."""
    with gate.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def disk(world: World, label: str) -> Path:
    """A disk with a filesystem in its first partition."""
    image = make_gpt(world.new_path(), owner=USER)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(world.new_path(), MIB, label=label).read_bytes())
    return image


def links_of(node: str, diskseq: int, label: str) -> dict[str, str]:
    """Where links to a disk and its first partition, that root attached, are to lead."""
    name = f"/dev/disk/by-loop-ref/{label}"
    return {
        f"/dev/disk/by-diskseq/{diskseq}": node,
        name: node,
        f"{name}-part1": f"{node}p1",
        f"/dev/disk/by-label/{label}": f"{node}p1",
    }


def found(links: dict[str, str]) -> dict[str, str]:
    return {link: os.path.realpath(link) for link in links}


@pytest.mark.parametrize("turn", range(3))
def test_roots_links_are_there_when_attach_returns(
    world: World, loopctl: Loopctl, turn: int
) -> None:
    label = f"settling{turn}"
    image = disk(world, label)
    told = loopctl.json("attach", "-P", "--loop-ref", label, image, user="root")
    links = links_of(told["node"], told["diskseq"], label)
    assert found(links) == links
    assert loopctl.run("detach", image, user="root") == (0, "", "")


@pytest.mark.parametrize("turn", range(3))
def test_roots_links_are_there_for_the_command_of_run(
    world: World, loopctl: Loopctl, turn: int
) -> None:
    label = f"running{turn}"
    script = f"readlink -f /dev/disk/by-label/{label} /dev/disk/by-loop-ref/{label}; echo {{}}"
    command = ("run", "-P", "--loop-ref", label, disk(world, label), "--", "sh", "-c", script)
    status, out, err = loopctl.run(*command, user="root")
    partition, by_ref, node = out.split()
    assert (status, err, partition, by_ref) == (0, "", f"{node}p1", node)


@pytest.mark.alone  # anybody may be given the number before it is bound
@pytest.mark.parametrize(("command", "which"), [("attach", 5), ("hold", 6)])
def test_nobody_is_told_of_a_device_before_udev_is_done(
    world: World, loopctl: Loopctl, gate: Path, command: str, which: int
) -> None:
    number = NUMBERS[which]
    with closed(gate) as let_go:
        arguments = (command, "--number", str(number), world.image())
        with loopctl.start(*arguments, user="root") as running:
            world.wait_devices(1)
            # One that does not wait has ended by the time that this one would have told.
            told = loopctl.json("attach", "--no-settle", world.image(), user="root")
            assert running.process.poll() is None
            loop = look_at(number)
            assert loop is not None
            link = Path(f"/dev/disk/by-diskseq/{loop.diskseq}")
            assert not link.is_symlink()
            let_go()
            assert running.line() == loop.node
            assert link.resolve() == Path(loop.node)
            for node in (loop.node, told["node"]):
                assert loopctl.run("detach", node, user="root")[0] == 0


@pytest.mark.alone  # anybody may be given the number before it is bound
def test_what_need_not_be_waited_for_is_not(
    world: World, udev: Udev, loopctl: Loopctl, gate: Path
) -> None:
    """No option, a lock that udev heeds, and no udev: none of these ends if it waits."""
    hidden = 'mount -t tmpfs none /run/udev && exec "$@"'
    with closed(gate):
        for number, (options, before) in zip(
            NUMBERS,
            (
                (["--no-settle"], ()),
                (["--lock=exclusive"], ()),
                ([], ("unshare", "--mount", "--propagation", "private", "sh", "-c", hidden, "sh")),
            ),
            strict=False,
        ):
            command = ("run", "--number", str(number), *options, world.image(), "--", "true")
            status, out, err = loopctl.run(*command, user="root", before=before)
            assert (status, out) == (0, "")
            # udev may have the device open.
            assert err == "" or err.endswith("goes when its last user closes it\n")
    udev.settle()
    world.wait_devices(0)


def test_programs_wait_with_the_library_or_with_udevadm(world: World, loopctl: Loopctl) -> None:
    image = disk(world, "library")
    with blocking.Client.connect(world.bus.address) as client:
        with client.attach(image, partition_scan=True, reference="library") as device:
            assert device.settled(20)
            assert len(partitions(number_of(device.node))) == 2
            links = links_of(device.node, device.diskseq, "library")
            assert found(links) == links
            assert device.settled(0)
    with blocking.Client.connect(world.bus.address) as client, client.attach(image) as device:
        link = f"/dev/disk/by-diskseq/{device.diskseq}"
        subprocess.run(["udevadm", "wait", "--timeout=20", link], check=True, user=USER)
        assert found({link: ""}) == {link: device.node}


def test_partitions_that_a_rescan_makes_have_their_links(world: World, loopctl: Loopctl) -> None:
    image = world.image(4 * MIB)
    told = loopctl.json("attach", "--loop-ref=rescanned", image, user="root")
    make = disk(world, "rescanned").read_bytes()
    image.write_bytes(make)
    assert loopctl.run("rescan", told["node"], user="root")[0] == 0
    links = links_of(told["node"], told["diskseq"], "rescanned")
    assert found(links) == links
    assert loopctl.run("detach", image, user="root") == (0, "", "")
