# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make install` on a system without systemd: the bus starts the installed daemon by itself.

The system is this machine's own, in a mount namespace with a /usr that forgets and an empty /run:
the stock dbus-daemon with its stock configuration and its set-uid helper.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT, area
from tests.harness.deadline import Deadline
from tests.harness.process import Process

PRIVATE = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay -o "lowerdir=/usr,upperdir=$1/upper,workdir=$1/work" overlay /usr
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/dbus
echo ready >&"$2"
exec cat
"""


class System:
    """Programs that run in the namespace of the process that holds it."""

    def __init__(self, holder: Process, upper: Path) -> None:
        self._enter = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "--"]
        self._upper = Path(f"/proc/{holder.pid}/root{upper}")

    def command(self, *command: str, user: str = "root") -> list[str]:
        who = ["setpriv", f"--reuid={user}", "--regid=nogroup", "--clear-groups", "--reset-env"]
        return [*self._enter, *([] if user == "root" else who), *command]

    def run(self, *command: str, user: str = "root") -> str:
        """Run a program that must succeed; return what it printed."""
        done = subprocess.run(
            self.command(*command, user=user),
            cwd="/",
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def make(self, target: str, prefix: str) -> None:
        self.run("make", f"--directory={CHECKOUT}", target, f"PREFIX={prefix}", "DESTDIR=")

    def bus(self, member: str, *arguments: str) -> str:
        """Call the bus itself."""
        name = "org.freedesktop.DBus"
        return self.run("busctl", "call", name, "/org/freedesktop/DBus", name, member, *arguments)

    def changed(self) -> set[Path]:
        """The files of /usr that are not as they were; Python may have compiled its own."""
        paths = (path for path in self._upper.rglob("*") if not path.is_dir())
        return {path.relative_to(self._upper) for path in paths if path.suffix != ".pyc"}


@contextmanager
def dbus_daemon(system: System) -> Iterator[None]:
    read_end, write_end = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, read_end)
        try:
            command = system.command("dbus-daemon", "--system", "--nofork", "--nopidfile")
            stack.enter_context(
                Process(
                    [*command, "--nosyslog", f"--print-address={write_end}"],
                    name="dbus-daemon",
                    pass_fds=[write_end],
                )
            )
        finally:
            os.close(write_end)
        Deadline().wait_readable([read_end], "the address of the bus")
        assert os.read(read_end, 4096)
        yield


@pytest.fixture
def system() -> Iterator[System]:
    """A system without loopd."""
    read_end, write_end = os.pipe()
    idle_read_end, idle_write_end = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, read_end)
        stack.callback(os.close, idle_write_end)
        directory = stack.enter_context(area("install"))
        unshare = ["unshare", "--mount", "--propagation=private", "--"]
        try:
            holder = stack.enter_context(
                Process(
                    [*unshare, "bash", "-c", PRIVATE, "bash", directory, str(write_end)],
                    name="the private system",
                    stdin=idle_read_end,
                    pass_fds=[write_end],
                )
            )
        finally:
            os.close(write_end)
            os.close(idle_read_end)
        Deadline().wait_readable([read_end], "the mounts of the private system")
        assert os.read(read_end, 6) == b"ready\n", holder.log.text
        system = System(holder, directory / "upper")
        # Whoever works on loopd may have it installed.
        for prefix in ("/usr", "/usr/local"):
            system.make("uninstall", prefix)
        yield system


@contextmanager
def ends_with_the_bus(pid: int) -> Iterator[None]:
    """Leave no daemon behind that the bus started."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
        Deadline().wait_readable([pidfd], "the end of loopd, whose bus has gone")
    except BaseException:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        raise
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("prefix", ["/usr", "/usr/local"])
def test_the_bus_starts_what_was_installed_and_nothing_is_left_of_it(
    system: System, prefix: str
) -> None:
    name = "org.example.Loop1"
    before = system.changed()
    with ExitStack() as after_the_bus, dbus_daemon(system):
        assert name not in system.bus("ListActivatableNames")
        system.make("install", prefix)
        assert name in system.bus("ListActivatableNames")

        manager = [name, "/org/example/Loop1", name]
        version = system.run("busctl", "get-property", *manager, "Version", user="nobody")
        pid = int(system.bus("GetConnectionUnixProcessID", "s", name).split()[1])
        after_the_bus.enter_context(ends_with_the_bus(pid))
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert command[:3] == [b"/usr/bin/python3", b"-I", f"{prefix}/sbin/loopd".encode()]

        assert version.startswith('s "')
        devices = system.run("busctl", "call", *manager, "ListDevices", user="nobody")
        assert devices.startswith("a(ostayus)")
        assert system.run(f"{prefix}/bin/loopctl", "list", "--json", user="nobody")

        system.make("uninstall", prefix)
        assert system.changed() == before
        assert name not in system.bus("ListActivatableNames")


def test_a_removal_leaves_users_devices_theirs(system: System) -> None:
    """Stale marks: the package's rules go, and a device that is mounted stays bound."""
    rules, kept = "lib/udev/rules.d/62-loopd-unprivileged.rules", "/run/udev/rules.d"
    scripts = CHECKOUT / "debian"
    system.make("install", "/usr")
    system.run("sh", f"{scripts}/loopd.prerm", "remove")
    system.run("test", "!", "-e", kept)
    system.run("mkdir", "--parents", "/run/loopd/unprivileged")
    system.run("touch", "/run/loopd/unprivileged/loop3")
    system.run("sh", f"{scripts}/loopd.prerm", "upgrade")
    system.run("test", "!", "-e", kept)
    system.run("sh", f"{scripts}/loopd.prerm", "remove")
    system.run("cmp", f"/usr/{rules}", f"{kept}/{os.path.basename(rules)}")
    # The next installation has its own.
    system.run("sh", f"{scripts}/loopd.postinst", "configure")
    system.run("test", "!", "-e", f"{kept}/{os.path.basename(rules)}")
