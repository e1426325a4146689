# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts about the machine's loop devices, from sysfs, and waiting for them by the kernel's uevents.

Loop devices belong to the whole machine, so everything here looks and nothing here changes, but
detach_leaked(), which takes away exactly one attachment, and set_read_only(), which undoes itself.
"""

import errno
import fcntl
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.deadline import Deadline

LOOP_CLR_FD = 0x4C01
BLKGETDISKSEQ = 0x80081280
_KERNEL_EVENTS = 1
_NETLINK_KOBJECT_UEVENT = 15
_DEVICES = "/sys/devices/virtual/block"

used_numbers: set[int] = set()
"""Numbers that the running test is known to have used, whose partitions the leak check looks at."""


@dataclass(frozen=True, kw_only=True)
class BoundLoop:
    """A loop device with a backing file."""

    number: int
    diskseq: int
    backing_file: str
    partitions: tuple[str, ...]

    @property
    def node(self) -> str:
        """Its device node."""
        return f"/dev/loop{self.number}"


def bound_loops() -> dict[int, BoundLoop]:
    """Return every bound loop device of the machine, by number."""
    found = {}
    for name in os.listdir(_DEVICES):
        # There may be a thousand that are not bound, and each test looks at them twice.
        if name.startswith("loop") and os.access(f"{_DEVICES}/{name}/loop", os.F_OK):
            number = int(name.removeprefix("loop"))
            if (loop := look_at(number)) is not None:
                found[number] = loop
    return found


def look_at(number: int) -> BoundLoop | None:
    """Return what is bound to /dev/loop`number`, None if nothing is."""
    directory = Path(f"/sys/block/loop{number}")
    try:
        # Bytes, since a backing file may have any name.
        backing_file = os.fsdecode((directory / "loop/backing_file").read_bytes().rstrip(b"\n"))
        diskseq = int((directory / "diskseq").read_text())
    except OSError as exc:
        # Unbound: no such file. Unbound, or removed, between look and read: no such device.
        # Too long for sysfs: on no file of a test that looks at all devices.
        if exc.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG):
            raise
        return None
    return BoundLoop(
        number=number,
        diskseq=diskseq,
        backing_file=backing_file,
        partitions=partitions(number),
    )


def partitions(number: int) -> tuple[str, ...]:
    """Return the kernel names of the partitions of /dev/loop`number`, bound or not."""
    try:
        names = os.listdir(f"/sys/block/loop{number}")
    except FileNotFoundError:  # the device is removed
        return ()
    return tuple(sorted(name for name in names if name.startswith(f"loop{number}p")))


def strays(number: int) -> tuple[str, ...]:
    """Return the partitions that are nobody's; those of a bound device are whose it is by now."""
    found = partitions(number)
    return () if loop_is_bound(number) else found


def loop_is_bound(number: int, diskseq: int | None = None) -> bool:
    """Say whether the number is bound (with this diskseq)."""
    loop = look_at(number)
    return loop is not None and diskseq in (None, loop.diskseq)


class Uevents:
    """The kernel's uevents from the start of a `with` block on."""

    def __enter__(self) -> Self:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
        )
        self._socket.bind((0, _KERNEL_EVENTS))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def next(self, what: str, deadline: Deadline) -> dict[str, str]:
        """Return the next uevent; an empty one says that some were lost."""
        deadline.wait_readable([self._socket.fileno()], what)
        try:
            data = self._socket.recv(1 << 16)
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise
            return {}
        _, *fields = data.decode(errors="replace").rstrip("\0").split("\0")
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_until(self, true: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Look after each event of a block device whether it is so."""
        deadline = Deadline(timeout)
        while not true():
            while self.next(what, deadline).get("SUBSYSTEM", "block") != "block":
                pass


def wait_unbound(number: int, diskseq: int | None = None, timeout: float | None = None) -> None:
    """Wait until /dev/loop`number` is unbound, or bound to something of another diskseq."""
    with Uevents() as events:
        events.wait_until(
            lambda: not loop_is_bound(number, diskseq), f"loop{number} to be unbound", timeout
        )


def losetup(file: Path | str, *options: str, timeout: float | None = None) -> str:
    """Have losetup attach a file to the first free device; return its node.

    Again where another run's loopd removes the free device before losetup has opened it, which
    losetup takes for the end.
    """
    deadline = Deadline(timeout)
    command = ["losetup", *options, "-f", "--show", str(file)]
    while True:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        gone = any(os.strerror(code) in done.stderr for code in (errno.ENXIO, errno.ENOENT))
        assert gone, done.stderr
        assert deadline.remaining, done.stderr


@contextmanager
def set_read_only(node: str) -> Iterator[None]:
    """Have a device be read-only by root's word, which outlives the binding if it is not undone."""
    subprocess.run(["blockdev", "--setro", node], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["blockdev", "--setrw", node], check=True, timeout=60)


def detach_leaked(loop: BoundLoop) -> None:
    """Detach exactly this attachment; nothing happens if the number has another by now."""
    try:
        fd = os.open(loop.node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        diskseq = int.from_bytes(fcntl.ioctl(fd, BLKGETDISKSEQ, bytes(8)), "little")
        if diskseq == loop.diskseq:
            fcntl.ioctl(fd, LOOP_CLR_FD)
    except OSError as exc:
        if exc.errno != errno.ENXIO:
            raise
    finally:
        os.close(fd)
