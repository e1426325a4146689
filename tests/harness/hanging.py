# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fds whose close hangs, in loopd's hands, and the newcomers who are to be served all the same.

dbus-daemon closes what it has passed on, and would hang itself on a flush; so that is kept only
when loopd alone has the fds.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopd.daemon.closes import _MAX_SLOW as MAX_SLOW
from loopd.daemon.closes import _SLOW_AT_A_TIME as SLOW_AT_A_TIME
from tests.harness import loops, wire
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.raw import RawClient
from tests.harness.world import World

CROWD = range(60_001, 60_017)
"""Uids of sixteen users."""


@contextmanager
def stopping(process: int) -> Iterator[None]:
    """Stop a process until the end of the block."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextmanager
def opened(fuse: Fuse) -> Iterator[int]:
    """An fd on the file; closing it asks the filesystem, which has to go on by then."""
    fd = fuse.open()
    try:
        yield fd
    finally:
        fuse.release()
        os.close(fd)


def wait_passed_on(world: World, fuse: Fuse) -> None:
    """Wait until dbus-daemon has closed what it has passed on."""
    deadline = Deadline()
    with world.bus.connect() as client:
        while fuse_fds(world.bus.pid, fuse):
            assert deadline.remaining, "dbus-daemon keeps a file"
            client.call_bus("GetId")


def wait_hanging(world: World, fuse: Fuse, count: int, *, users: int) -> None:
    """Wait until loopd has got so many fds of users, and is closing as many of each as it tries."""
    begun = SLOW_AT_A_TIME * users
    for _ in range(begun):
        assert fuse.wait_kept() == "FLUSH"
    # One whose close has begun is in no table any more.
    world.wait_fds(
        lambda fds: list(fds.values()).count(str(fuse.file)) >= count - begun,
        f"loopd to have {count - begun} fds",
    )


def fuse_fds(pid: int, fuse: Fuse) -> int:
    """Count the fds that a process has on the file."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found += os.readlink(f"/proc/{pid}/fd/{name}") == str(fuse.file)
        except FileNotFoundError:
            continue
    return found


def send_fds(client: RawClient, fd: int, count: int) -> None:
    """Send so many calls with an fd, of which nobody wants an answer."""
    for _ in range(count):
        arguments = (MANAGER_PATH, MANAGER, "NoSuch", "h", [0])
        client.send(*arguments, fds=[fd], flags=wire.NO_REPLY_EXPECTED)


def hang_fds(world: World, fuse: Fuse, fd: int, *users: str | int) -> None:
    """Have two connections send 30 fds each, so few that they are heard, whose closes hang.

    Of one user no more are taken when one more than may hang has been.
    """
    clients = [world.raw(user) for user in users]
    for client in clients:
        client.call(MANAGER_PATH, MANAGER, "ListDevices")
    with stopping(world.daemon.pid):
        for client in clients:
            send_fds(client, fd, 30)
        wait_passed_on(world, fuse)
        fuse.hang("FLUSH")
    count = 60 if len({*users}) > 1 else MAX_SLOW + 1
    wait_hanging(world, fuse, count, users=len({*users}))


def serve_newcomer(world: World, user: str | None, image: Path, timeout: float) -> None:
    """Fail unless the very first message of a connection gets a device by an ordinary file."""
    with world.bus.connect(user) as client, image.open("rb") as file:
        arguments = (MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}])
        answer = client.reply(client.send(*arguments, fds=[file.fileno()]), timeout)
        attached = Attached(*answer.body)
        loops.used_numbers.add(attached.number)
        client.call(attached.path, DEVICE, "Detach", "a{sv}", [{}])
