# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real udisksd on a private bus, whose mounts nobody else sees."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.bus import PrivateBus
from tests.harness.caller import PROPERTIES, Caller
from tests.harness.deadline import Deadline
from tests.harness.process import Process

UDISKSD = Path("/usr/libexec/udisks2/udisksd")
POLICY = Path("/usr/share/dbus-1/system.d/org.freedesktop.UDisks2.conf")
NAME = "org.freedesktop.UDisks2"

# What it keeps, and where it mounts.
_PRIVATE = ("/run", "/var/lib/udisks2", "/media")


class Udisks:
    """A udisksd that runs until the end of the `with` block; a udevd has to be there."""

    def __init__(self, bus: PrivateBus) -> None:
        """Prepare one on a bus that has its POLICY."""
        self._bus = bus
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        # Of /run it is shown what udev says.
        mounts = ["mkdir -p /var/lib/udisks2", "exec 3</run/udev"]
        mounts += [f"mount -t tmpfs -o mode=755 none {each}" for each in _PRIVATE]
        mounts += ["mkdir /run/udev", "mount --bind /proc/self/fd/3 /run/udev", "exec 3<&-"]
        script = "\n".join([*mounts, f"exec {UDISKSD}"])
        with ExitStack() as stack:
            self.process = stack.enter_context(
                Process(
                    [
                        *("unshare", "--mount", "--propagation", "private", "--"),
                        *("sh", "-euc", script),
                    ],
                    name="udisksd",
                    environment={"DBUS_SYSTEM_BUS_ADDRESS": self._bus.address},
                )
            )
            self._bus.wait_owned(NAME, process=self.process)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def mounts(self) -> dict[str, tuple[str, set[str]]]:
        """Return what is mounted by device node: where, and with which options."""
        found = {}
        for line in Path(f"/proc/{self.process.pid}/mounts").read_text().splitlines():
            node, where, _, options, *_ = line.split(" ")
            found[node] = (where, set(options.split(",")))
        return found

    def mounts_of(self, device: int) -> list[tuple[str, set[str]]]:
        """Return where a device of this number is mounted, and with which options."""
        number = f"{os.major(device)}:{os.minor(device)}"
        lines = Path(f"/proc/{self.process.pid}/mountinfo").read_text().splitlines()
        fields = [line.split(" ") for line in lines]
        return [(each[4], set(each[5].split(","))) for each in fields if each[2] == number]

    def wait_filesystem(self, caller: Caller, node: str) -> dict[str, Any]:
        """Wait until udisksd has seen a filesystem there; return the block device's properties."""
        path = block_path(node)
        deadline = Deadline()
        # Paced by its answers: udev has told it of the device, but it has a queue of its own.
        while True:
            try:
                call = (path, PROPERTIES, "GetAll", "s", f"{NAME}.Filesystem")
                caller.call(*call, destination=NAME)
                call = (path, PROPERTIES, "GetAll", "s", f"{NAME}.Block")
                return dict(caller.call(*call, destination=NAME)[0])
            except wire.CallError:
                if not deadline.remaining:
                    raise

    def mount(self, caller: Caller, node: str, **options: wire.Variant) -> str:
        """Mount as the caller; return where."""
        given = {"auth.no_user_interaction": wire.Variant("b", True)} | options
        return str(self._filesystem(caller, node, "Mount", given))

    def unmount(self, caller: Caller, node: str) -> None:
        """Unmount as the caller."""
        given = {"auth.no_user_interaction": wire.Variant("b", True)}
        self._filesystem(caller, node, "Unmount", given)

    def _filesystem(
        self, caller: Caller, node: str, member: str, options: dict[str, wire.Variant]
    ) -> Any:
        path = block_path(node)
        result = caller.call(path, f"{NAME}.Filesystem", member, "a{sv}", options, destination=NAME)
        return result[0] if result else None


def block_path(node: str) -> str:
    """Return the object of a device node."""
    return f"/org/freedesktop/UDisks2/block_devices/{os.path.basename(node)}"


def cover(process: Process, target: str, source: Path) -> None:
    """Have a process that has mounts of its own see another file in a place."""
    enter = ["nsenter", f"--mount=/proc/{process.pid}/ns/mnt"]
    subprocess.run([*enter, "mount", "--bind", source, target], check=True, timeout=60)
