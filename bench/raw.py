# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel by itself: what ioctls in a row cost, without locks, checks or anybody to ask."""

import errno
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loopd.fd import OwnedFd
from loopd.loop import kernel, uapi

REMOVERS = 16
_PATIENCE = 60.0
_SYS_BLOCK = Path("/sys/block")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A device, and which binding of which incarnation of it is meant."""

    number: int
    binding: int | None
    node: int

    @classmethod
    def now(cls, number: int) -> "Bound":
        """As it is now."""
        return cls(number=number, binding=kernel.loop_binding(number), node=_incarnation(number))


def attach(control: int, file: int) -> tuple[int, int]:
    """Bind a file, with autoclear; the number, and an fd that keeps it."""
    config = uapi.loop_config(fd=file, block_size=512)
    config.info.lo_flags = uapi.LO_FLAGS_AUTOCLEAR
    while True:
        number = kernel.loop_ctl_get_free(control)
        try:
            loop = kernel.open_loop(number, os.O_RDWR)
        except OSError as exc:
            if exc.errno not in (errno.ENXIO, errno.ENOENT):
                raise
            continue  # removed since
        try:
            kernel.loop_configure(loop, config)
        except OSError as exc:
            os.close(loop)
            if exc.errno != errno.EBUSY:
                raise
            continue  # somebody was faster
        return number, loop


def detach(loop: int) -> None:
    """Let go of it."""
    kernel.loop_clr_fd(loop)
    os.close(loop)


@contextmanager
def opened(image: Path) -> Iterator[tuple[int, int]]:
    """loop-control and an image, both open."""
    with (
        OwnedFd(kernel.open_loop_control()) as control,
        OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as file,
    ):
        yield control.fileno(), file.fileno()


def pair(image: Path) -> tuple[float, float]:
    """Seconds to attach and to detach once."""
    with opened(image) as (control, file):
        begun = time.perf_counter()
        _, loop = attach(control, file)
        attached = time.perf_counter()
        detach(loop)
        return attached - begun, time.perf_counter() - attached


@dataclass(frozen=True, kw_only=True)
class Many:
    """Seconds for so many devices at once."""

    attach: float
    unbind: float
    remove: float


def many(image: Path, count: int, *, sync: bool = False) -> Many:
    """Attach one after the other, unbind one after the other, remove by sixteen threads.

    With `sync` each is written back before it is unbound, as systemd does.
    """
    with opened(image) as (control, file):
        begun = time.perf_counter()
        made = [attach(control, file) for _ in range(count)]
        attached = time.perf_counter()
        bound = [Bound.now(number) for number, _ in made]
        clearing = time.perf_counter()
        for _, loop in made:
            if sync:
                kernel.fsync(loop)
            detach(loop)
        wait_unbound(bound)
        unbound = time.perf_counter()
        remove_all(bound)
        removed = time.perf_counter()
    return Many(attach=attached - begun, unbind=unbound - clearing, remove=removed - unbound)


def remove_all(devices: Iterable[Bound]) -> None:
    """Remove devices, sixteen at a time."""
    with ThreadPoolExecutor(REMOVERS) as pool:
        list(pool.map(remove, devices))


def remove(device: Bound) -> None:
    """Remove a device, unless somebody has it by now."""
    with OwnedFd(kernel.open_loop_control()) as control, suppress(OSError):
        kernel.loop_ctl_remove(control.fileno(), device.number)


def wait_unbound(devices: Iterable[Bound]) -> None:
    """Return when the kernel has let go of all of them."""
    end = time.monotonic() + _PATIENCE
    for each in devices:
        while kernel.loop_binding(each.number) == each.binding:
            assert time.monotonic() < end, f"loop{each.number} stays bound"
            time.sleep(0.0005)


def wait_removed(devices: Iterable[Bound]) -> None:
    """Return when none of them is there."""
    end = time.monotonic() + _PATIENCE
    for each in devices:
        while _incarnation(each.number) == each.node:
            assert time.monotonic() < end, f"loop{each.number} is not removed"
            time.sleep(0.0005)


def _incarnation(number: int) -> int:
    """Which of the devices it is that have had the number; 0 for none."""
    try:
        return (_SYS_BLOCK / f"loop{number}").stat().st_ino
    except FileNotFoundError:
        return 0
