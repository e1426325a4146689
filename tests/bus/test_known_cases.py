# SPDX-License-Identifier: LGPL-2.1-or-later
"""What went wrong in other programs of this kind, tried on loopd.

docs/known-cases.md lists all of the cases, and the tests of those that have them elsewhere.
"""

import itertools
import os
import pwd
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops, wire
from tests.harness.bus import LOOPD
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached, options
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.fake_bus import FakeBus
from tests.harness.fuse import Fuse
from tests.harness.images import MIB, make_plain, memfd
from tests.harness.polkit import Answer
from tests.harness.raw import BUS, RawClient
from tests.harness.stall import stopped
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER, World

# Most of it is above the reading and writing of messages.
pytestmark = pytest.mark.one_library

PREFIX = "org.example.loop1."
ATTACH = f"{PREFIX}attach"
BLOCK = f"{PREFIX}attach-block-device"
UNTRUSTED = f"{PREFIX}attach-untrusted-filesystem"
OPEN = f"{PREFIX}open-device"
MANAGE = f"{PREFIX}manage-others"
OPEN_OTHERS = f"{PREFIX}open-others-device"

DENIED = f"{BUS}.Error.AccessDenied"
INVALID = f"{BUS}.Error.InvalidArgs"
EIO = "System.Error.EIO"
REFUSALS = {DENIED, f"{LOOPD}.Error.UntrustedFilesystem"}


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> str:
    """Return the name of the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value.name


@contextmanager
def opened(path: str | bytes | Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def attach(client: RawClient, fd: int, given: dict[str, Variant] | None = None) -> Attached:
    body = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, given or {}], fds=[fd]).body
    attached = Attached(*body)
    loops.used_numbers.add(attached.number)
    return attached


# --- every combination of options, every kind of file, either kind of caller ---------------------

# Of loop devices that do not exist; once the former has, anybody may be given it.
NUMBER, DISK = itertools.islice(
    (each for each in itertools.count(2100) if not os.path.exists(f"/sys/block/loop{each}")), 2
)
OPTIONS = {
    "read-only": True,
    "offset": 4096,
    "size-limit": 16384,
    "sector-size": 4096,
    "partition-scan": True,
    "direct-io": True,
    "reference": "name",
    "lock": "exclusive",
    "allow-overlap": True,
    "number": NUMBER,
}
COMBINATIONS = [
    *(each for size in (0, 1, 2) for each in itertools.combinations(OPTIONS, size)),
    tuple(OPTIONS),
]
KINDS = {
    "regular file": ATTACH,
    "memfd": ATTACH,
    "block device": BLOCK,
    "FUSE file": UNTRUSTED,
}


@contextmanager
def file_of(kind: str, world: World) -> Iterator[int]:
    """An fd for reading and writing on a file of that kind."""
    with ExitStack() as stack:
        if kind == "memfd":
            yield stack.enter_context(memfd())
            return
        if kind == "FUSE file":
            path: str | Path = stack.enter_context(Fuse()).file
        elif kind == "block device":
            path = world.caller(None).attach(world.image(owner=None), number=DISK).node
        else:
            path = world.image()
        yield stack.enter_context(opened(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.alone
def test_each_combination_of_options_asks_for_what_it_does(world: World, kind: str) -> None:
    """CVE-2013-4288, CVE-2019-6133, CVE-2026-7867: no combination of options gets past a question,
    and none asks for less.
    """
    client = world.raw()
    with file_of(kind, world) as fd:
        for keys in COMBINATIONS:
            given = {key: OPTIONS[key] for key in keys}
            needed = {KINDS[kind], MANAGE} if "number" in given else {KINDS[kind]}
            for refused in needed:
                world.polkit.reset(Answer.ALLOW)
                world.polkit.on(refused, Answer.DENY)
                assert error_of(attach, client, fd, options(given)) in REFUSALS, keys
                questions = world.polkit.questions
                asked = [question.action for question in questions]
                assert refused in asked, keys
                assert needed >= set(asked), keys
                assert len(asked) == len(set(asked)), keys
                for question in questions:
                    assert question.bus_name == client.unique_name
                    # What rules go by is what will be done, not what was said.
                    assert question.details["read-only"] == str("read-only" in given).lower()
                    node = f"/dev/loop{NUMBER}" if "number" in given else None
                    assert question.details.get("device") == node
        assert world.device_count() == (kind == "block device")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.alone
def test_root_is_asked_for_nothing_with_any_options(world: World, kind: str) -> None:
    """CVE-2026-7867: what root does is root's own, with any options."""
    world.polkit.reset(Answer.DENY)
    with file_of(kind, world) as fd:
        for keys in ((), ("read-only",), ("number", "partition-scan"), tuple(OPTIONS)):
            client = world.raw(None)
            attached = attach(client, fd, options({key: OPTIONS[key] for key in keys}))
            if "number" in keys:
                assert attached.number == NUMBER
            path = attached.path
            assert client.call(path, DEVICE, "Detach", "a{sv}", [{}]).body == (True,)
    assert world.polkit.questions == []


# --- what fails ----------------------------------------------------------------------------------


FAILS_ONCE_BOUND = """
from loopd.loop import query as loopinfo
def failing(*_):
    raise OSError(5, "Input/output error")
loopinfo.diskseq = failing
"""


def test_what_fails_once_it_is_bound_does_not_stay_bound(new_world: Callable[..., World]) -> None:
    """libblockdev #1171: however often, for any options, and without a place in the quota."""
    world = new_world(prelude=FAILS_ONCE_BOUND)
    client, image = world.raw(), world.image(256 * 1024)
    with opened(image) as fd:
        # The sizes of sectors are refused before that.
        for given in [{}, {"sector_size": 7}, {"read_only": True}, {"sector_size": 2**31}] * 10:
            error = error_of(attach, client, fd, options(**given))
            assert error == (INVALID if "sector_size" in given else EIO)

    def over() -> list[loops.BoundLoop]:
        bound = loops.bound_loops().values()
        return [loop for loop in bound if loop.backing_file == str(image)]

    with loops.Uevents() as events:  # udev may need a moment to let go of the last one
        events.wait_until(lambda: not over(), "nothing to be bound", 5)
    assert world.device_count() == 0


# --- who is calling ------------------------------------------------------------------------------


ARGUMENTS = {"enable", "fd", "file", "lifetime", "lock", "mode", "node", "options", "reference"}
ARGUMENTS |= {"size"}


@pytest.mark.one_library(False)
def test_nothing_that_a_client_says_names_it(world: World) -> None:
    """CVE-2018-1116: there is no argument and no option for a user, a process or a path."""
    caller = world.caller()
    attached = caller.attach(world.image())
    for path in (MANAGER_PATH, attached.path):
        (described,) = caller.call(path, f"{BUS}.Introspectable", "Introspect")
        arguments = {
            str(argument.get("name"))
            for interface in ElementTree.fromstring(described).iterfind("interface")
            if str(interface.get("name")).startswith(LOOPD)
            for method in interface.iterfind("method")
            for argument in method.iterfind("arg")
            if argument.get("direction") == "in"
        }
        assert arguments <= ARGUMENTS, path
    values = {"u": 0, "t": 0, "i": 0, "s": "root", "ay": b"/etc/passwd"}
    for key in ("uid", "user", "owner", "pid", "process", "subject", "sender", "holder", "path"):
        for kind, value in values.items():
            given = {key: Variant(kind, value)}
            assert error_of(caller.attach, world.image(), mapping=given) == INVALID
            assert error_of(caller.detach, attached.path, given) == INVALID
    assert caller.get(attached.path, "Owner") == pwd.getpwnam(USER).pw_uid
    assert {question.bus_name for question in world.polkit.questions} == {caller.unique_name}


HIGH = 4_000_000_000
"""Above the largest of signed numbers."""


@pytest.mark.one_library(False)
def test_a_uid_above_the_signed_numbers_is_a_user_like_any_other(
    new_world: Callable[..., World],
) -> None:
    """CVE-2018-19788: it is asked about, is refused, owns what it attaches and nothing else."""
    world = new_world(accounts=[HIGH])
    owner, client = world.caller(), world.raw(HIGH)
    others = owner.attach(world.image())
    with memfd() as fd:
        world.polkit.reset(Answer.DENY)
        assert error_of(attach, client, fd) == DENIED
        call = client.call
        for member, signature, args in (
            ("Detach", "a{sv}", [{}]),
            ("Open", "sa{sv}", ["r", {}]),
            ("Resize", "a{sv}", [{}]),
        ):
            assert error_of(call, others.path, DEVICE, member, signature, args) == DENIED
        assert [question.action for question in world.polkit.questions] == [
            *(ATTACH, MANAGE, OPEN_OTHERS, MANAGE)
        ]
        assert {question.bus_name for question in world.polkit.questions} == {client.unique_name}
        world.polkit.reset(Answer.ALLOW)
        own = attach(client, fd)
        assert owner.get(own.path, "Owner") == HIGH
        world.polkit.reset(Answer.DENY)
        assert error_of(owner.detach, own.path) == DENIED
        assert call(own.path, DEVICE, "Detach", "a{sv}", [{}]).body == (True,)
    assert owner.get(others.path, "State") == "attached"


@pytest.mark.one_library(False)
def test_a_caller_whom_the_bus_does_not_know_gets_nothing(library: str) -> None:
    """CVE-2021-3560: an error in place of the uid is a no, and not uid 0."""
    with FakeBus() as bus, Daemon(bus, library=library) as daemon, memfd() as fd:
        for number, error in enumerate(("NameHasNoOwner", "NoMemory", "Failed")):
            for method in ("GetConnectionUnixUser", "GetConnectionCredentials"):
                bus.errors[method] = f"{BUS}.Error.{error}"
            calls = [
                bus.send("Attach", "ha{sv}", [0, {}], fds=[fd], sender=f":1.{number + 10}")
                for _ in range(3)
            ]
            for serial in calls:
                assert bus.reply(serial).error_name == f"{LOOPD}.Error.Failed"
            bus.errors.clear()
            # It is asked anew, and known then.
            serial = bus.send("ListDevices", sender=f":1.{number + 10}")
            assert bus.reply(serial).error_name is None
        assert [each for each in bus.received if each.type == wire.METHOD_CALL] == []
        assert "Attach of" not in daemon.log
        daemon.kill()  # nobody would answer it when it says good-bye


def test_a_caller_that_left_before_it_was_known_gets_nothing(world: World) -> None:
    """CVE-2021-3560: the caller goes before loopd can ask who it is."""
    with memfd() as fd:
        for _ in range(10):
            with world.bus.connect(USER) as client:
                with stopped(world.daemon.pid):
                    client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
                    client.call_bus("GetId")
                    client.close()
                    world.bus.wait_released(client.unique_name)
            world.wait_devices(0)
    assert world.polkit.questions == []


def test_a_caller_that_leaves_before_its_answer_gets_nothing(
    new_world: Callable[..., World],
) -> None:
    """CVE-2021-3560: the device is bound and the answer on its way to nobody."""
    world = new_world(arguments=["--debug"])  # which leaves no line out
    printed = len(world.daemon.log)
    world.polkit.on(ATTACH, Answer.HANG)
    deadline = Deadline()
    with memfd() as fd, world.bus.connect(USER) as client, ExitStack() as deaf:
        client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
        world.polkit.wait_question(ATTACH)
        with stopped(world.daemon.pid):
            world.polkit.release(Answer.ALLOW)
            with world.bus.connect() as bystander:
                bystander.call_bus("GetId")  # the bus has passed the answer on
            deaf.enter_context(stopped(world.bus.pid))
        while "Attach of /dev/loop" not in world.daemon.log[printed:]:
            assert deadline.remaining
        client.close()
    world.wait_devices(0)


# --- names and paths -----------------------------------------------------------------------------


def test_a_file_really_called_deleted_is_not_the_one_that_was(world: World) -> None:
    """CVE-2021-3996: sysfs shows both by the same text, and neither is taken for the other."""
    caller = world.caller()
    directory = world.new_path()
    directory.mkdir()
    removed, real = directory / "x", directory / "x (deleted)"
    make_plain(removed, owner=USER)
    make_plain(real, 2 * MIB, owner=USER)
    with opened(removed) as removed_fd, opened(real) as real_fd:
        first = caller.attach(removed_fd)
        removed.unlink()
        # The same text, and no overlap.
        second = caller.attach(real_fd)
        seen = [loops.look_at(each.number) for each in (first, second)]
        assert {loop.backing_file for loop in seen if loop} == {str(real)}
        for fd, attached in ((removed_fd, first), (real_fd, second)):
            assert caller.manager("GetDevice", "h", 0, fds=[fd]) == (attached.path,)
            told = caller.get_all(attached.path)
            assert told["BackingInode"] == os.fstat(fd).st_ino
        assert error_of(caller.attach, real_fd) == f"{LOOPD}.Error.Overlap"
        assert caller.manager("Resize", "ha{sv}", 0, {}, fds=[real_fd]) == (2 * MIB,)
        assert caller.manager("Detach", "ha{sv}", 0, {}, fds=[real_fd]) == (True,)
        assert caller.get(first.path, "State") == "attached"
        assert caller.manager("Detach", "ha{sv}", 0, {}, fds=[removed_fd]) == (True,)


def a_path_of(length: int, directory: Path, last: bytes = b"") -> bytes:
    """Make directories so that a file in them has a path of so many bytes; return that."""
    path = os.fsencode(directory)
    while (room := length - len(path) - 1 - len(last)) > 0:
        # Names have 255 bytes at most, and none may be empty at the end.
        name = b"d" * (room if room <= 255 else min(255, room - 2))
        path += b"/" + name
        if room > 255:
            os.mkdir(path)
            os.chmod(path, 0o755)
    return path + last


@pytest.mark.one_library(False)
@pytest.mark.parametrize("length", [4000, 4094, 4095])
def test_a_path_as_long_as_there_can_be_does_no_harm(world: World, length: int) -> None:
    """CVE-2014-0004: a path is shown as it is, or not at all where the kernel has no room."""
    directory = world.new_path()
    directory.mkdir()
    path = a_path_of(length, directory, b"\n\xff")
    assert len(path) == length
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, MIB)
        caller = world.caller()
        attached = caller.attach(fd)
        shown = path if length < 4095 else b""
        assert caller.get(attached.path, "BackingFile") == shown + b"\0"
        (rows,) = caller.manager("ListDevices")
        assert [row[3] for row in rows if row[0] == attached.path] == [shown + b"\0"]
        assert attached.path in caller.managed_objects()
        assert caller.manager("GetDevice", "h", 0, fds=[fd]) == (attached.path,)
        assert caller.manager("Detach", "ha{sv}", 0, {}, fds=[fd]) == (True,)
    os.unlink(path)


FORGED = "\x1b[2J\rloopd: forged\n"


@pytest.mark.one_library(False)
def test_no_line_of_the_log_is_a_clients(new_world: Callable[..., World]) -> None:
    """Forged log lines: no line and no control character is a client's, not even with --debug."""
    world = new_world(arguments=["--debug"])
    caller = world.caller()
    path = world.files / FORGED.replace("/", "")
    attached = caller.attach(make_plain(path, owner=USER), reference="forged")
    for member, signature, *args in (
        ("SetReference", "sa{sv}", FORGED, {}),
        ("SetReference", "sa{sv}", "forged again", {}),
        ("Open", "sa{sv}", FORGED, {}),
        ("Lock", "sa{sv}", FORGED, {}),
        ("Resize", "a{sv}", {FORGED: Variant("s", FORGED)}),
        ("Resize", "a{sv}", {}),
        ("forged", "s", FORGED),
    ):
        with suppress(CallError):
            caller.device(attached.path, member, signature, *args)
    for name in (FORGED, f"/dev/{FORGED}"):
        error_of(caller.manager, "GetDeviceByNode", "s", name)
    error_of(caller.attach, path)
    assert caller.detach(attached.path) is True
    lines = world.daemon.log.split("\n")
    assert [line for line in lines if line.startswith("loopd: Attach of /dev/loop")]
    assert [line for line in lines if line and not line.startswith("loopd: ")] == []
    assert [line for line in lines if line.startswith("loopd: forged")] == []
    assert [line for line in lines if line and not line.isprintable()] == []
    # Nor is any path told.
    assert str(world.files) not in world.daemon.log
    assert "forged" not in world.daemon.log
    path.unlink()


# --- what an older kernel makes of an fd ---------------------------------------------------------

BEFORE_6_11 = """
from loopd.loop import block_device as blockdev
blockdev.unbinds_while_open = lambda: True
"""


def test_before_linux_6_11_only_root_is_given_an_fd_of_a_device(
    new_world: Callable[..., World],
) -> None:
    """Stale device fd: one that outlives its binding would reach the next user's image."""
    world = new_world(prelude=BEFORE_6_11)
    caller, root = world.caller(), world.caller(None)
    attached = caller.attach(world.image())
    for mode in ("r", "rw"):
        error = error_of(caller.open_device, attached.path, mode)
        assert error == f"{LOOPD}.Error.NotSupported"
        root.open_device(attached.path, mode).close()
    assert [question.action for question in world.polkit.questions] == [ATTACH]


# --- quotas --------------------------------------------------------------------------------------

LIMITED = """
[limits]
devices_per_user = 3
"""


@dataclass(frozen=True)
class Dodge:
    """Somebody who tries to have more than there is for one user."""

    world: World
    fds: list[int]

    def attach_another(self, client: RawClient) -> str:
        """Attach one more; the error's name, empty if there is none."""
        try:
            attach(client, self.fds.pop())
        except CallError as exc:
            return exc.name
        return ""


def test_a_user_allowed_by_polkit_has_no_more_than_its_share(
    new_world: Callable[..., World],
) -> None:
    """CVE-2025-6018, Quota dodges: a yes of polkit, or a connection for each, is no way round."""
    world = new_world(config=LIMITED)
    with ExitStack() as stack:
        dodge = Dodge(world, [stack.enter_context(memfd()) for _ in range(24)])
        answers = [dodge.attach_another(world.raw()) for _ in range(20)]
        assert answers == [""] * 3 + [f"{BUS}.Error.LimitsExceeded"] * 17
        assert world.device_count() == 3
        assert dodge.attach_another(world.raw(OTHER)) == ""
