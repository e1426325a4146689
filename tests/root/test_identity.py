# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which attachment is which, whatever its user does with an fd on it, and whoever comes next."""

import fcntl
import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopd.loop import kernel, uapi
from tests.harness import loops
from tests.harness.caller import Caller, File, RemoteFd
from tests.harness.images import MIB
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

LOOP_CHANGE_FD = 0x4C06


def change_file(device: RemoteFd, image: Path) -> None:
    """Swap the file behind a read-only device, as its user can with an fd on it."""
    device.evaluate(
        "(lambda file: [fcntl.ioctl(fd, request, file), os.close(file)])(os.open(path, 0))",
        request=LOOP_CHANGE_FD,
        path=str(image),
    )


def test_a_binding_keeps_its_name_over_a_change_of_file_and_no_other_has_it(world: World) -> None:
    """LOOP_CHANGE_FD."""
    caller = world.caller()
    attached = caller.attach(world.image(), "r")
    binding = kernel.loop_binding(attached.number)
    assert binding is not None
    device = caller.open_device(attached.path, "r")
    change_file(device, world.image())
    device.close()
    loop = loops.look_at(attached.number)
    assert loop
    assert loop.diskseq > attached.diskseq
    assert kernel.loop_binding(attached.number) == binding
    assert caller.detach(attached.path)
    assert kernel.loop_binding(attached.number) != binding


def test_a_device_whose_file_was_changed_is_still_its_owners_counted_and_detached(
    world: World,
) -> None:
    """LOOP_CHANGE_FD."""
    caller = world.caller()
    attached = caller.attach(world.image(), "r")
    device = caller.open_device(attached.path, "r")
    change_file(device, world.image())
    device.close()
    told = caller.get_all(attached.path)
    assert (told["Owner"], told["Diskseq"]) == (pwd.getpwnam(USER).pw_uid, attached.diskseq)
    assert world.device_count() == 1
    assert caller.detach(attached.path) is True
    assert world.device_count() == 0
    assert not loops.loop_is_bound(attached.number, attached.diskseq + 1)


def test_a_device_that_others_hold_is_counted_until_they_close_it_whatever_they_do(
    world: World,
) -> None:
    """LOOP_CHANGE_FD."""
    caller = world.caller()
    attached = caller.attach(world.image(), "r")
    device = caller.open_device(attached.path, "r")
    assert caller.detach(attached.path) is False
    change_file(device, world.image())
    # loopd has looked: the change comes with an event, and the answer after the look.
    assert caller.manager("GetDeviceByNode", "s", attached.node) == (attached.path,)
    assert caller.get(attached.path, "State") == "detaching"
    assert world.device_count() == 1
    device.close()
    caller.wait_signal("InterfacesRemoved", lambda each: each.args[0] == attached.path)
    assert world.device_count() == 0


def test_a_user_that_turned_autoclear_off_gets_no_more_fds_without_it(world: World) -> None:
    """Killed at any point."""
    caller = world.caller()
    attached = caller.attach(world.image())
    device = caller.open_device(attached.path, "rw")
    info = uapi.loop_info64()
    fd = device.fetch()
    try:
        fcntl.ioctl(fd, uapi.LOOP_GET_STATUS64, info)
        info.lo_flags &= ~uapi.LO_FLAGS_AUTOCLEAR
        kernel.loop_set_status64(fd, info)
    finally:
        os.close(fd)
    assert kernel.loop_attribute(attached.number, "loop/autoclear") == b"0"
    again = caller.open_device(attached.path, "r")
    assert kernel.loop_attribute(attached.number, "loop/autoclear") == b"1"
    for each in (device, again):
        each.close()
    assert caller.detach(attached.path)


def test_a_user_that_turns_autoclear_off_while_its_device_goes_does_not_keep_it(
    world: World,
) -> None:
    """Killed at any point."""
    caller = world.caller()
    attached = caller.attach(world.image())
    device = caller.open_device(attached.path, "rw")
    assert caller.detach(attached.path) is False
    fd = device.fetch()
    try:
        info = kernel.loop_get_status64(fd)
        info.lo_flags &= ~uapi.LO_FLAGS_AUTOCLEAR
        kernel.loop_set_status64(fd, info)
    finally:
        os.close(fd)
    caller.kill()
    loops.wait_unbound(attached.number, attached.diskseq)
    world.wait_devices(0)


def test_a_path_that_sysfs_cannot_show_loses_nobody_a_device(world: World) -> None:
    """CVE-2014-0004."""
    caller = world.caller()
    top = world.new_path()
    top.mkdir(mode=0o777)
    top.chmod(0o777)
    deep, names = top, ["d" * 200] * 18
    for name in names:
        deep /= name
    deep.mkdir(parents=True)
    image = deep / "image"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o666)
    attached = caller.attach(image)
    device = caller.open_device(attached.path, "rw")
    # Only now the path is longer than a page.
    longer = world.files / ("l" * 250)
    longer.mkdir()
    (longer / ("m" * 250)).mkdir()
    top.rename(longer / ("m" * 250) / top.name)
    with pytest.raises(OSError, match="File name too long"):
        kernel.loop_attribute(attached.number, "loop/backing_file")
    fd = device.fetch()
    kernel.loop_set_capacity(fd)
    os.close(fd)
    assert caller.get(attached.path, "State") == "attached"
    assert caller.resize(attached.path, size_limit=1 << 19) == 1 << 19
    assert caller.get(attached.path, "BackingFile") == b"\0"
    assert world.device_count() == 1
    device.close()
    assert caller.detach(attached.path) is True


def named(caller: Caller, image: Path) -> Any:
    """Return the object path of the device that an fd on a file names."""
    (path,) = caller.manager("GetDevice", "h", 0, fds=[File(image, os.O_RDONLY)])
    return path


def by_file(caller: Caller, image: Path) -> Iterator[Callable[[], Any]]:
    """Return each call that looks a device up by a file."""
    yield lambda: named(caller, image)
    yield lambda: caller.manager("Resize", "ha{sv}", 0, {}, fds=[File(image, os.O_RDONLY)])
    yield lambda: caller.manager("Detach", "ha{sv}", 0, {}, fds=[File(image, os.O_RDONLY)])


@pytest.mark.parametrize("asking", [None, OTHER], ids=["root", "another user"])
def test_a_file_names_no_device_of_another_user(world: World, asking: str | None) -> None:
    """Look-ups by file: root is not led to a part of its image that a user has chosen."""
    image = world.image(2 * MIB, owner=None, mode=0o644)
    user, caller = world.caller(USER), world.caller(asking)
    theirs = [user.attach(image, "r", offset=index * MIB) for index in range(2)]
    for call in by_file(caller, image):
        with pytest.raises(CallError, match=r"Error\.NoSuchDevice") as failure:
            call()
        assert all(each.node in failure.value.message for each in theirs)
    own = caller.attach(image, "r")
    for call in by_file(caller, image):
        call()
    assert [user.get(each.path, "State") for each in theirs] == ["attached"] * 2
    with pytest.raises(CallError, match=r"UnknownObject|NoSuchDevice"):
        caller.get(own.path, "State")


def test_a_file_names_the_device_of_the_caller_then_of_root(world: World) -> None:
    """Look-ups by file."""
    image = world.image(mode=0o644, owner=None)
    root, user, other = world.caller(None), world.caller(USER), world.caller(OTHER)
    of_other = other.attach(image, "r")
    of_root = root.attach(image)
    assert named(user, image) == of_root.path
    # It may be a user's, by udisks2.
    node = loops.losetup(image, "--read-only", "--offset=512")
    try:
        user.wait_signal("InterfacesAdded", lambda it: f"/{node[5:]}_" in it.args[0])
        assert named(user, image) == of_root.path
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)
    of_user = user.attach(image, "r")
    callers, devices = (root, user, other), (of_root, of_user, of_other)
    assert [named(caller, image) for caller in callers] == [each.path for each in devices]
    second = user.attach(image, "r")
    with pytest.raises(CallError, match=r"Error\.Ambiguous") as failure:
        named(user, image)
    assert of_user.node in failure.value.message
    assert second.node in failure.value.message
    assert of_root.node not in failure.value.message


def test_a_node_is_nobodys_while_a_user_has_the_device(world: World) -> None:
    """So there is nothing of it that the next user of the number could find."""
    caller = world.caller()
    attached = caller.attach(world.image(), partition_scan=True)
    caller.open_device(attached.path, "rw").close()
    found = os.stat(attached.node)
    assert (found.st_uid, found.st_mode & 0o007) == (0, 0)
    assert found.st_gid != pwd.getpwnam(USER).pw_gid
    assert os.listxattr(attached.node) == []
