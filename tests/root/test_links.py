# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd, its marks and its udev rules together: a user's image takes no place in /dev/disk.

loopd runs on /run/loopd here, since that is where the rules look.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from loopd import kernel
from tests.harness import loops
from tests.harness.area import CHECKOUT
from tests.harness.caller import RemoteFd
from tests.harness.images import MIB, make_ext4
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.udev import Udev
from tests.harness.world import USER, World, make_world

RUNTIME = Path("/run/loopd")
LABEL = "loopd-links"


@pytest.fixture(scope="module")
def udev() -> Iterator[Udev]:
    with Udev(sources=tuple((CHECKOUT / "systemd").glob("*.rules"))) as running:
        yield running


@pytest.fixture(scope="module")
def shared(udev: Udev) -> Iterator[World]:
    made_here = not RUNTIME.exists()
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=RUNTIME) as made:
        yield made
    if made_here:
        # The same as a stop of the unit would leave behind, and nothing in it.
        with suppress(FileNotFoundError):
            (RUNTIME / "unprivileged").rmdir()
            RUNTIME.rmdir()


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


def mark_of(number: int) -> Path:
    return RUNTIME / "unprivileged" / f"loop{number}"


def link_to(link: Path) -> str:
    """The node that a link of udev's leads to."""
    return f"/dev/{link.resolve().name}"


@contextmanager
def mounted(world: World, udev: Udev, name: str) -> Iterator[str]:
    """A mounted filesystem of the system's, with a UUID; its device node."""
    image = make_ext4(world.new_path(), label=LABEL, uuid=name)
    done = subprocess.run(
        ["losetup", "-f", "--show", image], check=True, capture_output=True, text=True
    )
    node = done.stdout.strip()
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    directory = world.new_path()
    directory.mkdir()
    # In a mount namespace of its own, which ends with the shell.
    script = 'mount "$1" "$2" && echo mounted && read -r _'
    holder = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", node, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with holder:
            assert holder.stdout
            assert holder.stdout.readline() == "mounted\n"
            udev.settle()
            yield node
    finally:
        loops.detach_leaked(loop)
        loops.wait_unbound(loop.number, loop.diskseq)


def rename(device: RemoteFd, name: bytes) -> None:
    """Set lo_file_name, as whoever has a device open can."""
    fd = device.fetch()
    try:
        info = kernel.loop_get_status64(fd)
        info.lo_file_name = name
        kernel.loop_set_status64(fd, info)
    finally:
        os.close(fd)


def test_an_image_with_the_uuid_of_a_mounted_filesystem_takes_no_link(
    world: World, udev: Udev
) -> None:
    """Links of udev."""
    name = str(uuid.uuid4())
    by_uuid, by_label = Path(f"/dev/disk/by-uuid/{name}"), Path(f"/dev/disk/by-label/{LABEL}")
    with mounted(world, udev, name) as node:
        assert (link_to(by_uuid), link_to(by_label)) == (node, node)
        copy = make_ext4(world.new_path(), label=LABEL, uuid=name, owner=USER)

        user = world.caller(USER)
        attached = user.attach(copy)
        udev.settle()
        assert udev.properties(attached.node)["ID_FS_UUID"] == name  # udev has looked
        assert (link_to(by_uuid), link_to(by_label)) == (node, node)
        assert udev.links(attached.node) <= {f"/dev/disk/by-diskseq/{attached.diskseq}"}

        # Not after another look either, when the client has written to its device, and has given
        # it another name than loopd lets it have.
        fd = user.open_device(attached.path, "rw")
        fd.write(fd.read(4096))
        rename(fd, f"disk/by-uuid/{name}".encode())
        fd.close()
        udev.settle()
        assert (link_to(by_uuid), link_to(by_label)) == (node, node)
        user.detach(attached.path)
        udev.settle()
        assert link_to(by_uuid) == node

        # What root attaches does take them: the test can see the difference.
        root = world.caller(None)
        attached = root.attach(copy)
        udev.settle()
        assert (link_to(by_uuid), link_to(by_label)) == (attached.node, attached.node)
        root.detach(attached.path)
        udev.settle()


def test_the_mark_is_there_for_as_long_as_the_device_is(world: World, udev: Udev) -> None:
    """Links of udev."""
    user = world.caller(USER)
    attached = user.attach(world.image())
    assert mark_of(attached.number).exists()
    fd = user.open_device(attached.path, "r")
    assert user.detach(attached.path) is False
    assert mark_of(attached.number).exists()
    fd.close()
    user.wait_signal("InterfacesRemoved", lambda each: each.args[0] == attached.path)
    assert not mark_of(attached.number).exists()


def test_roots_device_has_no_mark(world: World, udev: Udev) -> None:
    root = world.caller(None)
    attached = root.attach(world.image())
    assert not mark_of(attached.number).exists()
    root.detach(attached.path)


def test_marks_that_a_killed_loopd_left_are_gone_after_its_next_start(area: Path) -> None:
    # Not in /run/loopd: the loopd of the other tests would not leave them there so long.
    """Killed at any point."""
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world, world.test():
        attached = world.caller(USER).attach(world.image())
        mark = area / "unprivileged" / f"loop{attached.number}"
        world.daemon.kill()
        loops.wait_unbound(attached.number, attached.diskseq)
        assert mark.exists()
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area):
        assert not mark.exists()


def test_partitions_that_a_killed_loopd_left_are_gone_after_its_next_start(area: Path) -> None:
    """Such as root makes them on a device that is not scanned: the kernel keeps them for ever."""
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world, world.test():
        attached = world.caller(None).attach(world.image(4 * MIB))
        fd = os.open(attached.node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            kernel.blkpg_add_partition(fd, 1, MIB, MIB)
        finally:
            os.close(fd)
        world.daemon.kill()
        loops.wait_unbound(attached.number, attached.diskseq)
    assert loops.partitions(attached.number) == (f"loop{attached.number}p1",)
    with loops.Uevents() as events, make_world(authority=RULES_ALLOW_ALL, runtime_directory=area):
        events.wait_until(
            lambda: loops.partitions(attached.number) == (), "the left-over partition to go"
        )


def test_a_mark_that_a_killed_loopd_left_on_a_used_device_goes_with_the_device(area: Path) -> None:
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world, world.test():
        caller = world.caller(USER)
        attached = caller.attach(world.image())
        mark = area / "unprivileged" / f"loop{attached.number}"
        fd = caller.open_device(attached.path, "r").fetch()
        try:
            world.daemon.kill()
            with (
                make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as following,
                following.test(),
            ):
                watcher = following.caller(None)
                assert mark.exists()
                caller.kill()
                os.close(fd)
                fd = -1
                watcher.wait_signal("InterfacesRemoved", lambda each: each.args[0] == attached.path)
                assert not mark.exists()
        finally:
            if fd >= 0:
                os.close(fd)
