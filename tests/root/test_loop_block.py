# SPDX-License-Identifier: LGPL-2.1-or-later
"""After systemd's own test of its loop devices: partitions, filesystems, locks, and many at once.

With a running udevd, which looks at whatever comes, and with losetup, which takes no lock: nobody
may see an error.
"""

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd.fd import OwnedFd
from loopd.loop import attach as loop_attach
from loopd.loop import backing_file, change, kernel, loop_device, query
from loopd.loop.block_device import Lock
from loopd.loop.request import AttachRequest
from tests.harness import loops
from tests.harness.area import area
from tests.harness.caller import MANAGER, Attached, Caller
from tests.harness.images import MIB, make_gpt, make_sparse
from tests.harness.udev import Udev
from tests.harness.world import World

SIZE = 256 * MIB
PARTS = [(2048 + index * 65536, 65536) for index in range(4)] + [(2048 + 4 * 65536, 131072)]
"""Five partitions: four of 32 MiB and one of 64."""
FILESYSTEMS = {number: f"part{number}" for number in range(1, 6)}
THREADS, ROUNDS = 5, 3


@pytest.fixture(scope="module", autouse=True)
def _udevd() -> Iterator[None]:
    """A udevd runs beside all of this."""
    with Udev():
        yield


@pytest.fixture
def image(area: Path) -> Path:
    """256 MiB with a table of five partitions, for whoever can read."""
    return make_gpt(area / "image", PARTS, SIZE, sparse=True)


def attach(file_fd: int, **request: object) -> loop_device.LoopDevice:
    """Attach as the library does, from a copy of an fd."""
    file = OwnedFd(os.dup(file_fd))
    examined = backing_file.examine(file.fileno())
    device = loop_attach.attach(file, examined, AttachRequest(**request))  # type: ignore[arg-type]
    loops.used_numbers.add(device.number)
    return device


def detach(device: loop_device.LoopDevice) -> None:
    while not loop_device.detach(device):
        pass  # udev has it open for its probe
    loops.wait_unbound(device.number, device.diskseq)


def make_filesystems(node: str) -> None:
    for number, label in FILESYSTEMS.items():
        command = ["mkfs.ext4", "-q", "-F", "-L", label, "-E", "nodiscard", f"{node}p{number}"]
        environment = os.environ | {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
        subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)


def label_of(node: str) -> str:
    """Read the label of an ext4 filesystem through its node."""
    done = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", node],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@contextmanager
def mounted(node: str) -> Iterator[Path]:
    """Mount all the partitions where nobody but the mounting process sees them."""
    with area("mounts") as directory:
        script = "set -e\n"
        for number in FILESYSTEMS:
            (directory / str(number)).mkdir()
            script += f"mount -t ext4 -o ro {node}p{number} {directory}/{number}\n"
        script += "echo mounted; read -r _"
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == "mounted\n"
            yield Path(f"/proc/{holder.pid}/root{directory}")


@contextmanager
def losetup_racing(files: Path, count: int = 1) -> Iterator[None]:
    """Set up and detach loop devices by losetup all the while; none of it may fail.

    But once: the kernel names it a free device, and losetup does not try again where that is
    removed before it could open it.
    """
    stop = threading.Event()
    failures: list[str] = []

    def race(image: Path) -> None:
        while not stop.is_set():
            done = subprocess.run(
                ["losetup", "-f", "--show", image], check=False, capture_output=True, text=True
            )
            if done.returncode == 0:
                done = subprocess.run(
                    ["losetup", "-d", done.stdout.strip()],
                    check=False,
                    capture_output=True,
                    text=True,
                )
            if done.returncode:
                failures.append(done.stderr)

    threads = []
    for index in range(count):
        image = make_sparse(files / f"racing{index}", MIB)
        threads.append(threading.Thread(target=race, args=[image]))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    removed = [each for each in failures if os.strerror(errno.ENXIO) in each]
    assert len(removed) <= 1, failures
    assert failures == removed


def test_five_threads_attach_what_is_mounted_from_one_fd(image: Path) -> None:
    """The story of systemd's test, call by call."""
    file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device = attach(file, partition_scan=True, lock=Lock.EXCLUSIVE)
        told = query.status(device.number)
        assert [each.number for each in told.partitions] == [*FILESYSTEMS]
        make_filesystems(device.node)
        assert device.lock
        change.change_lock(device, device.lock, Lock.SHARED, held=Lock.EXCLUSIVE)
        with mounted(device.node):
            # Whatever is mounted cannot be scanned away any more.
            device.lock.close()

            def work(_: int) -> None:
                for _ in range(ROUNDS):
                    own = attach(
                        file,
                        read_only=True,
                        partition_scan=True,
                        lock=Lock.SHARED,
                        direct_io=False,
                    )
                    labels = {
                        each.number: label_of(f"{own.node}p{each.number}")
                        for each in kernel.loop_partitions(own.number)
                    }
                    detach(own)
                    assert labels == FILESYSTEMS

            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(work, range(THREADS)))
        detach(device)
    finally:
        os.close(file)


@pytest.mark.alone
def test_five_processes_attach_through_loopd_while_losetup_races(world: World, image: Path) -> None:
    owner = world.caller(None)
    attached = owner.attach(image, partition_scan=True, lock="exclusive")
    make_filesystems(attached.node)
    owner.device(attached.path, "Lock", "sa{sv}", "shared", {})
    with mounted(attached.node), losetup_racing(world.files, 2):
        owner.device(attached.path, "Lock", "sa{sv}", "none", {})
        callers = [world.caller(None) for _ in range(THREADS)]
        for _ in range(ROUNDS):
            calls = [
                caller.attach_begin(
                    image,
                    "r",
                    partition_scan=True,
                    lock="shared",
                    direct_io=False,
                    allow_overlap=True,
                )
                for caller in callers
            ]
            devices = [Attached(*call.end()) for call in calls]
            loops.used_numbers.update(each.number for each in devices)
            for caller, each in zip(callers, devices, strict=True):
                labels = {
                    number: label_of(node)
                    for number, node, _, _ in caller.get(each.path, "Partitions")
                }
                assert labels == FILESYSTEMS
                caller.detach(each.path)
    assert owner.detach(attached.path) in (True, False)
    loops.wait_unbound(attached.number, attached.diskseq)


CLIENTS, AT_ONCE = 16, 4
EACH = 16 if os.environ.get("LOOPD_THOROUGH") else 6


@pytest.mark.alone
def test_many_devices_of_16_clients_while_losetup_races(world: World) -> None:
    callers = [world.caller(None) for _ in range(CLIENTS)]
    images = [make_sparse(world.new_path(), MIB) for _ in range(EACH)]
    devices: list[tuple[Caller, Attached]] = []
    with losetup_racing(world.files, 2):
        for first in range(0, EACH, AT_ONCE):
            calls = [
                (caller, caller.attach_begin(file, "r"))
                for caller in callers
                for file in images[first : first + AT_ONCE]
            ]
            devices += [(caller, Attached(*call.end())) for caller, call in calls]
        loops.used_numbers.update(each.number for _, each in devices)
        assert len({each.number for _, each in devices}) == CLIENTS * EACH
        assert callers[0].get("/org/example/Loop1", "DeviceCount", MANAGER) == CLIENTS * EACH
        for _, each in devices:
            assert loops.loop_is_bound(each.number, each.diskseq)
        for caller in callers:
            caller.kill()
        for _, each in devices:
            loops.wait_unbound(each.number, each.diskseq)
    world.wait_devices(0)
