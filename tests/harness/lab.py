# SPDX-License-Identifier: LGPL-2.1-or-later
"""One kernel, scripted or real, and what a test does to it through loopd.loop.

Whatever was opened or attached is let go of at the end, and then nothing may be bound, claimed or
open that was not before.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from loopd.fd import OwnedFd
from loopd.loop import attach as loop_attach
from loopd.loop import backing_file, block_device, kernel, loop_device
from loopd.loop.configure import Driver
from loopd.loop.loop_device import LoopDevice
from loopd.loop.request import AttachRequest
from loopd.loop.uapi import loop_config
from tests.harness import images, loops
from tests.harness.deadline import Deadline
from tests.harness.script import Script
from tests.harness.scripted import ScriptedKernel, Traits

MIB = images.MIB


class Lab:
    """A kernel to attach files to; `scripted` is None where it is the real one."""

    def __init__(self, directory: Path, scripted: ScriptedKernel | None, script: Script) -> None:
        self.directory = directory
        self.scripted = scripted
        self.script = script
        self.driver = Driver()
        self.claims: list[int] = []
        """The numbers that are claimed now."""
        self.pauses: list[float] = []
        """What scripted attempts paused between each other, which took no time."""
        self._devices: list[LoopDevice] = []
        self._opened: list[OwnedFd] = []
        self._foreign: list[int] = []
        self._files = 0

    # --- files

    def path(self) -> Path:
        """Return the name of a new file."""
        self._files += 1
        return self.directory / f"image{self._files}"

    def image(self, size: int = MIB) -> Path:
        """Return a new patterned file."""
        return images.make_plain(self.path(), size)

    def sparse(self, size: int) -> Path:
        """Return a new file that is one hole."""
        return images.make_sparse(self.path(), size)

    def gpt(self, parts: Sequence[tuple[int, int]] = ((2048, 2048), (4096, 2048))) -> Path:
        """Return a new image with a GPT for sectors of 512 bytes."""
        return images.make_gpt(self.path(), parts)

    # --- devices of ours

    def attach(self, path: Path, flags: int = os.O_RDWR, **request: Any) -> LoopDevice:
        """Attach a file as loopd does; `request` is that of AttachRequest."""
        if flags & os.O_ACCMODE == os.O_RDONLY:
            request.setdefault("read_only", True)
        with OwnedFd(os.open(path, flags | os.O_CLOEXEC)) as file:
            examined = backing_file.examine(file.fileno())
            return self.attach_fd(file.move(), examined, **request)

    def attach_fd(
        self,
        file: OwnedFd,
        examined: backing_file.BackingFile,
        *,
        numbers: loop_attach.Numbers = loop_attach.ANY,
        **request: Any,
    ) -> LoopDevice:
        """Attach what an fd is open on, and take the fd over."""
        device = loop_attach.attach(
            file,
            examined,
            AttachRequest(**request),
            self._claim,
            numbers=numbers,
            driver=self.driver,
        )
        self._devices.append(device)
        return device

    def _claim(self, number: int) -> Callable[[bool], None]:
        self.claims.append(number)
        loops.used_numbers.add(number)
        return lambda _: self.claims.remove(number)

    def detach(self, device: LoopDevice) -> None:
        """Detach a device that nobody but udev may have open, and wait until it is unbound."""
        cleared = loop_device.detach(device)
        if not cleared:
            device.close()
        self.wait_unbound(device)
        self.forget(device)

    def clear_at_last(self, device: LoopDevice) -> None:
        """Detach a device that nobody has open any more, but for udev and its glances."""
        deadline = Deadline()
        while not loop_device.detach(device):
            assert deadline.remaining, f"{device.node} stays open"
        self.wait_unbound(device)

    def forget(self, device: LoopDevice) -> None:
        """Leave a device that the kernel has let go of to nobody."""
        device.release(None)
        self._devices.remove(device)

    def wait_unbound(self, device: LoopDevice) -> None:
        """Wait until the kernel has let go of the file."""
        self.wait_cleared(device.number, device.binding)

    def wait_cleared(self, number: int, binding: int | None) -> None:
        """Wait until a number has this binding no more."""
        if self.scripted:
            assert kernel.loop_binding(number) != binding
            return
        with loops.Uevents() as events:
            events.wait_until(
                lambda: kernel.loop_binding(number) != binding, f"loop{number} to be unbound"
            )

    # --- others

    def open(self, number: int, flags: int = os.O_RDONLY, partition: int | None = None) -> OwnedFd:
        """Be somebody else who has the device open."""
        if partition is None:
            fd = block_device.opened(kernel.open_loop(number, flags))
        else:
            fd = block_device.opened(kernel.open_partition(number, partition, flags))
        self._opened.append(fd)
        return fd

    def foreign(self, path: Path, offset: int = 0, *, wanted: int | None = None) -> int:
        """Be losetup: attach a file for ever, and keep nothing open; returns the number."""
        config = loop_config(block_size=512)
        config.info.lo_offset = offset
        with (
            OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as file,
            block_device.opened(kernel.open_loop_control()) as control,
        ):
            config.fd = file.fileno()
            while True:
                number = kernel.loop_ctl_get_free(control.fileno()) if wanted is None else wanted
                with block_device.opened(kernel.open_loop(number, os.O_RDWR)) as fd:
                    try:
                        kernel.loop_configure(fd.fileno(), config)
                    except OSError as exc:
                        if exc.errno != errno.EBUSY:
                            raise
                        wanted = None
                        continue
                break
        loops.used_numbers.add(number)
        self._foreign.append(number)
        return number

    def clear(self, number: int) -> None:
        """Be `losetup -d`."""
        with block_device.opened(kernel.open_loop(number, os.O_RDONLY)) as fd:
            kernel.loop_clr_fd(fd.fileno())
        if number in self._foreign:
            self._foreign.remove(number)

    def bound(self) -> list[int]:
        """Return the numbers of what is bound to files of this lab."""
        if self.scripted:
            return self.scripted.bound()
        return sorted(
            loop.number
            for loop in loops.bound_loops().values()
            if loop.backing_file.startswith(f"{self.directory}/")
        )

    def require_bound(self, numbers: list[int]) -> None:
        """Fail unless exactly these are bound; udev may need a moment to let go of a device."""
        if self.scripted or self.bound() == numbers:
            assert self.bound() == numbers
            return
        with loops.Uevents() as events:
            events.wait_until(lambda: self.bound() == numbers, f"only {numbers} to be bound")

    # --- the end

    def close(self) -> None:
        """Let go of everything."""
        self.script.clear()
        for fd in self._opened:
            fd.close()
        for device in list(self._devices):
            self.end(device)
        for number in list(self._foreign):
            binding = kernel.loop_binding(number)
            self.clear(number)
            self.wait_cleared(number, binding)

    def end(self, device: LoopDevice) -> None:
        """Detach a device, whatever has become of it."""
        self.clear_at_last(device)
        self.forget(device)


@contextmanager
def lab(directory: Path, traits: Traits | None = None, *, real: bool = False) -> Iterator[Lab]:
    """A lab in a directory, on a scripted kernel of these traits or on the real one."""
    before = set(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        scripted = None if real else ScriptedKernel(traits)
        script = Script()
        made = Lab(directory, scripted, script)
        if scripted:
            stack.enter_context(scripted.installed())
            stack.enter_context(mock.patch.object(time, "sleep", made.pauses.append))
        stack.enter_context(script.running())
        yield made
        made.close()
        made.require_bound([])
        assert made.claims == [], "left claimed"
        if scripted:
            assert scripted.open_fds() == [], "left open"
    assert set(os.listdir("/proc/self/fd")) <= before, "left open"
