# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.neighbour [ATTACK|LIBRARY...]`: what one hostile user costs others.

While one user (or many uids) does all it may, within the limits, another user and root ask for a
property every few milliseconds. Shown are the median and the 99th percentile of the answers in
milliseconds, also of what the bus itself answers root, the share of calls that were refused,
loopd's share of a processor, how many uevents there were a second, and how long `udevadm settle`
took, if it returned within 20 s. A machine's udevd serves them all.
"""

import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from bench import raw, rig
from bench.flood import VICTIM
from bench.results import Cell, Result, alone, median, percentile, shown
from tests.harness import images, wire
from tests.harness.area import area
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, OBJECT_MANAGER, PROPERTIES
from tests.harness.daemon import LIBRARIES, Daemon
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.raw import BUS, RawClient
from tests.harness.udev import Udev

SECONDS = 6.0
PAUSE = 0.005
DEVICES = 512
PARTITIONS = 250
SETTLE = 20
SUBORDINATE = range(100_000, 100_016)
"""Uids without any right."""
LAZY = ("nobody", "daemon", "bin", "sys", "man")
INTROSPECT = (f"{BUS}.Introspectable", "Introspect")
GET_ID = ("/org/freedesktop/DBus", BUS, "GetId")
OBJECTS = (OBJECT_MANAGER, "GetManagedObjects")


@dataclass
class Seen:
    """What a victim has seen."""

    times: list[float] = field(default_factory=list)
    of_bus: list[float] = field(default_factory=list)
    """How long the bus took for a call of its own."""
    refused: int = 0


@dataclass
class Stage:
    """Where an attack takes place."""

    bus: PrivateBus
    files: Path
    stack: ExitStack


def measure() -> Result:
    """Run each attack under each library."""
    chosen = {*sys.argv[1:]}
    result = Result(
        title="What one hostile user costs others",
        columns=[
            *("user p50", "p99", "refused", "root p50", "p99", "refused"),
            *("bus p50", "p99", "loopd CPU", "uevents/s", "settle s"),
        ],
    )
    for name, attack in ATTACKS.items():
        for library in LIBRARIES:
            if chosen & ATTACKS.keys() and name not in chosen:
                continue
            if chosen & {*LIBRARIES} and library not in chosen:
                continue
            row = result.rows[f"{name}, {library}"] = under(library, attack)
            print(f"{name}, {library}:", *map(shown, row), flush=True)
    return result


def under(library: str, attack: Callable[[Stage], None]) -> list[Cell]:
    """One row."""
    with ExitStack() as stack:
        udev = stack.enter_context(Udev())
        files = stack.enter_context(area("neighbour"))
        bus = stack.enter_context(PrivateBus(accounts=SUBORDINATE))
        rules = rules_allowing(rig.ATTACH, users=LAZY)
        stack.enter_context(RealPolkit(bus, rules))
        daemon = stack.enter_context(
            Daemon(bus, library=library, config=rig.ROOM, within=rig.AS_THE_UNIT)
        )
        attack(Stage(bus, files, stack))
        time.sleep(1.0)  # what is there to be had at once is used up, and each queue full
        before, begun, events = rig.cpu_seconds(daemon.pid), time.monotonic(), uevents()
        with process(lambda: ask(bus, VICTIM)) as user, process(lambda: ask(bus, None)) as root:
            seen = [Seen(**json.loads(each.read())) for each in (user, root)]
        taken = time.monotonic() - begun
        share = (rig.cpu_seconds(daemon.pid) - before) / taken
        rate = (uevents() - events) / taken
        begun = time.monotonic()
        try:
            udev.settle(SETTLE)
            settled: Cell = time.monotonic() - begun
        except subprocess.CalledProcessError:
            settled = "never"
        cells: list[Cell] = []
        for each in seen:
            cells += [median(each.times), percentile(each.times, 99)]
            cells += [f"{each.refused / (each.refused + len(each.times)):.0%}"]
        of_bus = seen[1].of_bus
        cells += [median(of_bus), percentile(of_bus, 99)]
        return [*cells, f"{share:.0%}", rate, settled]


def uevents() -> int:
    """How many the kernel has sent so far."""
    return int(Path("/sys/kernel/uevent_seqnum").read_text())


@contextmanager
def process(work: Callable[[], object]) -> Iterator[TextIO]:
    """Do something in a process, which is killed at the end; yield what it returns, as JSON."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "w") as out:
                json.dump(work(), out)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as result:
            yield result
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def ask(bus: PrivateBus, user: str | None) -> dict[str, object]:
    """Be a victim: each second with a connection of its own, as programs that are started."""
    seen = Seen()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        with RawClient(bus.address, user=user) as client:
            until = time.monotonic() + 1
            while (begun := time.monotonic()) < until:
                args = [MANAGER, "DeviceCount"]
                try:
                    client.call(MANAGER_PATH, PROPERTIES, "Get", "ss", args, timeout=60)
                    seen.times.append(time.monotonic() - begun)
                except wire.CallError:
                    seen.refused += 1
                begun = time.monotonic()
                client.reply(client.send(*GET_ID, destination=BUS), timeout=60)
                seen.of_bus.append(time.monotonic() - begun)
                time.sleep(PAUSE)
    return vars(seen)


# Attacks


def call(interface: str, member: str, path: str = MANAGER_PATH) -> bytes:
    """A call as it is sent."""
    return wire.build(serial=1, path=path, interface=interface, member=member, destination=LOOPD)


def numbered(message: bytes, serials: Iterator[int], count: int) -> bytes:
    """The same call so often: the bus refuses one whose serial is another's that has no answer."""
    head, tail = message[:8], message[12:]
    return b"".join(head + struct.pack("<I", next(serials)) + tail for _ in range(count))


def repeat(
    bus: PrivateBus, users: Sequence[str | int], message: bytes, connections: int, parallel: int
) -> None:
    """Have so many calls under way on each connection, for ever, without reading what they say."""
    clients = [RawClient(bus.address, user=user) for user in users for _ in range(connections)]
    sockets = {each.fileno(): socket.socket(fileno=os.dup(each.fileno())) for each in clients}
    unread = dict.fromkeys(sockets, b"")
    serials = itertools.count(1000)
    for each in clients:
        each.send_bytes(numbered(message, serials, parallel))
    poll = select.poll()
    for fd in sockets:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            data = unread[fd] + sockets[fd].recv(1 << 20)
            answers = at = 0
            while len(data) - at >= 16:
                length = wire.frame_length(data[at : at + 16])
                if len(data) - at < length:
                    break
                answers += data[at + 1] in (wire.METHOD_RETURN, wire.ERROR)
                at += length
            unread[fd] = data[at:]
            if answers:
                sockets[fd].sendall(numbered(message, serials, answers))


def nothing(stage: Stage) -> None:
    """No attack."""


def introspect(stage: Stage) -> None:
    """60 Introspect calls in flight."""
    message = call(*INTROSPECT)
    stage.stack.enter_context(process(lambda: repeat(stage.bus, ["nobody"], message, 4, 15)))


def objects(stage: Stage) -> None:
    """GetManagedObjects over and over, with 512 devices."""
    file = os.open(images.make_sparse(stage.files / "many.img", 8 << 20), os.O_RDWR)
    stage.stack.callback(os.close, file)
    clients = stage.stack.enter_context(rig.clients(stage.bus, 1))
    made = rig.attach_many(clients, file, DEVICES, rig.PARALLEL)
    stage.stack.callback(raw.wait_removed, made)
    stage.stack.callback(clients[0].close)
    message = call(*OBJECTS)
    stage.stack.enter_context(process(lambda: repeat(stage.bus, ["nobody"], message, 1, 2)))


def partitions(stage: Stage) -> None:
    """Four connections attach and detach an image of 250 partitions."""
    image = images.make_sparse(stage.files / "parts.img", 300 << 20, owner="nobody")
    table = "label: gpt\ntable-length: 256\n" + "size=64KiB\n" * PARTITIONS
    subprocess.run(["sfdisk", "-q", image], input=table, text=True, check=True)
    for _ in range(4):
        stage.stack.enter_context(process(lambda: loop(stage.bus, image)))


def loop(bus: PrivateBus, image: Path) -> None:
    """Attach and detach for ever."""
    file = os.open(image, os.O_RDWR)
    options = {"allow-overlap": wire.Variant("b", True), "partition-scan": wire.Variant("b", True)}
    with RawClient(bus.address, user="nobody") as client:
        while True:
            send = client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, options], fds=[file])
            reply = client.reply(send, timeout=60)
            if reply.type != wire.ERROR:
                client.call(reply.body[0], DEVICE, "Detach", "a{sv}", [{}], timeout=60)


def subordinate(stage: Stage) -> None:
    """Sixteen uids without a right, each with 64 calls in flight."""
    message = call(*INTROSPECT)
    users = [*SUBORDINATE]
    stage.stack.enter_context(process(lambda: repeat(stage.bus, users, message, 4, 16)))


def lazy(stage: Stage) -> None:
    """Five users, each with 64 lazy detaches of devices that stay open."""
    for user in LAZY:
        stage.stack.enter_context(process(partial(detach_lazily, stage, user)))


def detach_lazily(stage: Stage, user: str) -> None:
    """Attach one, keep it open, and detach it 64 times at a time for ever."""
    image = images.make_sparse(stage.files / f"{user}.img", 8 << 20, owner=user)
    file = os.open(image, os.O_RDWR)
    with RawClient(stage.bus.address, user=user) as client:
        reply = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[file])
        path, node, _ = reply.body
        os.open(node, os.O_RDONLY)
        message = wire.build(
            serial=1,
            path=path,
            interface=DEVICE,
            member="Detach",
            destination=LOOPD,
            signature="a{sv}",
            body=wire.marshal("a{sv}", [{"lazy": wire.Variant("b", True)}]),
        )
        repeat(stage.bus, [user], message, 4, 16)


def connections(stage: Stage) -> None:
    """120 connections that ask and do not read."""
    stage.stack.enter_context(process(lambda: ask_deaf(stage.bus)))


def ask_deaf(bus: PrivateBus) -> None:
    """Send what the bus takes, on each connection in turn."""
    clients = [RawClient(bus.address, user="nobody") for _ in range(120)]
    sockets = [socket.socket(fileno=os.dup(each.fileno())) for each in clients]
    serials = itertools.count(1000)
    unsent = dict.fromkeys(sockets, b"")
    while True:
        for each in sockets:
            data = unsent[each] or numbered(call(*INTROSPECT), serials, 16)
            with suppress(BlockingIOError):
                unsent[each] = data[each.send(data, socket.MSG_DONTWAIT) :]
        time.sleep(0.001)


ATTACKS: dict[str, Callable[[Stage], None]] = {
    "none": nothing,
    "introspect": introspect,
    "objects": objects,
    "partitions": partitions,
    "subordinate": subordinate,
    "lazy": lazy,
    "connections": connections,
}


if __name__ == "__main__":
    alone(measure)
