# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian root, booted by systemd-nspawn: its own systemd, bus, logind, udevd and polkitd.

Loop devices have no namespaces: what is attached in there is a device of this machine, whose nodes
it shares.  The root's file system forgets everything; only `files` is a directory of this
machine's, which has the same path in there.
"""

import itertools
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import MACHINES_PREFIX, TOKEN, area
from tests.harness.deadline import Deadline
from tests.harness.images import make_gpt
from tests.harness.process import Process
from tests.harness.roots import USERS, Release

BOOT_TIMEOUT = 60.0

_numbers = itertools.count(1)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# A cgroup of its own, since two machines in one would end each other's units; and mounts that go
# with the last process.
_START = """
set -e
echo $$ >"$1/cgroup.procs"
mount -t tmpfs -o mode=755 tmpfs "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$3,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
directory=$2/root
shift 3
exec systemd-nspawn --directory="$directory" "$@"
"""

# Without these nspawn keeps from a machine what its systemd needs to put its units into sandboxes,
# and the units would run without.
_ENVIRONMENT = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
_SYSCALLS = "bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self"
_OPTIONS = (
    *("--boot", "--quiet", "--register=no", "--keep-unit", "--notify-ready=yes"),
    *("--private-network", "--resolv-conf=off", "--timezone=off", "--link-journal=no"),
    *("--bind=/dev/loop-control", "--capability=all", f"--system-call-filter={_SYSCALLS}"),
    "--console=read-only",
)

# The nodes of loop devices come from this machine's kernel, and udev's events from its own udevd,
# which runs only where /sys can be written to.
_SET_UP = """
mount -t devtmpfs dev /dev
mount -o remount,rw /sys
systemctl start systemd-udevd
"""


# logind and others look for those who call them in the machine's cgroups.
_ENTER = 'echo $$ >"$1" && shift && exec "$@"'


class FailedError(AssertionError):
    """A program in the machine failed that must not."""


class Machine:
    """A release of Debian, running until the end of the `with` block."""

    def __init__(self, release: Release, root: Path) -> None:
        """Prepare; `root` is not written to."""
        self.release = release
        self._root = root
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            name = f"{TOKEN}{self.release.name}-{next(_numbers)}"
            self.files = stack.enter_context(area("machine", parent=MACHINES_PREFIX.parent))
            scratch = stack.enter_context(area(self.release.name))
            self._cgroup = stack.enter_context(_cgroup(name))
            # Not below what it mounts there.
            (scratch / "machine").mkdir()
            command = [
                *("unshare", "--mount", "--propagation=private", "--"),
                *("sh", "-c", _START, "sh", self._cgroup, scratch / "machine", self._root),
                *_OPTIONS,
                f"--machine={name}",
                f"--bind={self.files}",
                # The console would be this machine's.
                *("systemd.show_status=0", "systemd.log_target=journal"),
            ]
            # Closed in the end, since systemd waits until somebody reads what it says of reloads.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.bind(str(scratch / "notify"))
                environment = _ENVIRONMENT | {"NOTIFY_SOCKET": str(scratch / "notify")}
                nspawn = stack.enter_context(Process(command, name=name, environment=environment))
                # In good order it would first wait for all of this machine's disks.
                stack.callback(_kill, self._cgroup)
                self.leader = self._wait_ready(notify, nspawn)
            self._commands = self._cgroup / "payload" / "commands"
            self._commands.mkdir()
            self.run("sh", "-ec", _SET_UP)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _wait_ready(self, notify: socket.socket, nspawn: Process) -> int:
        """Wait until it has booted, and return its first process's pid."""
        deadline = Deadline(BOOT_TIMEOUT)
        told: dict[str, str] = {}
        while "READY" not in told:
            ready = deadline.wait_readable([notify.fileno(), nspawn.pidfd], "the boot")
            if nspawn.pidfd in ready:
                raise RuntimeError(f"{nspawn.name} did not boot: {nspawn.log.text}")
            lines = notify.recv(1 << 16).decode().splitlines()
            told |= dict(line.split("=", 1) for line in lines)
        return int(told["X_NSPAWN_LEADER_PID"])

    # What runs in it

    def command(self, *command: str | Path, user: str | None = None) -> list[str]:
        """Return what runs a command in the machine, without a login session, as `user` or root."""
        enter = ["sh", "-c", _ENTER, "sh", str(self._commands / "cgroup.procs")]
        enter += ["nsenter", f"--target={self.leader}", "--all", "--wdns=/", "--"]
        enter += ["env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8"]
        if user is not None:
            enter += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        return [*enter, *map(str, command)]

    def result(
        self, *command: str | Path, user: str | None = None, stdin: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, to whatever end; standard error goes with the output."""
        return subprocess.run(
            self.command(*command, user=user),
            cwd="/",
            check=False,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    def run(self, *command: str | Path, user: str | None = None) -> str:
        """Run a command in the machine that must succeed; return what it printed."""
        done = self.result(*command, user=user)
        if done.returncode != 0:
            raise FailedError(f"{command} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    def processes_of(self, unit: str) -> list[int]:
        """Return the processes of a system service, as this machine counts them."""
        cgroup = self._cgroup / "payload" / "system.slice" / unit
        return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()]

    def path(self, path: str | Path) -> Path:
        """Return where something of the machine's is to be found from here."""
        return Path(f"/proc/{self.leader}/root") / str(path).lstrip("/")

    def image(self, name: str, make: Callable[..., Path] = make_gpt, *, owner: str) -> Path:
        """Make an image of a user's, by a function of `images`; its path is the same in there."""
        path = make(self.files / name)
        os.chown(path, USERS[owner], USERS[owner])
        return path

    def write(self, path: str | Path, text: str) -> None:
        """Make a file in the machine, and the directories above it."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@contextmanager
def _cgroup(name: str) -> Iterator[Path]:
    """Make a cgroup below the top, and take it away with all that is left in it."""
    path = _unified_hierarchy() / name
    path.mkdir()
    try:
        yield path
    finally:
        _kill(path)
        for directory, _, _ in os.walk(path, topdown=False):
            Path(directory).rmdir()


def _kill(cgroup: Path) -> None:
    """End all processes in a cgroup and below it."""
    (cgroup / "cgroup.kill").write_text("1")
    deadline = Deadline()
    with (cgroup / "cgroup.events").open() as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            if not poll.poll(deadline.remaining * 1000):
                raise TimeoutError(f"{cgroup} does not get empty")
            events.seek(0)


def _unified_hierarchy() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise RuntimeError("cgroups of version 2 are not mounted")
