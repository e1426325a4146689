# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open and Sync on the real kernel: what the passed fd can do, who gets one, and what it keeps."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import small_tmpfs
from tests.harness.caller import Attached, Caller, RemoteFd, Variant
from tests.harness.images import MIB, ext4_label, make_ext4, make_gpt, make_sparse, pattern
from tests.harness.polkit import rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
SIZE = 64 * 1024
WRITER = "mail"
"""Somebody who may open writable devices only."""
OPEN = "org.example.loop1.open-device"
OPEN_READ_ONLY = "org.example.loop1.open-read-only-device"


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    # Who is not USER may attach, and opens nothing, not even what is its own.
    rules = rules_allowing("org.example.loop1.attach")
    rules += rules_allowing(OPEN, OPEN_READ_ONLY, users=(USER,))
    rules += rules_allowing(OPEN, users=(WRITER,))
    return {"authority": rules}


def is_bound(attached: Attached) -> bool:
    return loops.loop_is_bound(attached.number, attached.diskseq)


# What the fd can do


def test_a_user_without_rights_on_the_node_reads_the_label(world: World, owner: Caller) -> None:
    attached = owner.attach(make_ext4(world.new_path(), label="for-nobody", owner=USER, mode=0o600))
    with pytest.raises(PermissionError):
        owner.open(attached.node, os.O_RDONLY)
    fd = owner.open_device(attached.path, "r")
    assert ext4_label(fd.read(2048)) == "for-nobody"
    assert fd.evaluate("os.fstat(fd).st_rdev") == os.stat(attached.node).st_rdev
    fd.close()


def test_what_is_written_is_in_the_file_after_sync(world: World, owner: Caller) -> None:
    image = world.image(SIZE)
    attached = owner.attach(image, direct_io=False)
    fd = owner.open_device(attached.path, "rw")
    assert fd.write(b"written by nobody" + bytes(495), 4096) == 512
    assert fd.read(17, 4096) == b"written by nobody"
    assert owner.device(attached.path, "Sync", "a{sv}", {}) == ()
    data = image.read_bytes()
    assert data[4096:4608] == b"written by nobody" + bytes(495)
    assert data[:4096] + data[4608:] == pattern(0, 4096) + pattern(4608, SIZE - 4608)
    fd.close()


def test_what_is_written_at_an_offset_stays_within_its_piece(world: World, owner: Caller) -> None:
    image = world.image(SIZE)
    attached = owner.attach(image, offset=4096, size_limit=4096)
    fd = owner.open_device(attached.path, "rw")
    assert fd.write(b"x" * 8192, 0) == 4096
    owner.device(attached.path, "Sync", "a{sv}", {})
    assert image.read_bytes() == pattern(0, 4096) + b"x" * 4096 + pattern(8192, SIZE - 8192)
    fd.close()


@pytest.mark.parametrize(("mode", "access"), [("r", os.O_RDONLY), ("rw", os.O_RDWR)])
def test_the_fd_has_the_access_asked_for_and_no_more(
    world: World, owner: Caller, mode: str, access: int
) -> None:
    attached = owner.attach(world.image(SIZE))
    fd = owner.open_device(attached.path, mode)
    assert fd.flags() & os.O_ACCMODE == access
    assert fd.read(512) == pattern(0, 512)
    if mode == "r":
        with pytest.raises(OSError, match="Bad file descriptor"):
            fd.write(b"x" * 512)
        # It leads to no more either.
        with pytest.raises(PermissionError):
            fd.evaluate("os.open(f'/proc/self/fd/{fd}', os.O_RDWR)")
    else:
        assert fd.write(b"x" * 512) == 512
    fd.close()


def test_a_second_fd_is_another_opening(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    first, second = (owner.open_device(attached.path, "r") for _ in range(2))
    first.evaluate("os.lseek(fd, 4096, os.SEEK_SET)")
    assert second.evaluate("os.lseek(fd, 0, os.SEEK_CUR)") == 0
    first.close()
    assert second.read(512) == pattern(0, 512)
    second.close()


def test_nothing_is_beyond_the_end(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE + 511))
    fd = owner.open_device(attached.path, "rw")
    assert fd.evaluate("os.lseek(fd, 0, os.SEEK_END)") == SIZE
    assert fd.read(512, SIZE) == b""
    assert fd.read(4096, SIZE - 512) == pattern(SIZE - 512, 512)
    assert fd.write(b"x" * 4096, SIZE - 512) == 512
    with pytest.raises(OSError, match="No space left on device"):
        fd.write(b"x" * 512, SIZE)
    fd.close()


@pytest.mark.parametrize(
    ("file_mode", "mapping"), [("r", {}), ("r", {"read-only": True}), ("rw", {"read-only": True})]
)
def test_a_read_only_device_gives_no_fd_for_writing(
    world: World, owner: Caller, file_mode: str, mapping: dict[str, Any]
) -> None:
    attached = owner.attach(world.image(SIZE), file_mode, mapping)
    for caller in (owner, world.caller(None)):
        with pytest.raises(CallError) as caught:
            caller.open_device(attached.path, "rw")
        assert (caught.value.name, caught.value.message.partition(":")[0]) == (INVALID_ARGS, "mode")
    fd = owner.open_device(attached.path, "r")
    assert fd.read(512) == pattern(0, 512)
    fd.close()


# Wrong arguments


def test_a_wrong_mode_is_an_invalid_one(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    for mode in ("", "w", "R", "RW", "wr", "r ", "rw\n", "rb", "read"):
        with pytest.raises(CallError) as caught:
            owner.open_device(attached.path, mode)
        assert (caught.value.name, caught.value.message.partition(":")[0]) == (INVALID_ARGS, "mode")


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"partition": Variant("t", 1)}, INVALID_ARGS, "partition"),
    ({"partition": Variant("s", "1")}, INVALID_ARGS, "partition"),
    ({"lazy": True}, INVALID_ARGS, "'lazy'"),
    ({"read-only": True}, INVALID_ARGS, "'read-only'"),
]


def test_a_wrong_option_is_told_with_its_key(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    for mapping, name, key in WRONG:
        with pytest.raises(CallError) as caught:
            owner.open_device(attached.path, "r", mapping)
        assert (caught.value.name, caught.value.message.partition(":")[0]) == (name, key)


def test_sync_has_no_options_yet(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    with pytest.raises(CallError) as caught:
        owner.device(attached.path, "Sync", "a{sv}", {"force": Variant("b", True)})
    assert (caught.value.name, caught.value.message.partition(":")[0]) == (INVALID_ARGS, "'force'")


# Who gets one


def test_another_user_gets_none(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    other = world.caller(OTHER)
    for mode in ("r", "rw"):
        with pytest.raises(CallError, match=r"InteractiveAuthorizationRequired.*open-others-"):
            other.open_device(attached.path, mode)
    with pytest.raises(CallError, match=r"InteractiveAuthorizationRequired.*manage-others"):
        other.device(attached.path, "Sync", "a{sv}", {})
    assert owner.detach(attached.path) is True  # so nobody has it open


def test_who_may_attach_may_not_open_for_that(world: World) -> None:
    other = world.caller(OTHER)
    attached = other.attach(world.image(SIZE, owner=OTHER))
    with pytest.raises(CallError, match=r"InteractiveAuthorizationRequired.*open-device"):
        other.open_device(attached.path, "r")
    other.device(attached.path, "Sync", "a{sv}", {})
    assert other.detach(attached.path) is True


def test_another_connection_of_the_owner_and_root_get_one(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    for caller in (world.caller(USER), world.caller(None)):
        fd = caller.open_device(attached.path, "rw")
        assert fd.read(512) == pattern(0, 512)
        fd.close()


# LOOP_CHANGE_FD

SWAP_AND_READ = """
import fcntl, os, sys
device, log = map(int, sys.argv[1:])
fcntl.ioctl(device, 0x4C06, log)  # LOOP_CHANGE_FD
print(os.pread(device, 64, 0).split(b"\\0")[0].decode())
"""


@contextmanager
def log_of_roots(world: World) -> Iterator[int]:
    """A file of root's that a user got as its output: open for appending, and for it alone."""
    path = world.new_path()
    path.write_bytes(b"root's secret".ljust(SIZE, b"\0"))
    path.chmod(0o600)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def fetched(remote: RemoteFd) -> Iterator[int]:
    """Have a caller's fd, and close it in both places."""
    fd = remote.fetch()
    remote.close()
    try:
        yield fd
    finally:
        os.close(fd)


def swap_and_read(device: int, log: int) -> str:
    """Put the log behind the device as an ordinary user, and read it there."""
    return subprocess.run(
        [sys.executable, "-I", "-c", SWAP_AND_READ, str(device), str(log)],
        user=USER,
        pass_fds=[device, log],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("partition", [{}, {"partition": 1}], ids=["disk", "partition"])
def test_a_read_only_device_is_opened_by_an_action_of_its_own(
    world: World, partition: dict[str, int]
) -> None:
    """LOOP_CHANGE_FD: else an inherited output of root's could be read through the device."""
    writer = world.caller(WRITER)
    image = make_gpt(world.new_path(), [(2048, 2048)], size=4 * MIB, owner=WRITER)
    attached = writer.attach(image, "r", partition_scan=True)
    for interactive in (False, True):
        with pytest.raises(CallError, match=r"(Required|AccessDenied).*open-read-only-device"):
            writer.device(
                *(attached.path, "Open", "sa{sv}", "r"),
                {name: Variant("u", value) for name, value in partition.items()},
                interactive=interactive,
            )
    assert writer.detach(attached.path) is True
    attached = writer.attach(image, "rw", partition_scan=True)
    writer.open_device(attached.path, "r", partition).close()
    assert writer.detach(attached.path) is True


def test_what_that_action_is_for(world: World, owner: Caller) -> None:
    """LOOP_CHANGE_FD: who is allowed it reads what it may only write to; if this fails, the kernel
    has learned to look at the file's mode, and the action is not needed any more.
    """
    attached = owner.attach(world.image(SIZE), "r")
    with fetched(owner.open_device(attached.path, "r")) as fd, log_of_roots(world) as log:
        assert swap_and_read(fd, log) == "root's secret"


def test_a_writable_device_takes_no_other_file(world: World, owner: Caller) -> None:
    """LOOP_CHANGE_FD."""
    attached = owner.attach(world.image(SIZE))
    for mode in ("r", "rw"):
        with (
            fetched(owner.open_device(attached.path, mode)) as fd,
            log_of_roots(world) as log,
            pytest.raises(subprocess.CalledProcessError) as caught,
        ):
            swap_and_read(fd, log)
        assert "Invalid argument" in caught.value.stderr


def test_the_kernel_says_which_devices_are_read_only(world: World) -> None:
    """LOOP_CHANGE_FD: root may have changed it since, of which nobody tells loopd."""
    writer = world.caller(WRITER)
    attached = writer.attach(world.image(SIZE, owner=WRITER))
    with loops.set_read_only(attached.node):
        with pytest.raises(CallError, match=r"Required.*open-read-only-device"):
            writer.open_device(attached.path, "r")
    writer.open_device(attached.path, "r").close()
    # The other way round it is what the driver goes by, and not what root says.
    reader = writer.attach(world.image(SIZE, owner=WRITER), "r")
    subprocess.run(["blockdev", "--setrw", reader.node], check=True)
    with pytest.raises(CallError, match=r"Required.*open-read-only-device"):
        writer.open_device(reader.path, "r")


# What it keeps


def test_the_device_stays_until_the_fd_of_a_dead_client_is_closed(
    world: World, owner: Caller
) -> None:
    watcher = world.caller(OTHER)
    attached = owner.attach(world.image(SIZE))
    remote = owner.open_device(attached.path, "r")
    fd = remote.fetch()
    try:
        owner.kill()
        watcher.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == attached.path and it.args[1].get("State") == "detaching",
        )
        assert is_bound(attached)
        assert os.pread(fd, 512, 0) == pattern(0, 512)
    finally:
        os.close(fd)
    loops.wait_unbound(attached.number, attached.diskseq)
    watcher.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)


def test_the_device_stays_until_the_process_that_inherited_its_fd_is_gone(
    world: World, owner: Caller
) -> None:
    watcher = world.caller(OTHER)
    attached = owner.attach(world.image(SIZE))
    fd = owner.open_device(attached.path, "r").fetch()
    try:
        heir = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[fd])
    finally:
        os.close(fd)
    with heir:
        owner.kill()
        watcher.wait_signal(
            "PropertiesChanged",
            lambda it: it.path == attached.path and it.args[1].get("State") == "detaching",
        )
        assert is_bound(attached)
        heir.kill()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_the_device_goes_at_once_with_a_client_that_alone_has_it_open(
    world: World, owner: Caller
) -> None:
    attached = owner.attach(world.image(SIZE))
    owner.open_device(attached.path, "rw")
    owner.kill()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_device_that_is_going_is_not_opened_again(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(SIZE))
    fd = owner.open_device(attached.path, "r")
    assert owner.detach(attached.path) is False
    for caller in (owner, world.caller(None)):
        with pytest.raises(CallError, match="NoSuchDevice"):
            caller.open_device(attached.path, "r")
    with pytest.raises(CallError, match="NoSuchDevice"):
        owner.device(attached.path, "Sync", "a{sv}", {})
    assert fd.read(512) == pattern(0, 512)
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_many_fds_of_one_device_leave_none_in_loopd(world: World, owner: Caller) -> None:
    """Transport rule 5 (reply fds)."""
    attached = owner.attach(world.image(SIZE))
    with world.daemon.same_fds():
        fds = [owner.open_device(attached.path, mode) for mode in ("r", "rw") * 20]
    for fd in fds:
        fd.close()
    assert owner.detach(attached.path) is True


# Failing disks


def test_sync_tells_that_the_disk_is_full(world: World, owner: Caller) -> None:
    with small_tmpfs(world.new_path(), MIB) as directory:
        file = os.open(make_sparse(directory / "image", 8 * MIB), os.O_RDWR | os.O_CLOEXEC)
        try:
            attached = owner.attach(file, direct_io=False)
        finally:
            os.close(file)
        fd = owner.open_device(attached.path, "rw")
        for offset in range(0, 4 * MIB, MIB):
            fd.evaluate("os.pwrite(fd, b'x' * length, offset)", length=MIB, offset=offset)
        with pytest.raises(CallError) as caught:
            owner.device(attached.path, "Sync", "a{sv}", {})
        assert caught.value.name in ("System.Error.EIO", "System.Error.ENOSPC")
        assert "Sync" in caught.value.message
        # An error is told once; the device goes on, and goes as any other.
        assert owner.device(attached.path, "Sync", "a{sv}", {}) == ()
        fd.close()
        assert owner.detach(attached.path) is True
