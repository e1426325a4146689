# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own mount table, and filesystems whose devices stand on something that can hang."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import LOOPD
from tests.harness.caller import Caller
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_plain, make_sparse
from tests.harness.polkit import Answer
from tests.harness.wire import CallError
from tests.harness.world import USER, World

ATTACH = "org.example.loop1.attach"
UNTRUSTED = "org.example.loop1.attach-untrusted-filesystem"
REFUSED = f"{LOOPD}.Error.UntrustedFilesystem"
SIZE = 16 * MIB

PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from loopd.loop import kernel, mounts

reads = []
whole = mounts._whole
mounts._whole = lambda fd: (reads.append(fd), whole(fd))[1]
table = mounts.Table(Path("/proc/self/mountinfo"))
directory = sys.argv[1]

def kind(path):
    fd = os.open(path, os.O_PATH)
    try:
        return table.filesystem(kernel.statx(fd).stx_mnt_id, -1)
    finally:
        os.close(fd)

def look():
    print(kind(directory), kind(directory), len(reads))

look()
for kind_of in "ramfs", "tmpfs":
    subprocess.run(["mount", "-t", kind_of, "none", directory], check=True)
    look()
subprocess.run(["umount", directory], check=True)
look()
"""


def test_a_table_is_read_again_only_when_it_has_changed(tmp_path: Path) -> None:
    below = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "-T", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    found = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", PROGRAM, tmp_path],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    kinds = (below, "ramfs", "tmpfs", "ramfs")
    assert found == [f"{kind} {kind} {count}" for count, kind in enumerate(kinds, start=1)]


# What a filesystem stands on


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    return {}


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    with shared.test() as testing:
        testing.polkit.on(UNTRUSTED, Answer.DENY)
        yield testing


@pytest.fixture
def caller(world: World) -> Caller:
    return world.caller()


@pytest.fixture
def fuse() -> Iterator[Fuse]:
    with Fuse(SIZE) as running:
        try:
            yield running
        finally:
            running.release()


def known(caller: Caller, loop: loops.BoundLoop) -> None:
    """Wait until loopd has asked a device of somebody else's what is behind it."""
    path = f"/org/example/Loop1/device/loop{loop.number}_{loop.diskseq}"
    if path not in caller.managed_objects():
        caller.wait_signal("InterfacesAdded", lambda it: it.args[0] == path)


@contextmanager
def looped(caller: Caller, file: Path) -> Iterator[str]:
    """A loop device that root made, as udisks2 does for a user."""
    node = loops.losetup(file)
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    try:
        known(caller, loop)
        yield node
    finally:
        loops.detach_leaked(loop)


@contextmanager
def mounted(*arguments: str) -> Iterator[Path]:
    """Mount something for all to see until the end of the block."""
    with area("mounted") as directory:
        directory.chmod(0o755)
        subprocess.run(["mount", *arguments, directory], check=True, timeout=60)
        try:
            yield directory
        finally:
            # Lazily: nothing of a test that fails keeps it.
            subprocess.run(["umount", "--lazy", directory], check=True, timeout=60)


@contextmanager
def ext4_on(node: str) -> Iterator[Path]:
    """A new ext4 on a device, mounted."""
    make = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "nodiscard", node]
    subprocess.run(make, check=True, timeout=60)
    with mounted(node) as directory:
        yield directory


def image_in(directory: Path, name: str = "image", size: int = MIB) -> Path:
    return make_plain(directory / name, size, owner=USER)


def refuses(world: World, caller: Caller, file: Path, filesystem: str, mode: str = "rw") -> None:
    """Fail unless the file is refused, and polkit was told for what."""
    world.polkit.questions.clear()
    with pytest.raises(CallError) as refusal:
        caller.attach(file, mode)
    assert refusal.value.name == REFUSED
    (question,) = world.polkit.questions
    assert (question.action, question.details["filesystem"]) == (UNTRUSTED, filesystem)


def test_a_filesystem_is_trusted_no_more_than_the_file_its_device_is_over(
    world: World, caller: Caller, fuse: Fuse
) -> None:
    """Trust by type: and it is refused without a request to the server."""
    with looped(caller, fuse.file) as node, ext4_on(node) as directory:
        image = image_in(directory)
        subprocess.run(["sync", "--file-system", image], check=True, timeout=60)
        fuse.seen()
        fuse.hang("GETATTR", "FLUSH", "STATFS", "FSYNC")
        refuses(world, caller, image, "fuse")
        world.wait_idle_fds()
        assert fuse.seen() == []
        fuse.release()


def test_a_file_that_no_mount_shows_any_more_is_not_known(world: World, caller: Caller) -> None:
    """Trust by type: its path would be that of a file on a local disk, as it is for one that a user
    has mounted in a namespace of its own.
    """
    with Fuse(SIZE) as fuse, looped(caller, fuse.file) as node, ext4_on(node) as directory:
        image = image_in(directory)
        subprocess.run(["umount", "--lazy", fuse.file.parent], check=True, timeout=60)
        refuses(world, caller, image, "loop")


def test_a_journal_counts_that_is_on_another_device(
    world: World, caller: Caller, fuse: Fuse
) -> None:
    """Trust by type: the image says which device that is, and a close waits for it."""
    disk = make_sparse(world.new_path(), SIZE)
    with looped(caller, fuse.file) as journal, looped(caller, disk) as node:
        make = ["mkfs.ext4", "-q", "-F", "-b", "1024", "-E", "nodiscard"]
        for more in (["-O", "journal_dev", journal], ["-J", f"device={journal}", node]):
            subprocess.run([*make, *more], check=True, timeout=60)
        with mounted(node) as directory:
            refuses(world, caller, image_in(directory), "fuse")


def test_it_is_as_deep_as_one_likes(world: World, caller: Caller, fuse: Fuse) -> None:
    """Trust by type."""
    with looped(caller, fuse.file) as node, ext4_on(node) as directory:
        inner = make_sparse(directory / "inner", 8 * MIB)
        with looped(caller, inner) as upper, ext4_on(upper) as above:
            refuses(world, caller, image_in(above), "fuse")
            with mounted("-t", "overlay", "-o", f"lowerdir={above}:{directory}", "none") as merged:
                refuses(world, caller, merged / "image", "fuse", "r")


def through_losetup(caller: Caller, file: Path) -> Iterator[str]:
    with looped(caller, file) as node:
        yield node


def through_loopd(caller: Caller, file: Path) -> Iterator[str]:
    attached = caller.attach(file)
    yield attached.node
    assert caller.detach(attached.path) is True


@pytest.mark.parametrize("through", [through_losetup, through_loopd])
def test_over_a_local_file_it_is_trusted(
    world: World, caller: Caller, through: Callable[[Caller, Path], Iterator[str]]
) -> None:
    device = contextmanager(through)(caller, make_sparse(world.new_path(), SIZE, owner=USER))
    with device as node, ext4_on(node) as directory:
        world.polkit.questions.clear()
        attached = caller.attach(image_in(directory))
        (question,) = world.polkit.questions
        assert question.details["filesystem"] == "ext4"
        assert caller.detach(attached.path) is True


def test_what_loopd_attached_of_a_file_that_hangs_is_not_trusted(
    world: World, caller: Caller, fuse: Fuse
) -> None:
    """Trust by type."""
    world.polkit.on(UNTRUSTED, Answer.ALLOW)
    attached = caller.attach(fuse.file)
    with ext4_on(attached.node) as directory:
        world.polkit.on(UNTRUSTED, Answer.DENY)
        refuses(world, caller, image_in(directory), "fuse")
    assert caller.detach(attached.path) is True


# Mount namespaces


@contextmanager
def elsewhere(script: str = "true", *arguments: str | Path) -> Iterator[Path]:
    """A mount namespace of its own, in which the script has run; yield the way to it."""
    script += " && echo made && read -r _"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "made\n"
        yield Path(f"/proc/{holder.pid}/root")
        assert holder.stdin
        holder.stdin.close()


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def devices() -> set[int]:
    """The numbers of all filesystems that are mounted here."""
    text = Path("/proc/self/mountinfo").read_text()
    numbers = (line.split()[2].split(":") for line in text.splitlines())
    return {os.makedev(int(major), int(minor)) for major, minor in numbers}


def is_on(world: World, caller: Caller, file: int | Path, filesystem: str) -> None:
    """Fail unless the file is attached without a further right, as one on that filesystem."""
    world.polkit.questions.clear()
    attached = caller.attach(file)
    (question,) = world.polkit.questions
    assert (question.action, question.details["filesystem"]) == (ATTACH, filesystem)
    assert caller.detach(attached.path) is True


@contextmanager
def btrfs(world: World, caller: Caller) -> Iterator[Path]:
    disk = make_sparse(world.new_path(), 128 * MIB)
    with looped(caller, disk) as node:
        subprocess.run(["mkfs.btrfs", "-q", node], check=True, timeout=60)
        with mounted(node) as directory:
            yield directory


@contextmanager
def overlay(world: World, caller: Caller) -> Iterator[Path]:
    """One whose files have device numbers of their own: of layers on two filesystems."""
    with mounted("-t", "tmpfs", "none") as upper, area("lower") as lower:
        for name in ("up", "work"):
            (upper / name).mkdir()
        layers = f"lowerdir={lower},upperdir={upper}/up,workdir={upper}/work,xino=off"
        with mounted("-t", "overlay", "-o", layers, "none") as merged:
            yield merged


@pytest.mark.parametrize("make", [btrfs, overlay])
def test_a_file_is_on_the_same_filesystem_in_every_namespace(
    world: World, caller: Caller, make: Callable[[World, Caller], AbstractContextManager[Path]]
) -> None:
    """Another mount namespace: as of a sandboxed service, or bind-mounted into a container."""
    with make(world, caller) as directory:
        image = image_in(directory)
        assert image.stat().st_dev not in devices()  # else that would do
        is_on(world, caller, image, make.__name__)
        with elsewhere() as root, opened(root / image.relative_to("/")) as fd:
            is_on(world, caller, fd, make.__name__)
        with elsewhere('mount --bind "$1" /mnt', directory) as root:
            with opened(root / "mnt/image") as fd:
                is_on(world, caller, fd, make.__name__)


def test_a_btrfs_is_known_also_where_no_namespace_has_it(world: World, caller: Caller) -> None:
    """Another mount namespace: by its handle, which is what there is before Linux 6.12."""
    with btrfs(world, caller) as directory, elsewhere() as root:
        image = image_in(directory)
        with opened(root / image.relative_to("/")) as fd:
            subprocess.run(
                ["nsenter", "--mount", f"--target={root.parts[2]}", "umount", "-l", directory],
                check=True,
                timeout=60,
            )
            is_on(world, caller, fd, "btrfs")


OVER_FUSE = """
mount -t tmpfs none /mnt && mkdir /mnt/up /mnt/work /mnt/merged &&
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/up,workdir=/mnt/work" none /mnt/merged"""


def test_what_only_a_client_has_mounted_is_not_known(
    world: World, caller: Caller, fuse: Fuse
) -> None:
    """Another mount namespace: an overlay of its own over a server of its own, and that itself;
    neither is asked anything.
    """
    with elsewhere(OVER_FUSE, fuse.file.parent) as root, ExitStack() as files:
        name = fuse.file.name
        fds = [
            files.enter_context(opened(root / "mnt/merged" / name, os.O_RDONLY)),
            files.enter_context(opened(root / fuse.file.relative_to("/"), os.O_RDONLY)),
        ]
        fuse.seen()
        fuse.hang("GETATTR", "READ", "GETLK", "STATFS", "IOCTL", "FALLOCATE", "ACCESS", "LOOKUP")
        for fd, filesystem in zip(fds, ("unknown", "fuse"), strict=True):
            world.polkit.questions.clear()
            with pytest.raises(CallError) as refusal:
                caller.attach(fd)
            assert refusal.value.name == REFUSED
            (question,) = world.polkit.questions
            assert question.details["filesystem"] == filesystem
        world.wait_idle_fds()
        assert set(fuse.seen()) == {"FLUSH"}  # of each close
        fuse.release()
