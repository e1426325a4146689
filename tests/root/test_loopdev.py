# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopdev on real devices, with the kernel's answers bent where it matters: all is undone."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopd import backing, kernel, loopdev, uapi
from loopd.fd import OwnedFd
from loopd.request import AttachRequest
from tests.harness import loops
from tests.harness.images import make_plain


class Claims:
    """What attach claimed, and how each claim was released."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.released: list[bool] = []

    def claim(self, number: int) -> Callable[[bool], None]:
        self.numbers.append(number)
        loops.used_numbers.add(number)
        return self.released.append


@pytest.fixture
def image(area: Path) -> Path:
    return make_plain(area / "image")


def attach(image: Path, claims: Claims, **options: Any) -> loopdev.LoopDevice:
    file = OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC))
    examined = backing.examine(file.fileno())
    return loopdev.attach(file, examined, AttachRequest(**options), claims.claim)


def detach(device: loopdev.LoopDevice) -> None:
    if not loopdev.detach(device):
        device.close()  # udev has it open
    loops.wait_unbound(device.number, device.diskseq)


def bound(image: Path) -> list[int]:
    return [n for n, loop in loops.bound_loops().items() if loop.backing_file == str(image)]


def test_who_loses_the_race_for_a_device_claims_it_no_more_and_takes_another(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure, claims, lost = kernel.loop_configure, Claims(), []

    def loses_once(loop_fd: int, config: uapi.loop_config) -> None:
        if not lost:
            lost.append(loop_fd)
            raise OSError(errno.EBUSY, "bound by somebody else")
        configure(loop_fd, config)

    monkeypatch.setattr(kernel, "loop_configure", loses_once)
    device = attach(image, claims)
    # It was not ours for a moment, whoever has it now.
    assert claims.released == [False]
    assert claims.numbers[-1] == device.number
    detach(device)


@pytest.mark.parametrize("function", ["blksszget", "blkgetdiskseq"])
def test_a_failure_after_binding_leaves_nothing_bound_claimed_or_open(
    image: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fails(fd: int) -> int:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(kernel, function, fails)
    claims, before = Claims(), set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="injected"):
        attach(image, claims)
    assert bound(image) == []
    assert len(claims.released) == len(claims.numbers) == 1
    assert set(os.listdir("/proc/self/fd")) == before


def test_direct_io_that_is_refused_is_done_without(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = kernel.loop_attribute, []
    configure = kernel.loop_configure

    def note(loop_fd: int, config: uapi.loop_config) -> None:
        asked.append(bool(config.info.lo_flags & uapi.LO_FLAGS_DIRECT_IO))
        configure(loop_fd, config)

    def refused(number: int, attribute: str) -> bytes:
        return b"0" if attribute == "loop/dio" else read(number, attribute)

    monkeypatch.setattr(kernel, "loop_configure", note)
    monkeypatch.setattr(kernel, "loop_attribute", refused)
    claims = Claims()
    device = attach(image, claims, direct_io=True)
    assert asked == [True, False]
    assert bound(image) == [device.number]
    detach(device)
