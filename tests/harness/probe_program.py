# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tries what a sandbox should not let it do, and prints what became of it as JSON.

Run by the machine tests once in the sandbox of loopd's unit and once without one.
"""

import contextlib
import ctypes
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable

CLONE_NEWUSER = 0x10000000
CLONE_NEWNS = 0x00020000
PERSONALITY_QUERY_32BIT = 0x0008
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_BPF = 321 if os.uname().machine == "x86_64" else 280

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise what a call of the C library has failed with."""
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def opened(path: str, flags: int = os.O_RDONLY) -> None:
    """Open a file."""
    os.close(os.open(path, flags))


def connected(family: int, kind: int = socket.SOCK_DGRAM) -> None:
    """Make a socket."""
    socket.socket(family, kind).close()


def mounted() -> None:
    """Mount something, and unmount it."""
    check(libc.mount(b"probe", b"/mnt", b"tmpfs", 0, None))
    check(libc.umount(b"/mnt"))


def unshared(what: int) -> Callable[[], None]:
    """Make a namespace, in a child."""

    def run() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(ctypes.get_errno() if libc.unshare(what) else 0)
        error = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if error:
            raise OSError(error, os.strerror(error))

    return run


def made_set_uid() -> None:
    """Make a program that runs as its owner."""
    path = f"/tmp/probe-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    try:
        os.chmod(path, 0o4755)
    finally:
        os.unlink(path)


def written(path: str) -> Callable[[], None]:
    """Make a file in a directory."""

    def run() -> None:
        file = f"{path}/probe-{os.getpid()}"
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        os.unlink(file)

    return run


def scheduled() -> None:
    """Be scheduled in real time, for a moment."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def executable_memory() -> None:
    """Have memory that can be written and run."""
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def seen_home() -> None:
    """See what is in the users' directories."""
    if "alice" not in os.listdir("/home"):
        raise FileNotFoundError(2, "nobody is at home")


def asked_landlock() -> None:
    """Ask for landlock's version."""
    check(libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def bpf() -> None:
    """Look for the first BPF program there is."""
    attributes = ctypes.create_string_buffer(128)
    if libc.syscall(SYS_BPF, 11, attributes, 128) == -1 and ctypes.get_errno() != 2:
        check(-1)


def wrote_sysctl() -> None:
    """Write to /proc/sys what stands there."""
    with open("/proc/sys/kernel/hostname", "r+") as file:
        file.write(file.read())


def named() -> None:
    """Give the machine the name that it has."""
    name = os.uname().nodename.encode()
    check(libc.sethostname(name, len(name)))


PROBES: dict[str, Callable[[], None]] = {
    "open /dev/fuse": lambda: opened("/dev/fuse", os.O_RDWR),
    "open /dev/kmsg": lambda: opened("/dev/kmsg"),
    "mount": mounted,
    "make a user namespace": unshared(CLONE_NEWUSER),
    "make a mount namespace": unshared(CLONE_NEWNS),
    "make a set-uid program": made_set_uid,
    "write to /etc": written("/etc"),
    "write to /usr": written("/usr"),
    "write to /var": written("/var/lib"),
    "write to a cgroup": lambda: opened("/sys/fs/cgroup/cgroup.subtree_control", os.O_WRONLY),
    "see /home": seen_home,
    "open a network socket": lambda: connected(socket.AF_INET),
    "open a network socket of IPv6": lambda: connected(socket.AF_INET6),
    "open a packet socket": lambda: connected(socket.AF_PACKET),
    "be scheduled in real time": scheduled,
    "have memory to write and run": executable_memory,
    "change the execution domain": lambda: check(libc.personality(PERSONALITY_QUERY_32BIT)),
    "name the machine": named,
    "change owners": lambda: os.chown(sys.argv[1], 1, 1),
    "become somebody else": lambda: os.setresuid(-1, 1000, -1) or os.setresuid(-1, 0, -1),
    "look at BPF programs": bpf,
    "use landlock": asked_landlock,
    "trace": lambda: check(libc.ptrace(0, 0, 0, 0)),
}


def main() -> None:
    """Try everything."""
    results = {}
    for name, probe in PROBES.items():
        try:
            probe()
        except OSError as exc:
            results[name] = os.strerror(exc.errno)
        else:
            results[name] = "done"
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(results), flush=True)


main()
