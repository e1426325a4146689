# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of a PrivateBroker: what systemd does for dbus-broker-launch, and then that.

Its arguments are the socket to listen on, the configuration, and the number of an fd that gets a
byte when one can connect. The launcher insists on a journal to log to, so it finds one, hidden from
everybody else, whose lines go to our own output.
"""

import ctypes
import os
import signal
import socket
import sys

CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
PR_SET_PDEATHSIG = 1
JOURNAL = "/run/systemd/journal"
LISTEN_FD = 3

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def journal() -> None:
    """Hide the machine's journal behind one that prints, in a child that dies with us."""
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    os.makedirs(JOURNAL, exist_ok=True)
    check(libc.mount(b"tmpfs", JOURNAL.encode(), b"tmpfs", 0, None))
    entries = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    entries.bind(f"{JOURNAL}/socket")
    if os.fork() == 0:
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        while True:
            os.write(1, entries.recv(1 << 16))
    entries.close()


def main(path: str, config: str, ready: str) -> None:
    """Listen, tell, and become the launcher."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    os.chmod(path, 0o666)
    listening.listen(128)
    fd = os.dup(int(ready))
    os.close(int(ready))
    journal()
    if listening.fileno() != LISTEN_FD:
        os.dup2(listening.fileno(), LISTEN_FD)
    os.set_inheritable(LISTEN_FD, True)
    os.environ.update(
        LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), DBUS_SYSTEM_BUS_ADDRESS=f"unix:path={path}"
    )
    os.write(fd, b"x")
    launcher = "dbus-broker-launch"
    os.execvp(launcher, [launcher, "--scope", "system", "--config-file", config])  # noqa: S606


main(*sys.argv[1:])
