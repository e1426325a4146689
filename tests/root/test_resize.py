# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resize on the real kernel: growing, cutting, moving, and what is refused and changes nothing."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.caller import MANAGER, MANAGER_PATH, Attached, Caller, Variant, options
from tests.harness.daemon import Daemon
from tests.harness.images import MIB, make_ext4, pattern
from tests.harness.polkit import RULES_ALLOW_ALL, rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World, make_world

INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
DEVICE_BUSY = f"{MANAGER}.Error.DeviceBusy"


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    rules = rules_allowing("org.example.loop1.attach", "org.example.loop1.open-device")
    return {"authority": rules}


def sysfs(attached: Attached) -> tuple[int, int, int]:
    """Return size, offset and limit as the kernel has them, in bytes."""
    directory = Path(f"/sys/block/loop{attached.number}")
    sectors, offset, limit = (
        int((directory / name).read_text()) for name in ("size", "loop/offset", "loop/sizelimit")
    )
    return sectors * 512, offset, limit


def told(caller: Caller, attached: Attached) -> tuple[int, int, int]:
    """Return the same as the properties have them."""
    properties = caller.get_all(attached.path)
    return properties["Size"], properties["Offset"], properties["SizeLimit"]


def content(attached: Attached, offset: int, length: int) -> bytes:
    fd = os.open(attached.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def error_of(caller: Caller, attached: Attached, mapping: dict[str, Any]) -> CallError:
    """Return the error that Resize gives; nothing has changed."""
    before = sysfs(attached)
    with pytest.raises(CallError) as caught:
        caller.resize(attached.path, mapping)
    assert sysfs(attached) == told(caller, attached) == before
    return caught.value


def append(path: Path, size: int) -> None:
    """Let a patterned file grow to `size`."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.write(pattern(end, size - end))


@contextmanager
def exclusively_open(attached: Attached) -> Iterator[None]:
    """Hold the device as mount and mkfs do."""
    fd = os.open(attached.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def mounted(attached: Attached, directory: Path) -> Iterator[None]:
    """Mount the device in a mount namespace that ends with the block."""
    directory.mkdir()
    script = 'mount "$1" "$2" && echo mounted && read -r _'
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, "sh", attached.node, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "mounted\n"
        yield


# What works


def test_a_grown_file_is_taken_up(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image)
    append(image, 3 * MIB)
    assert sysfs(attached)[0] == MIB
    assert owner.resize(attached.path) == 3 * MIB
    assert sysfs(attached) == told(owner, attached) == (3 * MIB, 0, 0)
    assert content(attached, 2 * MIB, 4096) == pattern(2 * MIB, 4096)


@pytest.mark.parametrize("size", [MIB + 512, MIB + 1024 + 511])
def test_growing_leaves_an_odd_tail_out(world: World, owner: Caller, size: int) -> None:
    image = world.image()
    attached = owner.attach(image)
    append(image, size)
    assert owner.resize(attached.path) == size // 512 * 512
    assert sysfs(attached)[0] == size // 512 * 512


def test_all_that_the_size_says_can_be_read(world: World, owner: Caller) -> None:
    """A tail of less than a sector is in the kernel's size, and reading it is an I/O error."""
    image = world.image(MIB + 512 + 100)
    attached = owner.attach(image, sector_size=4096)
    for size in (MIB, 2 * MIB):
        append(image, size + 512 + 100)
        assert owner.resize(attached.path) == size
        assert told(owner, attached) == (size, 0, 0)
        assert sysfs(attached)[0] == size
        assert content(attached, 0, 4 * MIB) == pattern(0, size)


def test_a_tail_is_left_out_by_the_next_loopd_too() -> None:
    with make_world(authority=RULES_ALLOW_ALL) as first, first.test():
        image = first.image(MIB + 512)
        root = first.caller(None)
        attached = root.attach(image, sector_size=4096, lifetime="system")
        first.daemon.kill()
        with Daemon(first.bus, runtime_directory=first.daemon.runtime_directory):
            assert told(root, attached) == (MIB, 0, 0)
            append(image, 2 * MIB + 512)
            assert root.resize(attached.path) == 2 * MIB
            assert told(root, attached) == (2 * MIB, 0, 0)
            assert root.detach(attached.path) is True


@pytest.mark.parametrize(
    ("mapping", "size", "offset", "limit"),
    [
        ({"size-limit": 4096}, 4096, 0, 4096),
        ({"size-limit": 512}, 512, 0, 512),
        ({"size-limit": MIB}, MIB, 0, MIB),
        ({"offset": 512}, MIB - 512, 512, 0),
        ({"offset": MIB - 512}, 512, MIB - 512, 0),
        ({"offset": 8192, "size-limit": 4096}, 4096, 8192, 4096),
        ({"offset": 8192, "size-limit": MIB - 8192}, MIB - 8192, 8192, MIB - 8192),
        ({"offset": 0, "size-limit": 0}, MIB, 0, 0),
        ({"size-limit": 4096, "force": False}, 4096, 0, 4096),
        ({"size-limit": 4096, "force": True}, 4096, 0, 4096),
        ({"force": True}, MIB, 0, 0),
        ({}, MIB, 0, 0),
    ],
)
def test_offset_and_limit_take_effect(
    world: World, owner: Caller, mapping: dict[str, Any], size: int, offset: int, limit: int
) -> None:
    attached = owner.attach(world.image())
    assert owner.resize(attached.path, mapping) == size
    assert sysfs(attached) == told(owner, attached) == (size, offset, limit)
    assert content(attached, 0, 2 * MIB) == pattern(offset, size)


def test_a_piece_can_be_changed_and_given_up_again(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(), offset=4096, size_limit=8192)
    assert owner.resize(attached.path, size_limit=16384) == 16384
    assert told(owner, attached) == (16384, 4096, 16384)
    assert owner.resize(attached.path, offset=8192) == 16384
    assert told(owner, attached) == (16384, 8192, 16384)
    assert owner.resize(attached.path, size_limit=0) == MIB - 8192
    assert owner.resize(attached.path, offset=0) == MIB
    assert sysfs(attached) == told(owner, attached) == (MIB, 0, 0)


@pytest.mark.parametrize("mapping", [{}, {"offset": 4096}, {"offset": 4096, "size-limit": 0}])
def test_numbers_that_are_in_effect_already_still_take_up_a_grown_file(
    world: World, owner: Caller, mapping: dict[str, Any]
) -> None:
    image = world.image()
    attached = owner.attach(image, offset=4096)
    assert owner.resize(attached.path, mapping) == MIB - 4096
    append(image, 2 * MIB)
    assert owner.resize(attached.path, mapping) == 2 * MIB - 4096
    assert sysfs(attached) == told(owner, attached) == (2 * MIB - 4096, 4096, 0)


def test_a_limit_holds_when_the_file_grows(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image, size_limit=8192)
    append(image, 2 * MIB)
    assert owner.resize(attached.path) == 8192
    assert owner.resize(attached.path, size_limit=8192) == 8192
    assert sysfs(attached) == told(owner, attached) == (8192, 0, 8192)


def test_a_shrunk_file_is_taken_up(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image)
    os.truncate(image, 8192)
    assert owner.resize(attached.path) == 8192
    assert sysfs(attached) == told(owner, attached) == (8192, 0, 0)


def test_a_file_that_shrank_below_its_limit_is_taken_up(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image, offset=4096, size_limit=65536)
    os.truncate(image, 4096 + 8192)
    assert owner.resize(attached.path) == 8192
    assert sysfs(attached)[:2] == told(owner, attached)[:2] == (8192, 4096)


def test_a_read_only_device_can_be_resized(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image, "r")
    append(image, 2 * MIB)
    assert owner.resize(attached.path) == 2 * MIB
    assert owner.resize(attached.path, offset=4096, size_limit=8192) == 8192
    assert sysfs(attached) == told(owner, attached) == (8192, 4096, 8192)
    assert owner.get(attached.path, "ReadOnly") is True


def test_a_resize_changes_nothing_else(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image, reference="kept", sector_size=1024, direct_io=False)
    before = owner.get_all(attached.path)
    owner.resize(attached.path, offset=1024, size_limit=4096)
    changed = {"Offset": 1024, "SizeLimit": 4096, "Size": 4096}
    assert owner.get_all(attached.path) == before | changed
    assert before["Autoclear"] is True
    directory = Path(f"/sys/block/loop{attached.number}")
    assert (directory / "loop/autoclear").read_text() == "1\n"
    assert int((directory / "diskseq").read_text()) == attached.diskseq


# By fd


def resize_by_fd(caller: Caller, fd: int | str | Path, **named: Any) -> Any:
    (size,) = caller.manager("Resize", "ha{sv}", 0, options(**named), fds=[fd])
    return size


def test_the_file_names_the_device(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image)
    append(image, 2 * MIB)
    assert resize_by_fd(owner, image) == 2 * MIB
    assert resize_by_fd(owner, image, size_limit=4096) == 4096
    assert sysfs(attached) == told(owner, attached) == (4096, 0, 4096)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_PATH])
def test_the_node_names_the_device(world: World, owner: Caller, flags: int) -> None:
    image = world.image()
    attached = owner.attach(image)
    append(image, 2 * MIB)
    fd = os.open(attached.node, flags | os.O_CLOEXEC)
    try:
        assert resize_by_fd(world.caller(None), fd) == 2 * MIB
        # Whoever passed it to the owner, it is the owner's device.
        assert resize_by_fd(owner, fd, size_limit=8192) == 8192
        with pytest.raises(CallError, match="InteractiveAuthorizationRequired"):
            resize_by_fd(world.caller(OTHER), fd, size_limit=4096)
    finally:
        os.close(fd)
    assert sysfs(attached) == (8192, 0, 8192)


# In use


SMALLER: list[dict[str, Any]] = [{"size-limit": 4096}, {"offset": 512}]
SMALLER += [{"offset": 4096, "size-limit": MIB - 4096}]


@pytest.mark.parametrize("mapping", SMALLER)
def test_a_device_in_use_does_not_shrink_or_move(
    world: World, owner: Caller, mapping: dict[str, Any]
) -> None:
    attached = owner.attach(world.image())
    with exclusively_open(attached):
        error = error_of(owner, attached, mapping)
        assert error.name == DEVICE_BUSY
        assert attached.node in error.message
        assert owner.resize(attached.path, mapping, force=True) < MIB
    assert owner.resize(attached.path, offset=0, size_limit=0) == MIB
    assert owner.resize(attached.path, mapping) < MIB


def test_a_device_in_use_does_not_move_even_if_it_keeps_its_size(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(world.image(), offset=8192, size_limit=8192)
    with exclusively_open(attached):
        for mapping in ({"offset": 0}, {"offset": 4096, "size-limit": 65536}):
            assert error_of(owner, attached, mapping).name == DEVICE_BUSY
        assert owner.resize(attached.path, offset=0, force=True) == 8192


def test_a_device_in_use_does_not_follow_a_shrunk_file(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image)
    os.truncate(image, 8192)
    with exclusively_open(attached):
        assert error_of(owner, attached, {}).name == DEVICE_BUSY
        assert owner.resize(attached.path, force=True) == 8192
        assert sysfs(attached) == told(owner, attached) == (8192, 0, 0)


def test_a_device_in_use_can_grow(world: World, owner: Caller) -> None:
    image = world.image()
    attached = owner.attach(image, size_limit=8192)
    with exclusively_open(attached):
        assert owner.resize(attached.path, size_limit=16384) == 16384
        assert owner.resize(attached.path, size_limit=16384) == 16384
        assert owner.resize(attached.path, size_limit=0) == MIB
        append(image, 2 * MIB)
        assert owner.resize(attached.path) == 2 * MIB


def test_a_mounted_device_grows_and_does_not_shrink(world: World, owner: Caller) -> None:
    image = make_ext4(world.new_path(), owner=USER)
    attached = owner.attach(image)
    with mounted(attached, world.new_path()):
        assert error_of(owner, attached, {"size-limit": MIB}).name == DEVICE_BUSY
        assert error_of(owner, attached, {"offset": 512}).name == DEVICE_BUSY
        os.truncate(image, 8 * MIB)
        assert owner.resize(attached.path) == 8 * MIB
    assert owner.resize(attached.path, size_limit=MIB) == MIB


def test_an_ordinary_opener_is_no_obstacle(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    fd = owner.open_device(attached.path, "rw")
    assert owner.resize(attached.path, size_limit=4096) == 4096
    assert fd.read(8192) == pattern(0, 4096)
    fd.close()


# What is refused


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"size-limit": 1}, "size-limit"),
    ({"size-limit": 4097}, "size-limit"),
    ({"size-limit": MIB + 512}, "size-limit"),
    ({"size-limit": 2**63}, "size-limit"),
    ({"size-limit": 2**64 - 512}, "size-limit"),
    ({"offset": MIB}, "offset"),
    ({"offset": MIB + 512}, "offset"),
    ({"offset": 2**63}, "offset"),
    ({"offset": 2**64 - 512}, "offset"),
    ({"offset": 4096, "size-limit": MIB}, "size-limit"),
    ({"offset": 2**64 - 512, "size-limit": 1024}, "offset"),
    ({"size-limit": Variant("u", 512)}, "size-limit"),
    ({"offset": Variant("i", 512)}, "offset"),
    ({"offset": Variant("s", "512")}, "offset"),
    ({"force": Variant("u", 1)}, "force"),
    ({"size": Variant("t", 512)}, "'size'"),
    ({"lazy": Variant("b", True)}, "'lazy'"),
]


def test_a_wrong_option_is_told_with_its_key_and_changes_nothing(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(world.image())
    for mapping, key in WRONG:
        for given in (mapping, {**mapping, "force": mapping.get("force", True)}):
            error = error_of(owner, attached, given)
            assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, key), given


def test_a_limit_is_a_multiple_of_the_sector_size(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(), sector_size=4096)
    error = error_of(owner, attached, {"size-limit": 512})
    assert (error.name, error.message.partition(":")[0]) == (INVALID_ARGS, "size-limit")
    assert owner.resize(attached.path, size_limit=8192) == 8192


@pytest.mark.parametrize("size", [0, 511, 4096, 4096 + 511])
def test_a_file_of_which_nothing_is_left_is_not_taken_up(
    world: World, owner: Caller, size: int
) -> None:
    image = world.image()
    attached = owner.attach(image, offset=4096)
    os.truncate(image, size)
    for mapping in ({}, {"force": True}, {"size-limit": 512}):
        assert error_of(owner, attached, mapping).name == INVALID_ARGS


def test_a_device_does_not_grow_or_move_into_what_another_one_writes(
    world: World, owner: Caller
) -> None:
    image = world.image(4 * MIB)
    first = owner.attach(image, size_limit=MIB)
    second = owner.attach(image, offset=2 * MIB)
    before = sysfs(first)
    for wrong in ({"size_limit": 3 * MIB}, {"size_limit": 0}, {"offset": 3 * MIB}):
        with pytest.raises(CallError, match=r"Error\.Overlap"):
            owner.resize(first.path, **wrong)
        assert sysfs(first) == before
    assert owner.resize(first.path, size_limit=2 * MIB) == 2 * MIB
    owner.detach(second.path)
    assert owner.resize(first.path, size_limit=0) == 4 * MIB


def test_devices_that_were_let_overlap_can_still_be_resized(world: World, owner: Caller) -> None:
    image = world.image(2 * MIB)
    first = owner.attach(image)
    owner.attach(image, allow_overlap=True)
    assert owner.resize(first.path, size_limit=MIB) == MIB
    assert owner.resize(first.path, size_limit=0) == 2 * MIB


def test_a_device_grows_into_what_another_one_writes_where_that_is_allowed(
    world: World, owner: Caller
) -> None:
    image = world.image(2 * MIB)
    first = owner.attach(image, size_limit=MIB)
    owner.attach(image, offset=MIB)
    with pytest.raises(CallError, match="allow-overlap"):
        owner.resize(first.path, size_limit=0)
    assert owner.resize(first.path, size_limit=0, allow_overlap=True) == 2 * MIB


def test_a_user_who_may_read_an_image_keeps_its_owner_from_nothing(world: World) -> None:
    """Blocking an image's owner."""
    image = world.image(2 * MIB, owner=None, mode=0o644)
    reader, root = world.caller(USER), world.caller(None)
    reader.attach(image, "r")
    attached = root.attach(image, size_limit=MIB)
    assert root.resize(attached.path, size_limit=0) == 2 * MIB
    # The other way round it is no different.
    reader.attach(image, "r", offset=MIB)


def test_another_user_may_not_resize(world: World, owner: Caller) -> None:
    image = world.image(mode=0o666)
    attached = owner.attach(image)
    other = world.caller(OTHER)
    for mapping in ({}, {"size-limit": 4096}, {"size-limit": 4096, "force": True}):
        with pytest.raises(CallError, match="InteractiveAuthorizationRequired"):
            other.resize(attached.path, mapping)
        with pytest.raises(CallError, match=f"NoSuchDevice.*{attached.node}"):
            other.manager("Resize", "ha{sv}", 0, options(mapping), fds=[image])
    assert sysfs(attached) == (MIB, 0, 0)
    assert world.caller(None).resize(attached.path, size_limit=4096) == 4096


def test_another_connection_of_the_owner_may(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    assert world.caller(USER).resize(attached.path, size_limit=4096) == 4096


def test_a_device_that_is_going_is_not_resized(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    fd = owner.open_device(attached.path, "r")
    assert owner.detach(attached.path) is False
    error = error_of(owner, attached, {"size-limit": 4096})
    assert error.name == f"{MANAGER}.Error.NoSuchDevice"
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)
    with pytest.raises(CallError, match=r"UnknownObject|NoSuchDevice"):
        owner.resize(attached.path)


def test_a_file_that_is_not_attached_names_nothing(world: World, owner: Caller) -> None:
    with pytest.raises(CallError, match="NoSuchDevice"):
        resize_by_fd(owner, world.image())
    assert owner.get(MANAGER_PATH, "DeviceCount", MANAGER) == 0
