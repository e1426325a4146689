# SPDX-License-Identifier: LGPL-2.1-or-later
"""The child that reads a partition table, and can do nothing else: a program, not to be imported.

The table is whatever a client has written, and the one who parses it is libblkid. So it runs in a
process that first gives up all that root has: it opens and makes nothing, writes to no file, has no
capabilities, and ends by itself. The device is its standard input. To its standard output it
writes a line for each partition: number, start and length in units of 512 bytes, and 1 if it is an
extended one. What it says is for the parent to check.
"""

import ctypes
import os
import resource
import struct
import sys

_MEMORY = 256 << 20
_CPU_SECONDS = 2

_PR_SET_NO_NEW_PRIVS = 38
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
# What each version of landlock can deny: the highest right that it knows of files, then whether
# it knows networks and scopes.
_LANDLOCK_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_LANDLOCK_FILE_RIGHTS_NOW = 16


def main() -> None:
    """Read the table of the device on standard input."""
    blkid = _libblkid()
    lock_in()
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


def lock_in() -> None:
    """Give up every right but to use what is open; raises OSError if one cannot be given up."""
    libc = ctypes.CDLL(None, use_errno=True)
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _landlock(libc)
    # No new fd of any kind from here on.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()))


def _landlock(libc: ctypes.CDLL) -> None:
    """Deny whatever the kernel's landlock can; without landlock the other limits have to do."""
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


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _libblkid() -> ctypes.CDLL:
    blkid = ctypes.CDLL("libblkid.so.1")
    pointer, number, offset = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, result, *arguments in (
        ("blkid_new_probe", pointer),
        ("blkid_probe_set_device", number, pointer, number, offset, offset),
        ("blkid_probe_get_partitions", pointer, pointer),
        ("blkid_partlist_numof_partitions", number, pointer),
        ("blkid_partlist_get_partition", pointer, pointer, number),
        ("blkid_partition_get_partno", number, pointer),
        ("blkid_partition_get_start", offset, pointer),
        ("blkid_partition_get_size", offset, pointer),
        ("blkid_partition_is_extended", number, pointer),
    ):
        function = getattr(blkid, name)
        function.restype, function.argtypes = result, arguments
    return blkid


if __name__ == "__main__":
    main()
