# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user who puts a hanging file behind a device of its own has only itself to wait for.

Whoever has an fd on a read-only device can swap the file behind it (LOOP_CHANGE_FD), for one on a
FUSE filesystem whose server answers nothing.  Then whatever asks the device may wait for ever.
"""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pytest

from loopd.loop import kernel
from tests.harness import loops
from tests.harness.caller import DEVICE, Attached, Call, Caller
from tests.harness.deadline import Deadline
from tests.harness.fuse import Fuse
from tests.harness.images import MIB
from tests.harness.polkit import rules_allowing
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World, make_world

LOOP_CHANGE_FD = 0x4C06
AT_ONCE = 5.0
"""Seconds that a busy machine may take for what takes some milliseconds."""


RULES = rules_allowing(
    "org.example.loop1.attach",
    "org.example.loop1.open-read-only-device",
    users=(USER, OTHER, "mail"),
)


@pytest.fixture
def world() -> Iterator[World]:
    """One of the test's own: it may be left with threads that hang until the file goes on."""
    with make_world(authority=RULES) as made, made.test() as testing:
        yield testing


@dataclass
class Hanging:
    """A device over a file that answers nothing, and its owner."""

    owner: Caller
    attached: Attached
    fd: int
    calls: list[Call]

    def begin(self, member: str, signature: str, *args: object) -> None:
        """Call a method, whose answer nobody expects for now."""
        self.calls.append(
            self.owner.call_begin(self.attached.path, DEVICE, member, signature, *args)
        )


@contextmanager
def stopping(fuse: Fuse) -> Iterator[None]:
    """Whoever asks the filesystem for anything from now on waits until the end of the block."""
    fuse.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        fuse.process.signal(signal.SIGCONT)


def swap_file(owner: Caller, attached: Attached, fuse: Fuse) -> int:
    """Put the file of the filesystem behind a device; return an fd on it that the owner got."""
    opened = owner.open_device(attached.path, "r")
    fd = opened.fetch()
    opened.close()
    file = os.open(fuse.file, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.ioctl(fd, LOOP_CHANGE_FD, file)
    os.close(file)
    return fd


@contextmanager
def reading(fd: int, attached: Attached) -> Iterator[subprocess.Popen[bytes]]:
    """Have a read under way."""
    with subprocess.Popen(
        ["dd", "of=/dev/null", "bs=4096", "count=1", "skip=100"],
        stdin=fd,
        stderr=subprocess.DEVNULL,
    ) as reader:
        wait_in_flight(attached)
        yield reader


@contextmanager
def hanging_device(world: World) -> Iterator[Hanging]:
    """Have a device whose file hangs, with a read under way; all goes on at the end."""
    owner = world.caller()
    attached = owner.attach(world.image(), "r")
    with Fuse() as fuse:
        fd = swap_file(owner, attached, fuse)
        try:
            hanging = Hanging(owner, attached, fd, [])
            with ExitStack() as stack:
                stack.enter_context(stopping(fuse))
                stack.enter_context(reading(fd, attached))
                stack.callback(fuse.process.signal, signal.SIGCONT)  # the reader is waited for
                yield hanging
            for call in hanging.calls:
                with suppress(CallError):
                    call.end()
        finally:
            os.close(fd)


def wait_in_flight(attached: Attached) -> None:
    """Wait until the device has a read under way; sysfs tells when somebody looks."""
    deadline = Deadline()
    while kernel.loop_attribute(attached.number, "inflight").split()[0] == b"0":
        assert deadline.remaining


def serves(world: World, victim: Caller, user: str = OTHER) -> None:
    """Fail unless another user is served at once, from attach to detach."""
    attached = victim.attach_begin(world.image(owner=user)).end(AT_ONCE)
    path = attached[0]
    loops.used_numbers.add(int(attached[1].removeprefix("/dev/loop")))
    for member, signature, *args in (
        ("SetReference", "sa{sv}", "name", {}),
        ("Resize", "a{sv}", {}),
        ("Sync", "a{sv}", {}),
        ("Lock", "sa{sv}", "shared", {}),
    ):
        victim.call_begin(path, DEVICE, member, signature, *args).end(AT_ONCE)
    assert victim.call_begin(path, DEVICE, "Detach", "a{sv}", {}).end(AT_ONCE) == (True,)


def test_looking_at_a_device_whose_settings_hang_stops_nobody(world: World) -> None:
    """LOOP_CHANGE_FD, Hanging files."""
    victim = world.caller(OTHER)
    serves(world, victim)
    with hanging_device(world) as hanging:
        # This waits for the read, and whoever asks sysfs for the sector size waits for it.
        hanging.begin("SetSectorSize", "ua{sv}", 4096, {})
        for _ in range(12):
            hanging.calls.append(hanging.owner.attach_begin(hanging.fd))
        serves(world, victim)


def test_detaching_a_device_that_hangs_over_and_over_stops_nobody(world: World) -> None:
    """Hanging files."""
    victim = world.caller(OTHER)
    with hanging_device(world) as hanging:
        hanging.begin("SetSectorSize", "ua{sv}", 4096, {})
        others = [world.caller() for _ in range(4)]
        hanging.calls += [
            other.call_begin(hanging.attached.path, DEVICE, "Detach", "a{sv}", {})
            for other in others
            for _ in range(16)
        ]
        serves(world, victim)


def test_operations_that_hang_are_given_up_and_stop_only_their_own_user(world: World) -> None:
    """Hanging files."""
    victim = world.caller(OTHER)
    with hanging_device(world) as hanging:
        for _ in range(14):
            hanging.begin("Resize", "a{sv}", {})
        serves(world, victim)
    assert hanging.owner.get(hanging.attached.path, "Size") == MIB


def test_a_number_whose_device_hangs_is_refused_without_a_touch(world: World) -> None:
    """Hanging files: nobody opens it, while holding the lock that every allocation on the machine
    wants.
    """
    root, victim = world.caller(None), world.caller(OTHER)
    with hanging_device(world) as hanging:
        hanging.begin("SetSectorSize", "ua{sv}", 4096, {})
        for _ in range(3):
            with pytest.raises(CallError, match="DeviceBusy"):
                root.attach_begin(world.image(), number=hanging.attached.number).end(AT_ONCE)
        serves(world, victim)


IMPATIENT = "from loopd.daemon import lifecycle; lifecycle.STOP_TIMEOUT = 0.5"
"""A stop waits for 5 s otherwise, three times."""


def test_loopd_can_be_stopped_while_a_device_hangs() -> None:
    """Hanging files."""
    with make_world(authority=RULES, prelude=IMPATIENT) as world, world.test():
        with hanging_device(world) as hanging:
            hanging.begin("Resize", "a{sv}", {})
            hanging.begin("SetSectorSize", "ua{sv}", 4096, {})
            serves(world, world.caller(OTHER))
            assert world.daemon.terminate() == 0
        loops.wait_unbound(hanging.attached.number, hanging.attached.diskseq)


def test_many_devices_that_hang_when_they_are_detached_stop_nobody(world: World) -> None:
    """Hanging files: as many as two users may have, and more than there are threads for one kind of
    work.
    """
    victim = world.caller("mail")
    with ExitStack() as stack, Fuse() as fuse:
        owners = [world.caller(USER), world.caller(OTHER)]
        fds = {}
        for owner, user in zip(owners, (USER, OTHER), strict=True):
            for _ in range(32):
                attached = owner.attach(world.image(owner=user), "r")
                fds[swap_file(owner, attached, fuse)] = attached
        with stopping(fuse):
            for fd, attached in fds.items():
                # Whoever reads is killed, and the read goes on without it.
                stack.enter_context(reading(fd, attached)).kill()
                os.close(fd)
            for owner in owners:
                owner.kill()
            serves(world, victim, "mail")
    for attached in fds.values():
        loops.wait_unbound(attached.number, attached.diskseq)
