# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client library over a bus that the tests play: what it sends, what it makes of answers."""

import asyncio
import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from loopd import errors
from loopd.bus import codec, frame
from loopd.bus.codec import Variant
from loopd.bus.transport import BUS_NAME, BusError
from loopd.client import Client, image
from loopd.client import device as device_module
from loopd.client.absence import Unavailable
from loopd.client.link import Link, make_options
from loopd.client.properties import Partition, Properties
from loopd.client.watch import DEVICE, NAME, OBJECT_MANAGER, PROPERTIES, Ended, Watch
from loopd.fd import OwnedFd
from loopd.loop import kernel
from tests.harness.area import CHECKOUT
from tests.harness.asynchronous import run_async

NOBODY = 65534
OBJECT = "/org/example/Loop1/device/loop3_41"
LOOPD = ":1.7"


# --- opening files ------------------------------------------------------------------------------


@contextmanager
def rights_of(uid: int) -> Iterator[None]:
    """Open files as this uid; whoever is not root has to do with the own one."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def file(area: Path) -> Path:
    """A file of 4 KiB that everyone may read and write."""
    path = area / "image"
    path.write_bytes(bytes(4096))
    path.chmod(0o666)
    return path


def access(fd: OwnedFd) -> int:
    return fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE


def opening(monkeypatch: pytest.MonkeyPatch, *outcomes: int | None) -> list[int]:
    """Make os.open fail with these errnos, or succeed for None; returns the flags it was given."""
    left, given, really = list(outcomes), [], os.open

    def open_(path: object, flags: int, *_: object, **__: object) -> int:
        given.append(flags)
        code = left.pop(0)
        if code is None:
            return really(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "open", open_)
    return given


def test_a_file_is_opened_read_write(file: Path) -> None:
    """A18"""
    with rights_of(NOBODY), image.open_file(file) as fd:
        assert access(fd) == os.O_RDWR


def test_a_file_that_may_not_be_written_is_opened_for_reading(file: Path) -> None:
    """A18"""
    file.chmod(0o444)
    with rights_of(NOBODY), image.open_file(file) as fd:
        assert access(fd) == os.O_RDONLY


def test_read_write_was_asked_for_and_is_not_given_up(file: Path) -> None:
    """A18"""
    file.chmod(0o444)
    with rights_of(NOBODY), pytest.raises(PermissionError):
        image.open_file(file, read_only=False)


def test_read_only_opens_a_writable_file_for_reading(file: Path) -> None:
    """A18"""
    with image.open_file(file, read_only=True) as fd:
        assert access(fd) == os.O_RDONLY


def test_a_file_that_may_not_be_read_is_refused(file: Path) -> None:
    """A18"""
    file.chmod(0)
    with rights_of(NOBODY), pytest.raises(PermissionError) as refused:
        image.open_file(file)
    assert refused.value.filename == str(file)


def tried(flags: Sequence[int]) -> list[str]:
    """How a file was tried to be opened."""
    names = {os.O_RDWR: "rw", os.O_RDONLY: "r"}
    return [
        names[each & os.O_ACCMODE] + (" direct" if each & os.O_DIRECT else "") for each in flags
    ]


@pytest.mark.parametrize("direct_io", [None, True])
def test_a_file_is_opened_for_direct_io(
    monkeypatch: pytest.MonkeyPatch, direct_io: bool | None
) -> None:
    """A18, A15"""
    given = opening(monkeypatch, None)
    image.open_file("x", direct_io=direct_io).close()
    assert tried(given) == ["rw direct"]


def test_direct_io_that_is_not_wanted_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A18, A15"""
    given = opening(monkeypatch, errno.EACCES, None)
    image.open_file("x", direct_io=False).close()
    assert tried(given) == ["rw", "r"]


@pytest.mark.parametrize("read_only", [None, False, True])
def test_a_filesystem_without_direct_io_does_without(
    monkeypatch: pytest.MonkeyPatch, read_only: bool | None
) -> None:
    """A18"""
    given = opening(monkeypatch, errno.EINVAL, None)
    image.open_file("x", read_only=read_only).close()
    mode = "r" if read_only else "rw"
    assert tried(given) == [f"{mode} direct", mode]


def test_reading_alone_is_tried_with_direct_io_first_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A18"""
    given = opening(monkeypatch, errno.EROFS, errno.EROFS, None)
    image.open_file("x").close()
    assert tried(given) == ["rw direct", "rw", "r direct"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_the_first_refusal_is_the_one_reported(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A18: neither what O_DIRECT was refused for, nor what followed from the first"""
    given = opening(monkeypatch, errno.EINVAL, code, errno.EINVAL, errno.ENOENT)
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is looked at below
        image.open_file("x")
    assert refused.value.errno == code
    assert tried(given) == ["rw direct", "rw", "r direct", "r"]


@pytest.mark.parametrize("code", [errno.ETXTBSY, errno.EISDIR, errno.ENOENT])
def test_other_refusals_are_final(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A18"""
    given = opening(monkeypatch, code, code)
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is looked at below
        image.open_file("x")
    assert refused.value.errno == code
    assert tried(given) == ["rw direct", "rw"]


@pytest.mark.parametrize("read_only", [False, True])
def test_what_was_demanded_is_tried_with_and_without_direct_io_only(
    monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """A18"""
    given = opening(monkeypatch, errno.EACCES, errno.EACCES)
    with pytest.raises(PermissionError):
        image.open_file("x", read_only=read_only)
    mode = "r" if read_only else "rw"
    assert tried(given) == [f"{mode} direct", mode]


@pytest.mark.parametrize("lease", [fcntl.F_RDLCK, fcntl.F_WRLCK])
def test_the_holder_of_a_lease_has_time_to_let_go_of_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, lease: int
) -> None:
    refusals, really = [], os.open
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which says that somebody wants it
    holder_fd = os.open(file, os.O_RDONLY if lease == fcntl.F_RDLCK else os.O_RDWR)
    fcntl.fcntl(holder_fd, fcntl.F_SETLEASE, lease)

    def open_(path: Path, flags: int) -> int:
        try:
            return really(path, flags)
        except BlockingIOError as exc:
            refusals.append(exc)
            if len(refusals) == 5:
                fcntl.fcntl(holder_fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            raise

    try:
        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(image, "_LEASE_PAUSE", 0)
        with image.open_file(file, lease_wait=30) as fd:
            assert access(fd) == os.O_RDWR
            # As it would have been without the lease.
            assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_DIRECT
        assert len(refusals) == 5
    finally:
        os.close(holder_fd)
        signal.signal(signal.SIGIO, before)


def test_a_lease_is_not_waited_for_unless_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = opening(monkeypatch, errno.EAGAIN)
    with pytest.raises(BlockingIOError):
        image.open_file("x")
    assert tried(given) == ["rw direct"]


def test_opening_neither_waits_nor_is_inherited(area: Path) -> None:
    os.mkfifo(area / "fifo")
    with image.open_file(area / "fifo", read_only=True) as fd:
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
        assert not os.get_inheritable(fd.fileno())


def test_a_file_can_be_named_without_the_right_to_read_it(file: Path) -> None:
    file.chmod(0)
    with rights_of(NOBODY), image.name_file(file) as fd:
        assert os.fstat(fd.fileno()).st_ino == file.stat().st_ino
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(fd.fileno(), 1)


# --- options and properties ---------------------------------------------------------------------


def test_only_what_is_given_is_sent() -> None:
    options = make_options(("offset", "t", 0), ("read-only", "b", None), ("reference", "s", "ä"))
    assert {key: (each.signature, each.value) for key, each in options.items()} == {
        "offset": ("t", 0),
        "reference": ("s", "ä"),
    }


@pytest.mark.parametrize(
    ("kind", "value"),
    [("t", -1), ("t", 1 << 64), ("u", 1 << 32), ("s", "a\0b"), ("s", "a\udcff")],
)
def test_what_a_bus_would_not_carry_is_refused_by_its_key(kind: str, value: object) -> None:
    with pytest.raises(errors.InvalidArgs, match=r"^the-key: "):
        make_options(("the-key", kind, value))


def properties(**changes: Variant) -> dict[str, Variant]:
    """What loopd tells of a device."""
    return {
        "Node": Variant("s", "/dev/loop3"),
        "Number": Variant("u", 3),
        "DeviceNumber": Variant("t", os.makedev(7, 3)),
        "Diskseq": Variant("t", 41),
        "BackingFile": Variant("ay", b"/tmp/\xff\0"),
        "BackingDevice": Variant("t", 0),
        "BackingInode": Variant("t", 0),
        "Offset": Variant("t", 0),
        "SizeLimit": Variant("t", 0),
        "Size": Variant("t", 4096),
        "SectorSize": Variant("u", 512),
        "ReadOnly": Variant("b", False),
        "DirectIO": Variant("b", True),
        "Autoclear": Variant("b", True),
        "PartitionScan": Variant("b", False),
        "Partitions": Variant("a(ustt)", [[1, "/dev/loop3p1", 512, 1024]]),
        "MissingPartitions": Variant("au", []),
        "Reference": Variant("s", ""),
        "Owner": Variant("u", 1000),
        "Holder": Variant("s", ":1.9"),
        "Lifetime": Variant("s", "connection"),
        "Holds": Variant("u", 0),
        "Locked": Variant("s", "none"),
        "Managed": Variant("b", True),
        "State": Variant("s", "attached"),
        "AttachedAt": Variant("t", 1),
        **changes,
    }


def test_properties_are_read_under_their_python_names() -> None:
    device = Properties.decode(properties(Novelty=Variant("s", "of a newer loopd")))
    assert device.backing_file == b"/tmp/\xff"
    assert device.direct_io is True
    assert device.partitions == (Partition(1, "/dev/loop3p1", 512, 1024),)


def test_what_an_older_loopd_does_not_tell_has_a_default() -> None:
    told = properties(MissingPartitions=Variant("au", [2, 5]))
    assert Properties.decode(told).missing_partitions == (2, 5)
    del told["MissingPartitions"]
    assert Properties.decode(told).missing_partitions == ()


def test_a_missing_property_is_named() -> None:
    incomplete = properties()
    del incomplete["SectorSize"]
    with pytest.raises(errors.Failed, match="sector_size"):
        Properties.decode(incomplete)


# --- calls --------------------------------------------------------------------------------------

IN_SIGNATURES = {
    (interface.get("name"), method.get("name")): "".join(
        arg.get("type", "") for arg in method.iter("arg") if arg.get("direction") == "in"
    )
    for interface in ElementTree.parse(CHECKOUT / "dbus/org.example.Loop1.xml").iter("interface")
    for method in interface.iter("method")
}


class Bus:
    """Stands for wire.Connection: keeps what is called, and answers as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.bodies: list[list[Any]] = []
        self.interactive: list[bool] = []
        self.passed: list[os.stat_result] = []
        self.passed_names: list[str] = []
        self.answers: dict[str, Callable[[], Any]] = {}
        self.sends: list[OwnedFd] = []
        self.called = asyncio.Event()
        self.owner: str | None = LOOPD
        self.unit: Callable[[], dict[str, Any]] = raising(errors.PeerError("no systemd", "x.y"))
        """What systemd tells of loopd's unit."""

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        timeout: float,
    ) -> list[Any]:
        assert (destination, member) == ("org.freedesktop.systemd1", "Get")
        assert path.endswith("/loopd_2eservice")
        return [self.unit()[body[1]]]

    async def call_with_fds(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        timeout: float | None,
        interactive: bool,
        fds: Sequence[int],
    ) -> tuple[list[Any], list[OwnedFd]]:
        assert destination == NAME
        assert signature == IN_SIGNATURES[interface, member]
        # Whatever does not fit the signature fails here.
        call = (destination, path, interface, member, signature, body)
        codec.serialize(codec.method_call(*call, serial=1, fds=fds))
        self.calls.append((path, member))
        self.bodies.append(list(body))
        self.interactive.append(interactive)
        self.passed += [os.fstat(fd) for fd in fds]
        self.passed_names += [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
        self.called.set()
        answer = self.answers[member]()
        if isinstance(answer, asyncio.Future):
            answer = await answer
        for fd in fds:
            os.fstat(fd)  # still open, as long as the call lasts
        sent, self.sends = self.sends, []
        return answer, sent

    async def call_bus(self, member: str, signature: str, body: Sequence[Any]) -> list[Any]:
        assert member in ("AddMatch", "GetNameOwner")
        if member == "AddMatch":
            return []
        if self.owner is None:
            raise errors.by_name("org.freedesktop.DBus.Error.NameHasNoOwner", "no owner")
        return [self.owner]

    def close(self) -> None:
        pass


def client_of(bus: Any, watch: Watch | None = None, *, interactive: bool = False) -> Client:
    return Client(Link(bus, watch or Watch(), interactive))


def raising(exc: Exception) -> Callable[[], Any]:
    def answer() -> Any:
        raise exc

    return answer


@pytest.mark.parametrize(
    "name",
    [
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.DBus.Error.NoReply",
        "org.freedesktop.DBus.Error.Spawn.ChildExited",
        "org.freedesktop.systemd1.NoSuchUnit",
    ],
)
def test_an_answer_that_only_the_absence_of_loopd_explains_says_so(name: str) -> None:
    async def ask() -> None:
        bus = Bus()
        bus.answers["GetManagedObjects"] = raising(errors.by_name(name, "whatever"))
        with pytest.raises(Unavailable):
            await client_of(bus).devices()

    run_async(ask())


def test_other_errors_pass_as_they_are() -> None:
    async def ask() -> None:
        bus = Bus()
        bus.answers["GetDeviceByNode"] = raising(errors.NoSuchDevice("none"))
        with pytest.raises(errors.NoSuchDevice, match=r"^none$"):
            await client_of(bus).device_by_node("loop3")

    run_async(ask())


@pytest.mark.parametrize("interactive", [False, True])
def test_asking_for_a_password_is_allowed_by_the_client_alone(interactive: bool) -> None:
    async def ask() -> Bus:
        bus = Bus()
        bus.answers["GetManagedObjects"] = lambda: [{}]
        assert await client_of(bus, interactive=interactive).devices() == []
        return bus

    assert run_async(ask()).interactive == [interactive]


def test_the_callers_fd_stays_the_callers(file: Path) -> None:
    async def attach() -> None:
        bus = Bus()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        with file.open("rb") as opened:
            device = await client_of(bus).attach(opened)
            assert not opened.closed
            assert os.fstat(opened.fileno()).st_ino == bus.passed[0].st_ino
        assert (device.path, device.node, device.diskseq) == (OBJECT, "/dev/loop3", 41)

    run_async(attach())


def test_a_device_that_comes_when_nobody_waits_any_more_is_detached(file: Path) -> None:
    async def give_up() -> None:
        bus = Bus()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        detached = asyncio.Event()

        def detach() -> list[Any]:
            detached.set()
            return [True]

        bus.answers["Attach"] = lambda: answer
        bus.answers["Detach"] = detach

        async def attach() -> None:
            await client_of(bus).attach(file)

        attaching = asyncio.ensure_future(attach())
        await bus.called.wait()
        attaching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attaching
        answer.set_result([OBJECT, "/dev/loop3", 41])
        async with asyncio.timeout(10):
            await detached.wait()
        assert bus.calls[-1] == (OBJECT, "Detach")

    before = set(os.listdir("/proc/self/fd"))
    run_async(give_up())
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "gone", [errors.NoSuchDevice("x"), errors.UnknownObject("x"), BusError("x"), Unavailable("x")]
)
def test_the_end_of_the_block_takes_a_device_that_has_gone(file: Path, gone: Exception) -> None:
    async def use() -> str:
        bus = Bus()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        bus.answers["Detach"] = raising(gone)
        async with client_of(bus).attach(file) as device:
            return device.node

    assert run_async(use()) == "/dev/loop3"


def test_the_end_of_the_block_hides_no_other_error(file: Path) -> None:
    async def use() -> None:
        bus = Bus()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        bus.answers["Detach"] = raising(errors.Failed("x"))
        with pytest.raises(errors.Failed):
            async with client_of(bus).attach(file):
                pass

    run_async(use())


# --- the end of a device ------------------------------------------------------------------------


def signal_from(
    sender: str, path: str, interface: str, member: str, signature: str, *body: Any
) -> frame.Frame:
    """A signal as the bus delivers it."""
    message = codec.signal(path, interface, member, signature, list(body), serial=1)
    header = frame.Header(
        type=frame.SIGNAL, flags=1, serial=1, path=path, interface=interface, member=member
    )
    header.sender = sender
    return frame.Frame(header, codec.serialize(message))


def removed(sender: str = LOOPD, path: str = OBJECT) -> frame.Frame:
    return signal_from(
        sender, "/org/example/Loop1", OBJECT_MANAGER, "InterfacesRemoved", "oas", path, [DEVICE]
    )


def state(value: str, path: str = OBJECT) -> frame.Frame:
    changed = {"State": Variant("s", value)}
    return signal_from(
        LOOPD, path, PROPERTIES, "PropertiesChanged", "sa{sv}as", DEVICE, changed, []
    )


def owner_changed(sender: str, name: str, new: str) -> frame.Frame:
    return signal_from(
        sender, "/org/freedesktop/DBus", BUS_NAME, "NameOwnerChanged", "sss", name, LOOPD, new
    )


async def turns() -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(20):
        await asyncio.sleep(0)


def ended_by(
    *signals: frame.Frame, owner: str | None = LOOPD, later: Callable[[], Any] | None = None
) -> Ended | None:
    """What a device that is attached ends by, when its client gets these signals.

    `later` is the answer to whoever asks for its properties then.
    """

    async def wait() -> Ended | None:
        bus, watch = Bus(), Watch()
        bus.owner = owner
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        bus.answers["GetAll"] = lambda: [properties()]
        device = await client_of(bus, watch).attach(os.devnull)
        waiting = asyncio.ensure_future(device.wait_ended())
        await turns()
        assert bus.calls[-1] == (OBJECT, "GetAll")
        bus.answers["GetAll"] = later or bus.answers["GetAll"]
        for each in signals:
            watch.on_signal(each)
            await turns()
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        await asyncio.wait({waiting})
        return None

    return run_async(wait())


def test_a_device_ends_when_its_object_goes() -> None:
    assert ended_by(removed()) is Ended.DETACHED


def test_a_device_ends_when_it_is_detached_while_in_use() -> None:
    assert ended_by(state("detaching")) is Ended.DETACHED


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """What the kernel has bound to /dev/loop3, look by look; the last one stays."""
    found: list[int | None] = [7]
    monkeypatch.setattr(
        kernel, "loop_binding", lambda number: found.pop(0) if len(found) > 1 else found[0]
    )
    monkeypatch.setattr(device_module, "_LOOK", 0)
    yield found
    assert len(found) == 1


LEFT = owner_changed(BUS_NAME, NAME, "")
COME = owner_changed(BUS_NAME, NAME, ":1.8")


def test_a_device_that_goes_with_loopd_has_ended(bindings: list[int | None]) -> None:
    bindings[:] = [7, 7, 7, None]
    assert ended_by(LEFT) is Ended.DAEMON_LEFT


def test_a_device_that_another_attachment_has_taken_the_place_of_has_ended(
    bindings: list[int | None],
) -> None:
    bindings[:] = [7, 8]
    assert ended_by(LEFT) is Ended.DAEMON_LEFT


def test_a_device_that_nobody_takes_over_has_ended(
    bindings: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_SUCCESSION", 0)
    assert ended_by(LEFT) is Ended.DAEMON_LEFT


def test_a_bus_that_goes_with_loopd_is_not_waited_for(bindings: list[int | None]) -> None:
    async def wait() -> Ended:
        bus, watch = Bus(), Watch()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        bus.answers["GetAll"] = lambda: [properties()]
        device = await client_of(bus, watch).attach(os.devnull)
        waiting = asyncio.ensure_future(device.wait_ended())
        await turns()
        watch.on_signal(LEFT)
        watch.end_all(Ended.BUS_LOST)
        return await asyncio.wait_for(waiting, 5)

    assert run_async(wait()) is Ended.BUS_LOST


def test_the_next_loopd_may_take_the_device_over(bindings: list[int | None]) -> None:
    assert ended_by(LEFT) is None
    assert ended_by(LEFT, COME) is None
    assert ended_by(LEFT, COME, removed()) is None  # by one that is no more
    assert ended_by(LEFT, COME, removed(sender=":1.8")) is Ended.DETACHED


@pytest.mark.parametrize(
    "answer",
    [
        raising(errors.UnknownObject("x")),
        lambda: [properties(Managed=Variant("b", False))],
    ],
    ids=["unknown", "not its own"],
)
def test_the_next_loopd_may_not_know_the_device(
    bindings: list[int | None], answer: Callable[[], Any]
) -> None:
    assert ended_by(LEFT, COME, later=answer) is Ended.DAEMON_LEFT


def test_a_loopd_that_comes_later_is_heard() -> None:
    arrival = owner_changed(BUS_NAME, NAME, ":1.8")
    assert ended_by(removed(sender=":1.8"), owner=None) is None
    assert ended_by(arrival, owner=None) is None
    assert ended_by(arrival, removed(sender=":1.8"), owner=None) is Ended.DETACHED


@pytest.mark.parametrize(
    "signal",
    [
        removed(sender=":1.66"),
        removed(path=OBJECT + "1"),
        state("attached"),
        state("detaching", path=OBJECT + "1"),
        owner_changed(LOOPD, NAME, ""),
        owner_changed(BUS_NAME, "org.example.Other", ""),
        frame.Frame(removed().header, b"no message"),
        frame.Frame(None, b""),
        # Of other types than the interface has, which a bus lets through.
        signal_from(LOOPD, OBJECT, OBJECT_MANAGER, "InterfacesRemoved", "aoas", [OBJECT], [DEVICE]),
        signal_from(LOOPD, OBJECT, OBJECT_MANAGER, "InterfacesRemoved", "o", OBJECT),
        signal_from(LOOPD, OBJECT, PROPERTIES, "PropertiesChanged", "sas", DEVICE, ["State"]),
        signal_from(LOOPD, OBJECT, PROPERTIES, "PropertiesChanged", "susi", DEVICE, 1, "", 1),
        signal_from(
            *(LOOPD, OBJECT, PROPERTIES, "PropertiesChanged", "sasas", DEVICE, ["State"], [])
        ),
        signal_from(
            *(LOOPD, OBJECT, PROPERTIES, "PropertiesChanged", "sa{ss}as"),
            *(DEVICE, {"State": "detaching"}, []),
        ),
    ],
    ids=range(14),
)
def test_what_does_not_end_the_device_is_passed_over(signal: frame.Frame) -> None:
    assert ended_by(signal) is None


@pytest.mark.parametrize(
    ("answer", "how"),
    [
        (raising(errors.UnknownObject("x")), Ended.DETACHED),
        (lambda: [properties(State=Variant("s", "detaching"))], Ended.DETACHED),
        (raising(errors.by_name("org.freedesktop.DBus.Error.NoReply", "x")), Ended.DAEMON_LEFT),
        (raising(BusError("x")), Ended.BUS_LOST),
    ],
    ids=["gone", "detaching", "no loopd", "no bus"],
)
def test_an_end_before_the_wait_is_found(answer: Callable[[], Any], how: Ended) -> None:
    async def wait() -> Ended:
        bus = Bus()
        bus.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
        bus.answers["GetAll"] = answer
        device = await client_of(bus).attach(os.devnull)
        return await device.wait_ended()

    assert run_async(wait()) is how
