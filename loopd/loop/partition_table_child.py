# SPDX-License-Identifier: LGPL-2.1-or-later
"""The child that reads a partition table, and can do nothing else: a program, not to be imported.

The table is whatever a client has written, and the one who parses it is libblkid. So it runs in a
process that first gives up all that root has: seccomp leaves it the few system calls that reading
takes, and what seccomp does not know, or where it is missing, landlock, limits, an ordinary user's
uid and an empty set of capabilities deny. The device is its standard input, open for reading, and
its arguments are the ioctls that libblkid needs. To its standard output it writes a line for each
partition: number, start and length in units of 512 bytes, and 1 if it is an extended one. What it
says is for the parent to check.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys

_MEMORY = 256 << 20
_CPU_SECONDS = 2
# Of those that nobody is given: nobody's own, 65534, is many's.
_NO_ONE = 65533

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

# The same on all architectures that came after these.
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_RESTRICT_SELF = 446
_OTHER_NUMBERS = ("alpha", "mips")
_LANDLOCK_CREATE_RULESET_VERSION = 1
# How many rights on files each version of landlock knows, and the ones from the fifth on.
_LANDLOCK_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_LANDLOCK_FILE_RIGHTS_NOW = 16

# seccomp.h, of libseccomp
_SCMP_ACT_ALLOW = 0x7FFF0000
_SCMP_ACT_ERRNO = 0x00050000
_SCMP_CMP_EQ = 4
_EPERM = 1
# What libblkid does to a device, and what Python does to go on and to end.
_SYSTEM_CALLS = (
    "read readv pread64 lseek _llseek fstat fstat64 newfstatat fadvise64 fadvise64_64 "
    "arm_fadvise64_64 write writev mmap mmap2 munmap mremap brk madvise rt_sigaction "
    "rt_sigprocmask rt_sigreturn sigreturn futex futex_time64 close exit exit_group"
).split()


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def main() -> None:
    """Read the table of the device on standard input."""
    blkid = _libblkid()
    lock_in([int(request) for request in sys.argv[1:]])
    probe = blkid.blkid_new_probe()
    if not probe or blkid.blkid_probe_set_device(probe, 0, 0, 0) != 0:
        sys.exit("the device cannot be read")
    # NULL also if there is no table.
    partitions = blkid.blkid_probe_get_partitions(probe)
    count = blkid.blkid_partlist_numof_partitions(partitions) if partitions else 0
    for index in range(count):
        partition = blkid.blkid_partlist_get_partition(partitions, index)
        print(
            blkid.blkid_partition_get_partno(partition),
            blkid.blkid_partition_get_start(partition),
            blkid.blkid_partition_get_size(partition),
            blkid.blkid_partition_is_extended(partition),
        )
    sys.stdout.flush()


def lock_in(requests: list[int], *, seccomp: bool = True) -> None:
    """Give up every right but to use what is open, and of its ioctls but these.

    Without `seccomp`, as where it is missing, the rest has to hold alone. Raises OSError if
    something cannot be given up.
    """
    # Where memory runs out, this process is to go, and not the daemon. That takes no right.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
    libc = ctypes.CDLL(None, use_errno=True)
    libseccomp = _libseccomp() if seccomp else None
    # The unit's sandbox does not let it do these, and a container may not have the uid.
    with contextlib.suppress(OSError):
        os.nice(19)
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setresgid(_NO_ONE, _NO_ONE, _NO_ONE)
        os.setresuid(_NO_ONE, _NO_ONE, _NO_ONE)
    # After the change of uid, which would undo it.
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _landlock(libc)
    # No new fd of any kind from here on.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()))
    if libseccomp:
        _seccomp(libseccomp, requests)


def _landlock(libc: ctypes.CDLL) -> None:
    """Deny whatever the kernel's landlock can; without landlock the rest has to do."""
    if os.uname().machine.startswith(_OTHER_NUMBERS):
        return
    version = libc.syscall(
        _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION
    )
    if version < 1:
        return
    files = (1 << _LANDLOCK_FILE_RIGHTS.get(version, _LANDLOCK_FILE_RIGHTS_NOW)) - 1
    # struct landlock_ruleset_attr: TCP's bind and connect since 4; abstract sockets and signals
    # since 6.
    attributes = struct.pack("=Q", files)
    if version >= 4:
        attributes += struct.pack("=Q", 0b11)
    if version >= 6:
        attributes += struct.pack("=Q", 0b11)
    ruleset = _check(
        libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    )
    _check(libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _seccomp(library: ctypes.CDLL, requests: list[int]) -> None:
    """Allow a few system calls, and these ioctls; all else says EPERM."""
    rules = library.seccomp_init(_SCMP_ACT_ERRNO | _EPERM)
    if not rules:
        raise MemoryError
    for name in _SYSTEM_CALLS:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # this architecture has it
            _allow(library, rules, number, 0, None)
    ioctl = library.seccomp_syscall_resolve_name(b"ioctl")
    for request in requests:
        is_this_one = _Comparison(arg=1, op=_SCMP_CMP_EQ, datum_a=request)
        _allow(library, rules, ioctl, 1, ctypes.byref(is_this_one))
    _check_seccomp(library.seccomp_load(rules))


def _allow(library: ctypes.CDLL, rules: int, number: int, count: int, comparisons: object) -> None:
    _check_seccomp(
        library.seccomp_rule_add_array(rules, _SCMP_ACT_ALLOW, number, count, comparisons)
    )


def _check_seccomp(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _libseccomp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    pointer, number, unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32
    _declare(
        library,
        ("seccomp_init", pointer, unsigned),
        ("seccomp_syscall_resolve_name", number, ctypes.c_char_p),
        ("seccomp_rule_add_array", number, pointer, unsigned, number, unsigned, pointer),
        ("seccomp_load", number, pointer),
    )
    return library


def _libblkid() -> ctypes.CDLL:
    library = ctypes.CDLL("libblkid.so.1")
    pointer, number, offset = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    _declare(
        library,
        ("blkid_new_probe", pointer),
        ("blkid_probe_set_device", number, pointer, number, offset, offset),
        ("blkid_probe_get_partitions", pointer, pointer),
        ("blkid_partlist_numof_partitions", number, pointer),
        ("blkid_partlist_get_partition", pointer, pointer, number),
        ("blkid_partition_get_partno", number, pointer),
        ("blkid_partition_get_start", offset, pointer),
        ("blkid_partition_get_size", offset, pointer),
        ("blkid_partition_is_extended", number, pointer),
    )
    return library


def _declare(library: ctypes.CDLL, *functions: tuple[object, ...]) -> None:
    for name, result, *arguments in functions:
        function = getattr(library, str(name))
        function.restype, function.argtypes = result, arguments


if __name__ == "__main__":
    main()
