# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each method of the client library sends and returns, in both its fronts."""

import asyncio
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopd import client, errors
from loopd.bus.codec import Variant
from loopd.client import blocking, link
from loopd.client.watch import PATH
from loopd.fd import OwnedFd
from tests.harness.asynchronous import run_async
from tests.unit.test_client import OBJECT, Bus, client_of


@pytest.fixture
def file(area: Path) -> Path:
    """A file of 4 KiB."""
    path = area / "image"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def bus() -> Bus:
    """A bus on which /dev/loop3 can be attached."""
    made = Bus()
    made.answers["Attach"] = lambda: [OBJECT, "/dev/loop3", 41]
    return made


@pytest.fixture
def front(bus: Bus) -> Iterator[blocking.Client]:
    """The blocking client on it."""
    with asyncio.Runner() as runner:
        yield blocking.Client(runner, client_of(bus))


def sent(options: dict[str, Variant]) -> dict[str, tuple[str, Any]]:
    return {key: (each.signature, each.value) for key, each in options.items()}


# --- Attach -------------------------------------------------------------------------------------


def test_nothing_is_sent_that_is_not_given(bus: Bus, front: blocking.Client, file: Path) -> None:
    front.attach(file)
    assert bus.bodies == [[0, {}]]


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"read_only": False}, ("read-only", ("b", False))),
        ({"offset": 512}, ("offset", ("t", 512))),
        ({"size_limit": 0}, ("size-limit", ("t", 0))),
        ({"sector_size": 4096}, ("sector-size", ("u", 4096))),
        ({"sector_size": 0}, ("sector-size", ("u", 0))),
        ({"partition_scan": True}, ("partition-scan", ("b", True))),
        ({"partition_scan": False}, ("partition-scan", ("b", False))),
        ({"direct_io": False}, ("direct-io", ("b", False))),
        ({"reference": "x"}, ("reference", ("s", "x"))),
        ({"lock": "exclusive"}, ("lock", ("s", "exclusive"))),
        ({"lifetime": "user"}, ("lifetime", ("s", "user"))),
        ({"allow_overlap": True}, ("allow-overlap", ("b", True))),
        ({"number": 0}, ("number", ("u", 0))),
    ],
    ids=str,
)
def test_options_of_attach_have_their_key_and_type(
    bus: Bus, front: blocking.Client, file: Path, given: dict[str, Any], option: tuple[str, Any]
) -> None:
    device = front.attach(file, **given)
    assert sent(bus.bodies[0][1]) == dict([option])
    assert (device.path, device.node, device.diskseq) == (OBJECT, "/dev/loop3", 41)


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_a_number_that_no_bus_carries_is_named(
    bus: Bus, front: blocking.Client, file: Path, number: int
) -> None:
    with pytest.raises(errors.InvalidArgs, match=r"^number: "):
        front.attach(file, number=number)
    assert bus.calls == []


@pytest.mark.parametrize(("direct_io", "direct"), [(None, True), (True, True), (False, False)])
def test_a_path_is_opened_for_direct_io_as_asked(
    bus: Bus, file: Path, direct_io: bool | None, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A18"""
    given: list[int] = []
    really = os.open

    def open_(path: Any, flags: int, *how: Any, **more: Any) -> int:
        if path == file:
            given.append(flags)
        return really(path, flags, *how, **more)

    monkeypatch.setattr(os, "open", open_)

    async def attach() -> None:
        await client_of(bus).attach(file, direct_io=direct_io)

    run_async(attach())
    assert bool(given[0] & os.O_DIRECT) is direct


# --- devices ------------------------------------------------------------------------------------

Method = Callable[[blocking.Device], Any]


@pytest.mark.parametrize(
    ("call", "member", "body", "answer", "returned"),
    [
        (lambda each: each.lock("shared"), "Lock", ["shared", {}], [], None),
        (lambda each: each.set_lifetime("user"), "SetLifetime", ["user", {}], [], None),
        (lambda each: each.set_autoclear(False), "SetAutoclear", [False, {}], [], None),
        (lambda each: each.set_direct_io(True), "SetDirectIO", [True, {}], [False], False),
        (lambda each: each.set_reference("ä"), "SetReference", ["ä", {}], [], None),
        (lambda each: each.set_sector_size(0), "SetSectorSize", [0, {}], [], None),
        (lambda each: each.rescan_partitions(), "RescanPartitions", [{}], [2], 2),
        (lambda each: each.sync(), "Sync", [{}], [], None),
        (lambda each: each.resize(), "Resize", [{}], [4096], 4096),
        (lambda each: each.detach(), "Detach", [{}], [True], True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_sends_its_arguments_and_returns_the_answer(
    bus: Bus,
    front: blocking.Client,
    file: Path,
    call: Method,
    member: str,
    body: list[Any],
    answer: list[Any],
    returned: object,
) -> None:
    bus.answers[member] = lambda: answer
    assert call(front.attach(file)) == returned
    assert bus.calls[-1] == (OBJECT, member)
    assert bus.bodies[-1] == body


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda each: each.set_sector_size(1 << 32), "sector-size"),
        (lambda each: each.set_sector_size(-1), "sector-size"),
        (lambda each: each.set_reference("\udcff"), "reference"),
        (lambda each: each.lock("a\0b"), "lock"),
        (lambda each: each.open("r\0"), "mode"),
        (lambda each: each.open(partition=-1), "partition"),
    ],
    ids=range(6),
)
def test_an_argument_that_no_bus_carries_is_named(
    bus: Bus, front: blocking.Client, file: Path, call: Method, key: str
) -> None:
    device = front.attach(file)
    with pytest.raises(errors.InvalidArgs, match=f"^{key}: "):
        call(device)
    assert len(bus.calls) == 1


@pytest.mark.parametrize(
    ("partition", "options"),
    [(None, {}), (0, {"partition": ("u", 0)}), (2, {"partition": ("u", 2)})],
)
def test_a_partition_can_be_opened(
    bus: Bus,
    front: blocking.Client,
    file: Path,
    partition: int | None,
    options: dict[str, tuple[str, Any]],
) -> None:
    bus.answers["Open"] = lambda: [0]
    device = front.attach(file)
    sending = OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    bus.sends = [sending]
    with device.open("rw", partition=partition) as fd:
        assert fd is sending
    mode, given = bus.bodies[-1]
    assert mode == "rw"
    assert sent(given) == options


def test_a_hold_is_the_callers_fd(bus: Bus, front: blocking.Client, file: Path) -> None:
    bus.answers["Hold"] = lambda: [0]
    device = front.attach(file)
    sending = OwnedFd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    bus.sends = [sending]
    with device.hold() as fd:
        assert fd is sending
    assert (bus.calls[-1], bus.bodies[-1]) == ((OBJECT, "Hold"), [{}])
    with pytest.raises(errors.Failed, match="did not send"):
        device.hold()


@pytest.mark.parametrize(("answer", "count"), [([0], 2), ([1], 1), ([1], 2), ([], 1)])
def test_fds_that_are_not_the_one_announced_are_closed(
    bus: Bus, front: blocking.Client, file: Path, answer: list[int], count: int
) -> None:
    bus.answers["Open"] = bus.answers["Hold"] = lambda: answer
    device = front.attach(file)
    for get in (device.open, device.hold):
        sent = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]
        bus.sends = [OwnedFd(fd) for fd in sent]
        with pytest.raises(errors.Failed, match="did not send"):
            get()
        for fd in sent:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


@pytest.mark.parametrize("attaches", [True, False])
def test_fds_in_an_answer_that_has_none_are_closed(
    bus: Bus, front: blocking.Client, file: Path, attaches: bool
) -> None:
    device = front.attach(file)
    bus.answers["Sync"] = list
    sent = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    bus.sends = [OwnedFd(sent)]
    if attaches:
        front.attach(file)
    else:
        device.sync()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sent)


def test_what_the_bus_is_too_full_for_is_sent_again(
    bus: Bus, front: blocking.Client, file: Path
) -> None:
    refusals = 7

    def answer() -> list[Any]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise errors.RefusedByBus("full")
        return [OBJECT, "/dev/loop3", 41]

    bus.answers["Attach"] = answer
    assert front.attach(file).node == "/dev/loop3"
    assert [member for _, member in bus.calls] == ["Attach"] * 8
    assert [each.st_ino for each in bus.passed] == [file.stat().st_ino] * 8


def test_what_the_bus_stays_too_full_for_is_told(
    bus: Bus, front: blocking.Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_PAUSES", (0.0,) * 3)
    bus.answers["Attach"] = lambda: raises(errors.RefusedByBus("full"))
    with pytest.raises(errors.LimitsExceeded, match="full"):
        front.attach(file)
    assert len(bus.calls) == 4


def test_what_loopd_refuses_is_not_sent_again(bus: Bus, front: blocking.Client, file: Path) -> None:
    bus.answers["Attach"] = lambda: raises(errors.LimitsExceeded("your limit"))
    with pytest.raises(errors.LimitsExceeded, match="your limit"):
        front.attach(file)
    assert len(bus.calls) == 1


def raises(error: Exception) -> list[Any]:
    raise error


def test_what_an_fd_names_is_resized(bus: Bus, front: blocking.Client, file: Path) -> None:
    bus.answers["Resize"] = lambda: [2048]
    with file.open("rb") as opened:
        assert front.resize_by_fd(opened, size_limit=2048) == 2048
        assert front.resize_by_fd(opened.fileno(), offset=0, force=True, allow_overlap=True) == 2048
        assert [each.st_ino for each in bus.passed] == [os.fstat(opened.fileno()).st_ino] * 2
    assert bus.calls == [(PATH, "Resize")] * 2
    assert [sent(options) for _, options in bus.bodies] == [
        {"size-limit": ("t", 2048)},
        {"offset": ("t", 0), "force": ("b", True), "allow-overlap": ("b", True)},
    ]


def test_resizing_by_an_fd_leaves_none_behind(bus: Bus, front: blocking.Client, file: Path) -> None:
    with file.open("rb") as opened:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(errors.InvalidArgs, match=r"^size-limit: "):
            front.resize_by_fd(opened, size_limit=-1)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["Client", "Device"])
def test_both_fronts_have_the_same_methods_and_arguments(name: str) -> None:
    def methods(cls: type) -> dict[str, list[tuple[object, ...]]]:
        return {
            method: [
                (each.name, each.kind, each.default)
                for each in inspect.signature(function).parameters.values()
            ]
            for method, function in inspect.getmembers(cls, inspect.isfunction)
            if not method.startswith("_") and method not in ("attach", "ensure_detached")
        }

    assert methods(getattr(blocking, name)) == methods(getattr(client, name))
