# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach's options and files: what each does to the device, and what is refused before it is there.

Whatever is refused leaves nothing bound, and nobody is asked about it.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops
from tests.harness.caller import DEVICE, Attached, Caller, FileArgument, Variant
from tests.harness.images import make_plain, make_sparse, memfd, pattern
from tests.harness.polkit import Answer
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

# What options do is above the reading and writing of messages; wrong ones are read by both.
pytestmark = pytest.mark.one_library

SIZE = 64 * 1024
BLKSSZGET = 0x1268
LOOP_GET_STATUS64 = 0x4C05
F_ADD_SEALS = 1033
SEALS = {"F_SEAL_WRITE": 0x8, "F_SEAL_FUTURE_WRITE": 0x10}

INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
NOT_SUPPORTED = "org.example.Loop1.Error.NotSupported"
UNSUPPORTED_FILE = "org.example.Loop1.Error.UnsupportedFile"
OVERLAP = "org.example.Loop1.Error.Overlap"

# One option of each type: tests/unit tries all options.
KINDS = {"read-only": "b", "offset": "t", "sector-size": "u", "reference": "s"}
SAMPLES = {
    "b": True,
    "s": "none",
    "t": 512,
    "u": 512,
    "i": 512,
    "x": 512,
    "y": 1,
    "d": 512.0,
    "o": "/",
    "ay": b"none\0",
    "as": ["none"],
    "v": Variant("t", 512),
    "a{sv}": {},
    "(t)": (512,),
}


@pytest.fixture(scope="module")
def _lasting_caller(_shared_world: World) -> Iterator[Caller]:
    with Caller(_shared_world.bus, USER) as caller:
        yield caller


@pytest.fixture
def caller(world: World, _lasting_caller: Caller) -> Iterator[Caller]:
    """An ordinary user, who has no device any more when the test is over."""
    yield _lasting_caller
    for path, interfaces in _lasting_caller.managed_objects().items():
        if interfaces[DEVICE]["Holder"] == _lasting_caller.unique_name:
            _lasting_caller.detach(path)


def refused(
    world: World,
    caller: Caller,
    file: FileArgument,
    mapping: dict[str, Any] | None = None,
    *,
    mode: str = "rw",
) -> tuple[str, str]:
    """Return the name and the text of the error; nobody was asked, and nothing is new."""
    before = bound_files(world), len(world.polkit.questions)
    with pytest.raises(CallError) as caught:
        caller.attach(file, mode, mapping)
    assert (bound_files(world), len(world.polkit.questions)) == before
    return caught.value.name, caught.value.message


def bound_files(world: World) -> list[str]:
    """What is bound of the world's files."""
    found = [loop.backing_file for loop in loops.bound_loops().values()]
    return sorted(each for each in found if each.startswith(f"{world.files}/"))


def sysfs(attached: Attached, attribute: str) -> str:
    return Path(f"/sys/block/loop{attached.number}/{attribute}").read_text().strip()


def ask_node(attached: Attached, question: Callable[[int], Any]) -> Any:
    """Open the node as root, and close it again."""
    fd = os.open(attached.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return question(fd)
    finally:
        os.close(fd)


def content(attached: Attached, offset: int, length: int) -> bytes:
    found: bytes = ask_node(attached, lambda fd: os.pread(fd, length, offset))
    return found


# What each option does


def test_without_options_the_device_is_the_whole_file(world: World, caller: Caller) -> None:
    attached = caller.attach(world.image(SIZE))
    assert sysfs(attached, "size") == str(SIZE // 512)
    assert sysfs(attached, "loop/offset") == "0"
    assert sysfs(attached, "loop/sizelimit") == "0"
    assert sysfs(attached, "loop/autoclear") == "1"
    assert sysfs(attached, "loop/partscan") == "0"
    assert sysfs(attached, "queue/logical_block_size") == "512"
    assert sysfs(attached, "ro") == "0"
    assert content(attached, 0, 4096) == pattern(0, 4096)


@pytest.mark.parametrize(
    ("mode", "mapping", "read_only"),
    [
        ("rw", {}, False),
        ("rw", {"read-only": False}, False),
        ("rw", {"read-only": True}, True),
        ("r", {}, True),
        ("r", {"read-only": True}, True),
    ],
)
def test_read_only_is_as_the_file_is_open_unless_given(
    world: World, caller: Caller, mode: str, mapping: dict[str, Any], read_only: bool
) -> None:
    attached = caller.attach(world.image(SIZE), mode, mapping)
    assert sysfs(attached, "ro") == str(int(read_only))
    assert caller.get(attached.path, "ReadOnly") is read_only


def test_a_readable_file_is_never_made_writable(world: World, caller: Caller) -> None:
    """Rights of an fd."""
    name, text = refused(world, caller, world.image(SIZE), {"read-only": False}, mode="r")
    assert (name, text.partition(":")[0]) == (INVALID_ARGS, "read-only")


def test_offset_and_size_limit_cut_a_piece_out(world: World, caller: Caller) -> None:
    attached = caller.attach(world.image(SIZE), offset=4096, size_limit=8192)
    assert sysfs(attached, "loop/offset") == "4096"
    assert sysfs(attached, "loop/sizelimit") == "8192"
    assert sysfs(attached, "size") == "16"
    assert content(attached, 0, 16384) == pattern(4096, 8192)


def test_an_offset_alone_reaches_to_the_end(world: World, caller: Caller) -> None:
    attached = caller.attach(world.image(SIZE), offset=SIZE - 512, size_limit=0)
    assert caller.get(attached.path, "Size") == 512
    assert content(attached, 0, 4096) == pattern(SIZE - 512, 512)


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_sector_size_is_what_the_device_says(world: World, caller: Caller, size: int) -> None:
    attached = caller.attach(world.image(SIZE), sector_size=size)
    told = ask_node(attached, lambda fd: fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
    assert struct.unpack("I", told) == (size,)
    assert caller.get(attached.path, "SectorSize") == size


def test_an_odd_tail_is_ignored_and_size_shows_it(world: World, caller: Caller) -> None:
    attached = caller.attach(world.image(4096 + 511))
    assert caller.get(attached.path, "Size") == 4096
    assert sysfs(attached, "size") == "8"
    assert content(attached, 0, 8192) == pattern(0, 4096)


@pytest.mark.parametrize("wanted", [True, False])
def test_direct_io_on_a_disk_is_what_the_kernel_says(
    world: World, caller: Caller, wanted: bool
) -> None:
    attached = caller.attach(world.image(SIZE), direct_io=wanted)
    assert caller.get(attached.path, "DirectIO") is (sysfs(attached, "loop/dio") == "1")
    if not wanted:
        assert sysfs(attached, "loop/dio") == "0"
    assert content(attached, 0, 4096) == pattern(0, 4096)


def test_no_direct_io_counts_also_for_a_file_that_is_open_with_it(
    world: World, caller: Caller
) -> None:
    file = caller.open(world.image(SIZE), os.O_RDWR | os.O_DIRECT)
    attached = caller.attach(file, direct_io=False)
    assert sysfs(attached, "loop/dio") == "0"
    assert caller.get(attached.path, "DirectIO") is False


def test_direct_io_on_memory_works_somehow_and_the_property_says_how(
    world: World, caller: Caller
) -> None:
    with memfd(SIZE) as fd:
        attached = caller.attach(fd, direct_io=True)
    assert caller.get(attached.path, "DirectIO") is (sysfs(attached, "loop/dio") == "1")
    assert content(attached, 4096, 4096) == pattern(4096, 4096)


@pytest.mark.one_library(False)
@pytest.mark.parametrize(
    "reference", ["", "my image", "é" * 31, "x" * 62, "a/../b", "U+202E \u202e"]
)
def test_a_reference_reaches_the_kernel(world: World, caller: Caller, reference: str) -> None:
    attached = caller.attach(world.image(SIZE), reference=reference)
    status = ask_node(attached, lambda fd: fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(232)))
    assert status[56:120].rstrip(b"\0") == reference.encode()
    assert caller.get(attached.path, "Reference") == reference


def test_the_options_that_ask_for_what_is_so_anyway_are_taken(world: World, caller: Caller) -> None:
    attached = caller.attach(
        world.image(SIZE),
        lock="none",
        lifetime="connection",
        partition_scan=False,
        allow_overlap=False,
    )
    properties = caller.get_all(attached.path)
    assert (properties["Locked"], properties["Lifetime"]) == ("none", "connection")
    assert properties["PartitionScan"] is False
    assert sysfs(attached, "loop/partscan") == "0"


@pytest.mark.one_library(False)
def test_all_options_work_together(world: World, caller: Caller) -> None:
    attached = caller.attach(
        world.image(SIZE),
        read_only=True,
        offset=8192,
        size_limit=16384,
        sector_size=4096,
        direct_io=False,
        reference="all",
        allow_overlap=True,
    )
    assert content(attached, 0, 65536) == pattern(8192, 16384)
    assert (sysfs(attached, "ro"), sysfs(attached, "loop/dio")) == ("1", "0")
    assert sysfs(attached, "queue/logical_block_size") == "4096"


# Wrong options


@pytest.mark.one_library(False)
@pytest.mark.parametrize("key", KINDS)
def test_a_wrong_type_is_told_with_its_key(world: World, caller: Caller, key: str) -> None:
    image = world.image(SIZE)
    for kind, value in SAMPLES.items():
        if kind != KINDS[key]:
            name, text = refused(world, caller, image, {key: Variant(kind, value)})
            assert (name, text.partition(":")[0]) == (INVALID_ARGS, key), kind
            assert f"'{KINDS[key]}'" in text


@pytest.mark.one_library(False)
def test_an_unknown_key_is_named(world: World, caller: Caller) -> None:
    image = world.image(SIZE)
    for key in ("", "read_only", "Offset", "offset ", "x" * 10000, "a\nb", "\N{SNOWMAN}"):
        name, text = refused(world, caller, image, {key: Variant("b", True), "offset": 512})
        assert name == INVALID_ARGS
        assert text.startswith(repr(key[:64]))
        assert len(text) < 200
        assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "values"),
    [
        # Of these the file's size and the kernel have the last word; tests/unit tries the others.
        ("offset", [SIZE, SIZE + 1, SIZE + 512, 2**63 - 512, 2**63, 2**64 - 512]),
        ("size-limit", [1, 511, 4097, SIZE + 512, 2**63, 2**64 - 512]),
        ("sector-size", [1, 256, 511, 513, 1536, 2**32 - 1]),
    ],
)
def test_a_value_out_of_range_is_told_with_its_key(
    world: World, caller: Caller, key: str, values: list[Any]
) -> None:
    image = world.image(SIZE)
    for value in values:
        name, text = refused(world, caller, image, {key: value})
        assert (name, text.partition(":")[0]) == (INVALID_ARGS, key), value


def test_a_sector_size_that_the_kernel_does_not_take_is_an_invalid_one(
    world: World, caller: Caller
) -> None:
    image = world.image(4 * SIZE)
    with pytest.raises(CallError, match=r"InvalidArgs: sector-size: ") as caught:
        caller.attach(image, sector_size=2 * SIZE)
    assert "larger than a page" in caught.value.message
    assert bound_files(world) == []


@pytest.mark.parametrize(
    ("mapping", "key"),
    [
        ({"offset": SIZE - 512, "size-limit": 1024}, "size-limit"),
        ({"offset": 512, "size-limit": SIZE}, "size-limit"),
        ({"offset": 512, "size-limit": 2**64 - 512}, "size-limit"),
        ({"sector-size": 4096, "size-limit": 512}, "size-limit"),
        ({"sector-size": 4096, "offset": SIZE - 2048}, "offset"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    world: World, caller: Caller, mapping: dict[str, Any], key: str
) -> None:
    name, text = refused(world, caller, world.image(SIZE), mapping)
    assert (name, text.partition(":")[0]) == (INVALID_ARGS, key)


def test_a_lifetime_that_nobody_would_end_is_not_supported(world: World, caller: Caller) -> None:
    image = world.image(SIZE)
    name, text = refused(world, caller, image, {"lifetime": "user"})
    assert (name, text.partition(":")[0]) == (NOT_SUPPORTED, "lifetime")


def test_a_mistake_is_told_even_to_those_who_may_not_attach(world: World, caller: Caller) -> None:
    world.polkit.reset(Answer.DENY)
    name, _ = refused(world, caller, world.image(SIZE), {"offset": SIZE})
    assert name == INVALID_ARGS


# Files


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_file_of_less_than_a_sector_is_refused(world: World, caller: Caller, size: int) -> None:
    name, text = refused(world, caller, world.image(size))
    assert name == INVALID_ARGS
    assert text


def test_a_file_smaller_than_the_sector_size_is_refused(world: World, caller: Caller) -> None:
    name, _ = refused(world, caller, world.image(2048), {"sector-size": 4096})
    assert name == INVALID_ARGS


def open_fifo(path: Path) -> int:
    os.mkfifo(path)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def open_socket(_: Path) -> int:
    return socket.socket(socket.AF_UNIX).detach()


def opened(flags: int, path: str = "") -> Callable[[Path], int]:
    """How to open a new file, or the one of that name, with these flags."""
    return lambda new: os.open(path or make_plain(new), flags | os.O_CLOEXEC)


@pytest.mark.parametrize(
    "make",
    [
        opened(os.O_WRONLY),
        opened(os.O_RDWR | os.O_APPEND),
        opened(os.O_APPEND),
        opened(os.O_WRONLY | os.O_APPEND),
        opened(os.O_PATH),
        opened(os.O_RDONLY | os.O_DIRECTORY, "/tmp"),
        opened(os.O_RDONLY, "/proc/version"),
        opened(os.O_RDWR, "/proc/self/comm"),
        opened(os.O_RDONLY, "/sys/kernel/notes"),
        opened(os.O_RDWR, "/dev/null"),
        open_fifo,
        open_socket,
    ],
    ids=[
        *("write-only", "appending", "reading-appending", "write-only-appending", "path"),
        *("directory", "procfs", "writable-procfs", "sysfs", "character-device", "fifo", "socket"),
    ],
)
def test_a_file_of_the_wrong_kind_is_refused(
    world: World, caller: Caller, make: Callable[[Path], int]
) -> None:
    """Rights of an fd."""
    fd = make(world.new_path())
    try:
        name, text = refused(world, caller, fd)
    finally:
        os.close(fd)
    assert name == UNSUPPORTED_FILE
    assert text


def test_what_a_path_fd_leads_to_makes_no_difference(world: World, caller: Caller) -> None:
    """Rights of an fd: an O_PATH fd needs no right to read."""
    image = world.image(SIZE, owner="root", mode=0o600)
    name, _ = refused(world, caller, caller.open(image, os.O_PATH))
    assert name == UNSUPPORTED_FILE


@pytest.mark.parametrize(
    "flags",
    [os.O_NONBLOCK, os.O_NOFOLLOW, os.O_DIRECT, os.O_NOATIME, os.O_SYNC, os.O_DSYNC],
    ids=["NONBLOCK", "NOFOLLOW", "DIRECT", "NOATIME", "SYNC", "DSYNC"],
)
def test_harmless_flags_are_harmless(world: World, caller: Caller, flags: int) -> None:
    attached = caller.attach(caller.open(world.image(SIZE), os.O_RDWR | flags))
    assert content(attached, 0, 512) == pattern(0, 512)


def test_a_file_without_a_name_can_be_attached(world: World, caller: Caller) -> None:
    fd = os.open(world.files, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, pattern(0, 4096))
        attached = caller.attach(fd)
    finally:
        os.close(fd)
    assert content(attached, 0, 4096) == pattern(0, 4096)


def test_a_file_that_the_caller_cannot_open_can_be_passed_to_it(
    world: World, caller: Caller
) -> None:
    """GHSA-qq4x-vfq4-9h9g: the passed fd is what counts, and nobody opens the file again."""
    fd = os.open(world.image(SIZE, owner="root", mode=0o600), os.O_RDONLY | os.O_CLOEXEC)
    try:
        attached = caller.attach(fd)
    finally:
        os.close(fd)
    assert sysfs(attached, "ro") == "1"


def test_a_sparse_file_of_many_gigabytes_can_be_attached(world: World, caller: Caller) -> None:
    path = make_sparse(world.new_path(), 2**42, owner=USER)
    attached = caller.attach(path, offset=2**41)
    assert caller.get(attached.path, "Size") == 2**41


@pytest.mark.parametrize("seal", SEALS)
def test_a_sealed_memfd_can_be_read_only(world: World, caller: Caller, seal: str) -> None:
    """Rights of an fd."""
    with memfd(SIZE, flags=os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) as fd:
        fcntl.fcntl(fd, F_ADD_SEALS, SEALS[seal])
        for mapping in ({}, {"read-only": False}):
            name, text = refused(world, caller, fd, mapping)
            assert (name, text.partition(":")[0]) == (INVALID_ARGS, "read-only")
        attached = caller.attach(fd, read_only=True)
    assert sysfs(attached, "ro") == "1"
    assert content(attached, 0, 512) == pattern(0, 512)


# Overlapping


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({}, {"read-only": True}),
        ({"read-only": True}, {}),
        ({"offset": 4096, "size-limit": 4096}, {}),
        ({}, {"offset": SIZE - 512}),
        ({"size-limit": 8192}, {"offset": 4096, "size-limit": 8192}),
        ({"offset": 4096}, {"size-limit": 4608}),
    ],
)
def test_bytes_that_are_mapped_already_are_refused(
    world: World, caller: Caller, first: dict[str, Any], second: dict[str, Any]
) -> None:
    image = world.image(SIZE)
    attached = caller.attach(image, mapping=first)
    with pytest.raises(CallError) as caught:
        caller.attach(image, mapping=second)
    assert caught.value.name == OVERLAP
    assert attached.node in caught.value.message
    assert bound_files(world) == [str(image)]
    assert caller.attach(image, mapping={**second, "allow-overlap": True}) != attached
    assert bound_files(world) == [str(image)] * 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"read-only": True}, {"read-only": True}),
        ({"size-limit": 4096}, {"offset": 4096}),
        ({"offset": 8192}, {"size-limit": 8192}),
        ({"offset": 4096, "size-limit": 512}, {"offset": 4608, "size-limit": 512}),
    ],
)
def test_bytes_that_nobody_else_could_change_are_not_refused(
    world: World, caller: Caller, first: dict[str, Any], second: dict[str, Any]
) -> None:
    image = world.image(SIZE)
    caller.attach(image, mapping=first)
    caller.attach(image, mapping=second)
    assert bound_files(world) == [str(image)] * 2


def test_a_file_is_the_same_by_any_name_and_for_any_user(world: World, caller: Caller) -> None:
    other = world.caller(OTHER)
    image = world.image(SIZE, mode=0o666)
    caller.attach(image)
    link = world.new_path()
    os.link(image, link)
    image.rename(world.new_path())
    with pytest.raises(CallError, match="Overlap"):
        other.attach(link)
    other.attach(make_plain(image, owner=OTHER))


def test_a_device_overlaps_until_the_kernel_has_let_go_of_it(world: World, caller: Caller) -> None:
    image = world.image(SIZE)
    attached = caller.attach(image)
    fd = caller.open_device(attached.path, "rw")
    assert caller.detach(attached.path) is False
    with pytest.raises(CallError, match="Overlap"):
        caller.attach(image)
    fd.close()
    caller.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)
    caller.attach(image)


def test_of_two_calls_at_once_exactly_one_gets_the_file(world: World, caller: Caller) -> None:
    callers = [world.caller(), world.caller()]
    for _ in range(5):
        image = world.image(SIZE)
        world.polkit.on("org.example.loop1.attach", Answer.HANG)
        asked = len(world.polkit.questions)
        calls = [caller.attach_begin(image) for caller in callers]
        # Both have a yes in the same moment.
        world.polkit.wait_question(count=asked + 2)
        world.polkit.release(Answer.ALLOW)
        won, lost = [], []
        for call in calls:
            try:
                won.append(Attached(*call.end()))
            except CallError as exc:
                lost.append(exc.name)
        assert (len(won), lost) == (1, [OVERLAP])
        loops.used_numbers.add(won[0].number)
        assert bound_files(world).count(str(image)) == 1


def test_of_many_calls_on_one_connection_exactly_one_gets_the_file(
    world: World, caller: Caller
) -> None:
    names = []
    with memfd(SIZE) as fd:
        calls = [caller.attach_begin(fd) for _ in range(4)]
        for call in calls:
            try:
                loops.used_numbers.add(Attached(*call.end()).number)
                names.append("")
            except CallError as exc:
                names.append(exc.name)
    assert sorted(names) == ["", OVERLAP, OVERLAP, OVERLAP]


OFFERS_A_STRANGERS_DEVICE = """
import errno, os
from loopd.loop import kernel
add, get_status = kernel.loop_ctl_add, kernel.loop_get_status64
offered = False
def offers(control_fd, wanted):
    global offered
    number = add(control_fd, wanted) if offered else {number}
    offered = True
    return number
def hangs(loop_fd):
    if os.readlink("/proc/self/fd/%d" % loop_fd) == "/dev/loop{number}":
        raise OSError(errno.ENOTCONN, "this would have asked a file that hangs")
    return get_status(loop_fd)
kernel.loop_ctl_add, kernel.loop_get_status64 = offers, hangs
"""


def test_a_device_that_a_stranger_bound_to_a_hanging_file_is_passed_over(
    world: World, caller: Caller, new_world: Callable[..., World]
) -> None:
    """Foreign devices that hang: others were faster to bind what was just made."""
    taken = caller.attach(world.image(SIZE))
    late = new_world(prelude=OFFERS_A_STRANGERS_DEVICE.format(number=taken.number))
    attached = late.caller().attach(late.image(SIZE))
    assert attached.number != taken.number
    assert content(taken, 0, 512) == pattern(0, 512)
    assert loops.loop_is_bound(taken.number, taken.diskseq)
