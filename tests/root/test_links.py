# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd, its marks and its udev rules together: a user's image takes no place in /dev/disk.

What root attaches has the links there that newer versions of udev make by themselves.

loopd runs on /run/loopd here, since that is where the rules look.
"""

import fcntl
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from loopd.daemon.host import udev_links
from loopd.loop import backing_file, kernel
from tests.harness import loops
from tests.harness.area import CHECKOUT
from tests.harness.caller import RemoteFd
from tests.harness.images import MIB, make_ext4, make_gpt
from tests.harness.polkit import RULES_ALLOW_ALL
from tests.harness.udev import Udev
from tests.harness.world import USER, World, make_world

RUNTIME = Path("/run/loopd")
LABEL = "loopd-links"
LOOP_CHANGE_FD = 0x4C06


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
            (RUNTIME / "lock").unlink()
            for directory in RUNTIME.iterdir():
                directory.rmdir()
            RUNTIME.rmdir()


def mark_of(number: int) -> Path:
    return RUNTIME / "unprivileged" / f"loop{number}"


def link_to(link: Path) -> str:
    """The node that a link of udev's leads to."""
    return f"/dev/{link.resolve().name}"


@contextmanager
def mounted(world: World, udev: Udev, name: str) -> Iterator[str]:
    """A mounted filesystem of the system's, with a UUID; its device node."""
    image = make_ext4(world.new_path(), label=LABEL, uuid=name)
    node = loops.losetup(image)
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
        assert udev.properties(attached.node)["ID_FS_TYPE"] == "ext4"  # udev has looked
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


@pytest.mark.alone
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


@pytest.mark.alone
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


@pytest.mark.alone  # whoever has the number next may keep the mark there
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


@contextmanager
def marked(runtime: Path) -> Iterator[Udev]:
    """An udevd whose rules look for the marks of a loopd of our own, which may end."""
    # Beside those of the other tests, which look elsewhere.
    ours = {
        f"{path.stem}-own.rules": path.read_text().replace("/run/loopd/", f"{runtime}/")
        for path in (CHECKOUT / "systemd").glob("*.rules")
    }
    with Udev(ours) as running:
        yield running


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_mark_that_outlived_its_device_is_not_the_next_ones(area: Path, end: str) -> None:
    """Stale marks."""
    # Which nobody else on this machine is given.
    number = 450_000 + os.getpid() % 50_000
    mark = area / "unprivileged" / f"loop{number}"
    made = make_ext4(area / "image", label=f"next-{end}")
    link = Path(f"/dev/disk/by-label/next-{end}")
    with marked(area) as udev:
        with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world, world.test():
            user = world.caller(USER)
            attached = user.attach(world.image(), number=number)
            fd = user.open_device(attached.path, "r")
            if end == "killed":
                world.daemon.kill()
            else:
                assert world.daemon.terminate() == 0
            fd.close()
            loops.wait_unbound(attached.number, attached.diskseq)
        assert mark.exists()
        # There is no loopd, and the number is root's.
        subprocess.run(["losetup", attached.node, made], check=True)
        try:
            udev.settle()
            assert link_to(link) == attached.node
            assert "LOOPD_UNPRIVILEGED" not in udev.properties(attached.node)
            with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world:
                assert not [*(area / "unprivileged").iterdir()]
                look_again(udev, attached.node)
                assert link_to(link) == attached.node
        finally:
            subprocess.run(["losetup", "-d", attached.node], check=True)
            udev.settle()
            remove(number)


def remove(number: int) -> None:
    """Remove a loop device that nobody uses."""
    with suppress(OSError):
        control_fd = kernel.open_loop_control()
        try:
            kernel.loop_ctl_remove(control_fd, number)
        finally:
            os.close(control_fd)


def test_an_owner_cannot_shed_the_mark(world: World, udev: Udev) -> None:
    """Stale marks: LOOP_CHANGE_FD raises the diskseq as often as the owner likes."""
    user = world.caller(USER)
    attached = user.attach(make_ext4(world.new_path(), label="first", owner=USER), read_only=True)
    other = make_ext4(world.new_path(), label="shed", owner=USER)
    fd = user.open_device(attached.path, "r").fetch()
    try:
        with other.open("rb") as file:
            fcntl.ioctl(fd, LOOP_CHANGE_FD, file.fileno())
        loop = loops.look_at(attached.number)
        assert loop
        assert loop.diskseq > attached.diskseq
        look_again(udev, attached.node)
        assert udev.links(attached.node) == {f"/dev/disk/by-diskseq/{loop.diskseq}"}
        assert udev.properties(attached.node)["LOOPD_UNPRIVILEGED"] == str(loop.diskseq)
        assert not os.path.lexists("/dev/disk/by-label/shed")
    finally:
        os.close(fd)
    user.detach(attached.path)


# by-loop-inode and by-loop-ref


def by_inode(path: Path) -> str:
    """The link that goes by a backing file."""
    found = path.stat()
    major, minor = os.major(found.st_dev), os.minor(found.st_dev)
    return f"/dev/disk/by-loop-inode/{major}:{minor}-{found.st_ino}"


def by_reference(name: str) -> str:
    return f"/dev/disk/by-loop-ref/{name}"


def identify(path: Path) -> backing_file.FileIdentity:
    found = path.stat()
    return backing_file.FileIdentity(device=found.st_dev, inode=found.st_ino)


def lasting(links: set[str]) -> set[str]:
    """Those that go by the file or its name."""
    return {link for link in links if "/by-loop-" in link}


def look_again(udev: Udev, node: str) -> None:
    """Have udev look at a device."""
    subprocess.run(["udevadm", "trigger", "--action=change", node], check=True)
    udev.settle()


def test_roots_device_is_found_by_its_file_and_its_reference(world: World, udev: Udev) -> None:
    image = make_gpt(world.new_path())
    root = world.caller(None)
    attached = root.attach(image, reference="my disk/1", partition_scan=True)
    udev.settle()
    links = {by_inode(image), by_reference(r"my\x20disk\x2f1")}
    nodes = {"": attached.node, "-part1": f"{attached.node}p1", "-part2": f"{attached.node}p2"}
    for suffix, node in nodes.items():
        assert lasting(udev.links(node)) == {link + suffix for link in links}
        assert {link_to(Path(link + suffix)) for link in links} == {node}
    properties = udev.properties(attached.node)
    assert properties["ID_LOOP_BACKING_FILENAME"] == "my disk/1"
    assert properties["ID_LOOP_BACKING_INODE"] == str(image.stat().st_ino)

    root.device(attached.path, "SetReference", "sa{sv}", "other", {})
    look_again(udev, attached.node)
    assert lasting(udev.links(attached.node)) == {by_inode(image), by_reference("other")}

    root.detach(attached.path)
    udev.settle()
    assert not any(os.path.lexists(link + suffix) for link in links for suffix in nodes)
    assert not any((RUNTIME / "links").iterdir())


def test_without_a_reference_the_file_is_enough(world: World, udev: Udev) -> None:
    image = world.image()
    root = world.caller(None)
    attached = root.attach(image)
    udev.settle()
    assert lasting(udev.links(attached.node)) == {by_inode(image)}
    root.detach(attached.path)


def test_a_users_device_is_not_found_by_these(world: World, udev: Udev) -> None:
    """Links of udev."""
    user = world.caller(USER)
    image = make_gpt(world.new_path(), owner=USER)
    attached = user.attach(image, reference="name", partition_scan=True)
    udev.settle()
    assert not any((RUNTIME / "links").iterdir())
    for node in (attached.node, f"{attached.node}p1"):
        assert lasting(udev.links(node)) == set()
    user.detach(attached.path)


def test_what_was_written_down_is_of_one_attachment(world: World, udev: Udev) -> None:
    """A loopd that is killed leaves it, and the number may be another's by then."""
    with mounted(world, udev, str(uuid.uuid4())) as node:
        loop = loops.look_at(int(node.removeprefix("/dev/loop")))
        assert loop
        for diskseq, found in ((loop.diskseq - 1, False), (loop.diskseq, True)):
            written = RUNTIME / "links" / f"loop{loop.number}_{diskseq}"
            written.write_text(udev_links.describe(identify(world.image()), b"former"))
            try:
                look_again(udev, node)
                assert (by_reference("former") in udev.links(node)) is found
            finally:
                written.unlink()


def test_a_newer_udev_is_not_interfered_with(world: World) -> None:
    """It has found the file out by itself, before our rules are asked."""
    knows = 'KERNEL=="loop*", ENV{ID_LOOP_BACKING_INODE}="1", ENV{ID_LOOP_BACKING_DEVICE}="2:3"\n'
    with Udev({"60-zz-loopd-test.rules": knows}) as newer:
        root = world.caller(None)
        attached = root.attach(make_gpt(world.new_path()), reference="name", partition_scan=True)
        newer.settle()
        for node in (attached.node, f"{attached.node}p1"):
            properties = newer.properties(node)
            assert properties["ID_LOOP_BACKING_INODE"] == "1"
            assert "LOOPD_LINKS" not in properties
            assert "ID_LOOP_BACKING_FILENAME" not in properties
            assert lasting(newer.links(node)) == set()
        root.detach(attached.path)
        newer.settle()


@pytest.mark.alone  # anybody may be given the device in between
def test_what_a_killed_loopd_wrote_down_is_gone_after_its_next_start(area: Path) -> None:
    """Killed at any point."""
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area) as world, world.test():
        attached = world.caller(None).attach(world.image())
        (written,) = (area / "links").iterdir()
        assert written.name == f"loop{attached.number}_{attached.diskseq}"
        world.daemon.kill()
        loops.wait_unbound(attached.number, attached.diskseq)
        assert written.exists()
    with make_world(authority=RULES_ALLOW_ALL, runtime_directory=area):
        assert not written.exists()
