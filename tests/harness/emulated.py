# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian release under its own kernel, emulated by QEMU, since there is no KVM to count on.

Everything is slow there, by a factor that differs from minute to minute: a test judges by what it
finds, never by when.  The disk forgets everything at the end.
"""

import base64
import json
import os
import shlex
import socket
import subprocess
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.harness.area import area
from tests.harness.deadline import Deadline
from tests.harness.process import Process
from tests.harness.roots import Release

# A machine of two processors beside other work took 43 to 100 s, and once more for the second try.
_BOOT_TIMEOUT = 300.0
_COMMAND_TIMEOUT = 600.0

_HARDWARE = (
    *("-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "q35", "-smp", "2", "-m", "2048"),
    *("-nodefaults", "-display", "none", "-no-reboot", "-device", "virtio-serial"),
)
# systemd waits for a device for 90 s by itself, which is too little at times.
_KERNEL_OPTIONS = (
    "console=ttyS0 root=/dev/vda rw quiet "
    "systemd.default_device_timeout_sec=600 systemd.default_timeout_start_sec=600"
)


class FailedError(AssertionError):
    """A command in the machine failed that must not."""


class Session:
    """Somebody in the machine who runs commands one after the other, by an agent there."""

    def __init__(self, path: Path) -> None:
        """Prepare; `path` is the socket of the agent's port."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._received = b""

    def connect(self) -> None:
        """Connect to the port, whose agent need not be there yet."""
        self._socket.connect(str(self._path))

    def close(self) -> None:
        """Leave the port."""
        self._socket.close()

    def wait_ready(self, deadline: Deadline, process: Process) -> None:
        """Wait until the agent says that it is there."""
        assert self._line(deadline, process) == {}

    def result(
        self, *command: str | Path, stdin: bytes = b"", timeout: float = _COMMAND_TIMEOUT
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to whatever end; standard error goes with the output."""
        argv = [str(each) for each in command]
        # The port is slow, and images are mostly holes and patterns.
        packed = base64.b64encode(zlib.compress(stdin, 1)).decode()
        asked = {"argv": argv, "stdin": packed, "timeout": timeout}
        self._socket.sendall(json.dumps(asked).encode() + b"\n")
        # The agent keeps the time; this is for one that has died.
        told = self._line(Deadline(timeout * 2))
        output = base64.b64decode(told["output"]).decode(errors="replace")
        return subprocess.CompletedProcess(argv, told["status"], output)

    def run(
        self, *command: str | Path, stdin: bytes = b"", timeout: float = _COMMAND_TIMEOUT
    ) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.result(*command, stdin=stdin, timeout=timeout)
        if done.returncode != 0:
            raise FailedError(
                f"{shlex.join(done.args)} ended with {done.returncode}: {done.stdout}"
            )
        return done.stdout

    def shell(self, script: str) -> str:
        """Run a script of the shell's that must succeed."""
        return self.run("sh", "-ec", script)

    def python(self, script: str, *, timeout: float = _COMMAND_TIMEOUT) -> str:
        """Run a program that has loopd's package at hand, and must succeed."""
        command = ("env", "PYTHONPATH=/usr/lib/loopd", "/usr/bin/python3", "-c", script)
        return self.run(*command, timeout=timeout)

    def _line(self, deadline: Deadline, process: Process | None = None) -> Any:
        while b"\n" not in self._received:
            fds = [self._socket.fileno(), *([process.pidfd] if process else [])]
            ready = deadline.wait_readable(fds, "an answer of the machine")
            if self._socket.fileno() not in ready:
                raise ConnectionError("the machine has ended")
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("the machine has ended")
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


class Emulated(Session):
    """The machine itself, which is root's session, and that of alice, who sits at it."""

    def __init__(self, release: Release, disk: Path, root: Path) -> None:
        """Prepare; neither the disk nor the root that it was made from is written to."""
        self.release = release
        self._disk = disk
        (self._kernel,) = (root / "boot").glob("vmlinuz-*")
        (self._initrd,) = (root / "boot").glob("initrd.img-*")
        _, _, self.kernel = self._kernel.name.partition("-")
        self._exit = ExitStack()

    @property
    def version(self) -> tuple[int, int]:
        """The kernel's version."""
        major, minor, *_ = self.kernel.split(".")
        return int(major), int(minor)

    def __enter__(self) -> Self:
        try:
            self._boot()
        except (TimeoutError, ConnectionError):
            self._boot()  # once more: emulation may be too slow for a machine to come up
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _boot(self) -> None:
        with ExitStack() as stack:
            # QEMU keeps what the machine writes in TMPDIR, and that can be much.
            scratch = stack.enter_context(area("emulated", parent=Path("/var/tmp")))
            ports = {name: scratch / name for name in ("root", "alice")}
            self.console = scratch / "console"
            command: list[str | Path] = ["qemu-system-x86_64", *_HARDWARE]
            command += ["-kernel", self._kernel, "-initrd", self._initrd]
            command += ["-append", _KERNEL_OPTIONS]
            command += ["-drive", f"file={self._disk},format=raw,if=virtio,snapshot=on"]
            command += ["-serial", f"file:{self.console}"]
            for name, path in ports.items():
                command += ["-chardev", f"socket,id={name},path={path},server=on,wait=off"]
                command += ["-device", f"virtserialport,chardev={name},name={name}"]
            ended = stack.enter_context(
                Process(command, name="qemu", environment={"TMPDIR": str(scratch)})
            )
            deadline = Deadline(_BOOT_TIMEOUT)
            super().__init__(ports["root"])
            self.alice = Session(ports["alice"])
            for session in (self, self.alice):
                _connect(session, deadline, ended)
                stack.callback(session.close)
            self.wait_ready(deadline, ended)
            self.run("systemctl", "start", "alice")
            self.alice.wait_ready(deadline, ended)
            self._exit = stack.pop_all()

    def write(self, path: str, data: bytes, *, owner: str = "root") -> str:
        """Make a file in the machine; return its path there."""
        self.run(
            "install", "-D", "-o", owner, "-g", owner, "-m", "644", "/dev/stdin", path, stdin=data
        )
        return path

    def image(self, file: Path, *, owner: str = "alice") -> str:
        """Copy an image into the machine; return its path there."""
        return self.write(f"/home/{owner}/{file.name}", file.read_bytes(), owner=owner)


def disk(root: Path) -> Path:
    """The root of a release as the image of a disk, made now if there is none."""
    image = root.with_name(f"{root.name}.img")
    if not image.exists():
        unfinished = root.with_name(f"{root.name}.img.{os.getpid()}")
        command = [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-E",
            "nodiscard",
            "-d",
            root,
            unfinished,
            "2G",
        ]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        unfinished.rename(image)
    return image


def _connect(session: Session, deadline: Deadline, process: Process) -> None:
    while True:
        try:
            session.connect()
        except (FileNotFoundError, ConnectionRefusedError):
            if process.status is not None or not deadline.remaining:
                raise ConnectionError(f"QEMU does not start: {process.log.text}") from None
            os.sched_yield()
        else:
            return


__all__: Sequence[str] = ("Emulated", "FailedError", "Session", "disk")
