# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the measurements share: a loopd with a real polkitd, programs that call it, and devices."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.raw import Bound
from tests.harness import images, wire
from tests.harness.area import TOKEN, area
from tests.harness.bus import PrivateBus
from tests.harness.caller import MANAGER, MANAGER_PATH, PROPERTIES
from tests.harness.daemon import Daemon
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.raw import RawClient

USER = "nobody"
ATTACH = "org.example.loop1.attach"
ROOM = "[limits]\ndevices_per_user = 600\nquestions_per_user = 16\n"
"""Settings for a user who has many, from many programs at a time."""
AS_THE_UNIT = ("chrt", "--reset-on-fork", "--other", "0", "nice", "--adjustment=-10")
"""The priority that loopd.service gives to the event loop alone."""
PARALLEL = 16
"""Calls that a connection may have under way."""

_MEMORY = "/dev/shm"  # noqa: S108 - only root makes anything of what is there
_WORKER = Path(__file__).with_name("worker_program.py")
# An ordinary user may not be able to enter the checkout; Debian's Python has all it needs.
PYTHON = getattr(sys, "_base_executable", sys.executable)


@contextmanager
def image(size: int = 8 << 20) -> Iterator[Path]:
    """A file of the user's."""
    with area("bench") as directory:
        yield images.make_sparse(directory / "disk.img", size, owner=USER)


@contextmanager
def running(library: str, config: str = "") -> Iterator[tuple[PrivateBus, Daemon]]:
    """A loopd on a bus with a polkitd that lets the user attach."""
    with (
        PrivateBus() as bus,
        RealPolkit(bus, rules_allowing(ATTACH, users=(USER,))),
        runtime_directory() as directory,
        Daemon(
            bus, library=library, config=config, runtime_directory=directory, within=AS_THE_UNIT
        ) as daemon,
    ):
        yield bus, daemon


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """A directory in memory, as /run is on a system."""
    with tempfile.TemporaryDirectory(prefix=TOKEN, dir=_MEMORY) as directory:
        yield Path(directory) / "run"


class Worker:
    """A program that uses Gio, see worker_program."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def do(self, *what: str | int) -> Any:
        """Have it call a function of its own."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def pairs(self, count: int, way: str = "loopd") -> list[tuple[float, float]]:
        """Seconds to attach and to detach, so many times."""
        return [(attach, detach) for attach, detach in self.do("pairs", way, count)]


@contextmanager
def worker(bus: PrivateBus, image: Path, user: str | None = None) -> Iterator[Worker]:
    """Such a program of a user's, or of root's."""
    command = [PYTHON, "-I", "-c", _WORKER.read_text(), bus.address, str(image)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, user=user, cwd="/"
    ) as process:
        yield Worker(process)


Send = Callable[[RawClient], object]
"""Sends a call."""


def attach_many(clients: Sequence[RawClient], file: int, count: int, parallel: int) -> list[Bound]:
    """Attach a file so often in all; each connection has so many calls under way."""
    # The same bytes of a file many times over: that they do not meet is not checked.
    options = {"allow-overlap": wire.Variant("b", True)}

    def send(client: RawClient) -> None:
        client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, options], fds=[file])

    nodes = [node for _, node, _ in call_many(clients, send, count, parallel)]
    return [Bound.now(int(node.removeprefix("/dev/loop"))) for node in nodes]


def call_many(
    clients: Sequence[RawClient], send: Send, count: int, parallel: int = 1
) -> list[list[Any]]:
    """Call so often in all, and return the answers; each has so many calls under way."""
    found: list[list[Any]] = []
    begun = 0
    by_fd = {client.fileno(): client for client in clients}
    poll = select.poll()
    for client in clients:
        poll.register(client.fileno(), select.POLLIN)

    def begin(client: RawClient) -> None:
        nonlocal begun
        if begun < count:
            begun += 1
            send(client)

    for client in list(clients) * parallel:
        begin(client)
    while len(found) < count:
        for fd, _ in poll.poll(60_000):
            client = by_fd[fd]
            client.received.append(client.receive())
            for message in client.drain():
                if message.type == wire.SIGNAL:
                    continue
                assert message.type == wire.METHOD_RETURN, message
                found.append(message.body)
                begin(client)
    return found


@contextmanager
def clients(bus: PrivateBus, count: int, user: str | None = None) -> Iterator[list[RawClient]]:
    """So many connections."""
    with ExitStack() as stack:
        yield [stack.enter_context(bus.connect(user)) for _ in range(count)]


def call_often(client: RawClient, count: int) -> None:
    """Ask for a property so often, as many calls at a time as there may be."""
    waiting: deque[int] = deque()
    for _ in range(count):
        if len(waiting) == PARALLEL:
            client.reply(waiting.popleft())
        serial = client.send(MANAGER_PATH, PROPERTIES, "Get", "ss", [MANAGER, "DeviceCount"])
        waiting.append(serial)
    for serial in waiting:
        client.reply(serial)


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def switches(pid: int) -> int:
    """How often threads of a process have gone to sleep so far, and so have woken up."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                found += int(line.split()[1])
    return found
