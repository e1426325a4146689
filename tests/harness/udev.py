# SPDX-License-Identifier: LGPL-2.1-or-later
"""A running systemd-udevd, the machine's own or one started for the tests, and rules for it.

A machine has one udevd, and several test runs may want it at once.  So the runs share the one that
the first of them started, each holding a shared lock meanwhile, and the last one stops it.
"""

import errno
import fcntl
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.area import TOKEN, area
from tests.harness.deadline import Deadline
from tests.harness.process import Process

UDEVD = Path("/lib/systemd/systemd-udevd")
RUN = Path("/run/udev")
RULES = RUN / "rules.d"

# Holds the pid of the udevd that a test run started.
_SHARED = Path("/run/loopd-tests-udevd.pid")
_FAREWELL = 2.0
"""Seconds in which udevd may end in good order."""
# Locked by every run that uses udevd, and by one that starts or stops it.
_USING = Path("/run/loopd-tests-udevd.using")
_CHANGING = Path("/run/loopd-tests-udevd.changing")


class Udev:
    """A udevd that runs until the end of the `with` block, with these rules beside the system's."""

    def __init__(self, rules: dict[str, str] | None = None, sources: tuple[Path, ...] = ()) -> None:
        """Prepare; `rules` are texts by file name (60-mine.rules), `sources` files to copy."""
        self._rules = {path.name: path.read_text() for path in sources} | (rules or {})
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_shared_udevd())
            if self._rules:
                stack.callback(_reload)
                RULES.mkdir(parents=True, exist_ok=True)
                for name, text in self._rules.items():
                    # A name of our own, in the given place of the order: another run may have
                    # the same rules in force.
                    path = RULES / f"{Path(name).stem}-{TOKEN}.rules"
                    stack.callback(path.unlink)
                    path.write_text(text)
                _reload()
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def settle(self, timeout: int = 20) -> None:
        """Wait until udevd has dealt with every event so far."""
        _udevadm("settle", f"--timeout={timeout}")

    def properties(self, node: str) -> dict[str, str]:
        """Return what udev's database says of a device node."""
        text = _udevadm("info", "--query=property", f"--name={node}")
        return dict(line.split("=", 1) for line in text.splitlines())

    def links(self, node: str) -> set[str]:
        """Return the links that udev made to a device node."""
        return set(self.properties(node).get("DEVLINKS", "").split())


def is_running() -> bool:
    """Say whether some udevd answers."""
    try:
        _udevadm("control", "--ping")
    except subprocess.CalledProcessError:
        return False
    return True


def shared_pid() -> int | None:
    """Return the pid of the udevd that the test runs share, None if they started none."""
    try:
        text = _SHARED.read_text()
    except FileNotFoundError:
        return None
    return int(text)


def _udevadm(*arguments: str) -> str:
    deadline = Deadline()
    while True:
        run = subprocess.run(
            ["udevadm", *arguments], check=False, capture_output=True, text=True, timeout=60
        )
        if not run.returncode:
            return run.stdout
        # One caller is served at a time and one may wait; it refuses who comes beside them.
        if os.strerror(errno.EAGAIN) not in run.stderr or not deadline.remaining:
            raise subprocess.CalledProcessError(
                run.returncode, run.args, output=run.stdout, stderr=run.stderr
            )


def _reload() -> None:
    # The ping waits until the reload before it is done.
    _udevadm("control", "--reload")
    _udevadm("control", "--ping")


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold the lock on a file; BlockingIOError if `how` says not to wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


@contextmanager
def _shared_udevd() -> Iterator[None]:
    """Hold on to a running udevd; the first of us starts it, the last one stops it."""
    with ExitStack() as using:
        with _locked(_CHANGING, fcntl.LOCK_EX):
            using.enter_context(_locked(_USING, fcntl.LOCK_SH))
            if not is_running():
                _SHARED.write_text(str(_start()))
        try:
            yield
        finally:
            with _locked(_CHANGING, fcntl.LOCK_EX):
                using.close()
                # Refused: others still use it.
                with suppress(BlockingIOError), _locked(_USING, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    if (pid := shared_pid()) is not None:
                        _stop(pid)
                        _SHARED.unlink()


def _start() -> int:
    if not UDEVD.exists():
        raise FileNotFoundError(f"{UDEVD}: install udev")
    with area("udev") as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(directory / "notify"))
        # Not a child in the sense of tests.harness.process: it may outlive this run for another.
        process = subprocess.Popen(
            [UDEVD],
            env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(directory / "notify")},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        pidfd = os.pidfd_open(process.pid)
        try:
            _wait_ready(notify, pidfd)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            os.close(pidfd)
        # The last to use it waits for its end, which need not be this process.
        process.returncode = 0
        return process.pid


def _wait_ready(notify: socket.socket, pidfd: int) -> None:
    deadline = Deadline()
    while True:
        ready = deadline.wait_readable([notify.fileno(), pidfd], "udevd to be ready")
        if notify.fileno() not in ready:
            raise RuntimeError("udevd ended before it was ready")
        if b"READY=1" in notify.recv(4096).split(b"\n"):
            return


@contextmanager
def private_udevd() -> Iterator[Process]:
    """Yield a udevd beside the machine's, which nobody else's tests are in need of.

    It has a /run/udev of its own, and looks at the devices of the machine as any other does.
    """
    with area("udev") as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(directory / "notify"))
        mount = "mkdir -p /run/udev; mount -t tmpfs none /run/udev"
        with Process(
            [
                *("unshare", "--mount", "--propagation", "private", "--"),
                *("sh", "-euc", f"{mount}; exec {UDEVD}"),
            ],
            name="udevd",
            environment={"NOTIFY_SOCKET": str(directory / "notify")},
        ) as process:
            _wait_ready(notify, process.pidfd)
            yield process


def _stop(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        if name not in ("systemd-udevd", "(udev-worker)"):
            return  # the pid has come to mean another
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        try:
            Deadline(_FAREWELL).wait_readable([pidfd], "the end of udevd")
        except TimeoutError:
            # It tries for long to look at a device that somebody has locked.
            os.killpg(pid, signal.SIGKILL)
            Deadline().wait_readable([pidfd], "the end of udevd")
            # What it would have removed, and by what others know that it runs.
            for name in ("control", "queue"):
                (RUN / name).unlink(missing_ok=True)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    finally:
        os.close(pidfd)
