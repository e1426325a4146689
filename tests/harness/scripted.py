# SPDX-License-Identifier: LGPL-2.1-or-later
"""A loop driver in memory, in the place of the functions of loopd.loop.kernel: old kernels, and
races.

It models what the driver does with states, openers, lazy detaches, diskseqs, partitions and BSD
locks.  tests/harness/behaviours.py is run against it and against the real kernel, so that it stays
true.  What a kernel can and cannot do is a Traits; what others do in between, and errors, are a
Script (tests/harness/script.py), which works on the real kernel as well.

Its fds are real ones, so that they can be counted; files that are no loop devices are left to the
real functions.
"""

import errno
import fcntl
import functools
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from loopd.loop import kernel
from loopd.loop.kernel import PartitionExtent
from loopd.loop.uapi import (
    AT_STATX_DONT_SYNC,
    DISK_MAX_PARTS,
    LO_FLAGS_AUTOCLEAR,
    LO_FLAGS_DIRECT_IO,
    LO_FLAGS_PARTSCAN,
    LO_FLAGS_READ_ONLY,
    LOOP_MAJOR,
    LOOP_SET_STATUS_SETTABLE_FLAGS,
    STATX_BASIC_STATS,
    STATX_MNT_ID,
    loop_config,
    loop_info64,
    statx_buf,
)

PAGE = mmap.PAGESIZE
_PARTITION_MAJOR = 259
_CONTROL = -1
_DISCARD_MAX = 4294966784

# The functions that a scripted kernel replaces: all that the module has.
FUNCTIONS = tuple(
    name
    for name, value in vars(kernel).items()
    if callable(value) and not name.startswith("_") and value.__module__ == kernel.__name__
    if not isinstance(value, type)
)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a kernel is like; the default is a new one, without a parser for partition tables."""

    release: tuple[int, int] = (6, 18)
    configure: bool = True
    """LOOP_CONFIGURE is there (Linux 5.8)."""
    unknown_ioctl: int = errno.EINVAL
    """What an ioctl that is not there says."""
    forgets: frozenset[str] = frozenset()
    """What LOOP_CONFIGURE takes no notice of: "size limit", "partition scan", "sector size"."""
    diskseq: bool = True
    """There are diskseqs (Linux 5.15)."""
    direct_io: bool = True
    """Files can be read and written past the page cache."""
    says_partscan: bool = True
    """sysfs tells whether a disk is scanned for partitions (Linux 6.10)."""
    busy_when_mounted: bool = False
    """LOOP_SET_STATUS64 refuses a device that is exclusively open (Linux 6.19)."""
    writable_sysfs: bool = True

    @property
    def unbinds_while_open(self) -> bool:
        """LOOP_CLR_FD by the only opener unbinds at once (before Linux 6.11)."""
        return self.release < (6, 11)


@dataclass(eq=False)
class _Open:
    """An open file description on a device node."""

    number: int
    partition: int | None
    flags: int
    fds: int = 1
    lock: int = fcntl.LOCK_UN

    @property
    def node(self) -> tuple[int, int | None]:
        return self.number, self.partition

    @property
    def exclusive(self) -> bool:
        return bool(self.flags & os.O_EXCL)


@dataclass(eq=False)
class _Binding:
    which: int
    file_fd: int
    info: loop_info64
    block_size: int
    rundown: bool = False
    """CLR_FD was the only opener's: nothing more can be done to it."""
    scanning: bool = False
    """The block layer knows that it is to scan for partitions."""


@dataclass(eq=False)
class _Loop:
    number: int
    diskseq: int
    binding: _Binding | None = None
    size: int = 0
    discard_max: int = _DISCARD_MAX
    partitions: dict[int, PartitionExtent] = field(default_factory=dict)


class ScriptedKernel:
    """The model. `installed` puts it in the place of loopd.loop.kernel's functions."""

    def __init__(self, traits: Traits | None = None) -> None:
        self.traits = traits or Traits()
        self.parsed: dict[int, PartitionExtent] = {}
        """What the kernel's own parser would find on any device, if it had one."""
        self.uevent: Callable[[int, int], None] = lambda *_: None
        self._seqnum = 0
        """Told the number of a device that was bound, unbound or removed, as by the kernel."""
        self._mutex = threading.RLock()
        self._loops: dict[int, _Loop] = {}
        self._opens: dict[int, _Open] = {}
        self._real = {name: getattr(kernel, name) for name in FUNCTIONS}
        self._diskseq = 0
        self._bindings = 1000

    @contextmanager
    def installed(self) -> Iterator["ScriptedKernel"]:
        """Be loopd's kernel until the end of the block."""
        with ExitStack() as stack:
            for name in FUNCTIONS:
                stack.enter_context(mock.patch.object(kernel, name, self._alone(name)))
            yield self

    def _alone(self, name: str) -> Callable[..., Any]:
        """A function as it is called from several threads, which is one at a time."""
        function = getattr(self, name)

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            with self._mutex:
                return function(*args, **named)

        return call

    # What the tests may ask of it

    def bound(self) -> list[int]:
        """Return the numbers that have a file bound."""
        with self._mutex:
            return sorted(number for number, loop in self._loops.items() if loop.binding)

    def open_fds(self) -> list[int]:
        """Return the fds on device nodes."""
        with self._mutex:
            return sorted(self._opens)

    def numbers(self) -> list[int]:
        """Return the numbers of all devices."""
        with self._mutex:
            return sorted(self._loops)

    # What others do behind loopd's back, and the kernel by itself

    def let_go(self, number: int) -> None:
        """Unbind a device although it is open."""
        self._unbind(self._loops[number])

    def bind_by_others(self, number: int, path: Path) -> None:
        """Bind a file for ever."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        loop_fd = self.open_loop(number, os.O_RDWR)
        self._bind(self._loops[number], loop_fd, fd, loop_info64(), 512)
        self.close(loop_fd)
        os.close(fd)

    def take_up_size(self, number: int) -> None:
        """Follow the file's size."""
        self._loops[number].size = self._capacity(self._loops[number])

    # --- files ---------------------------------------------------------------------------------

    def statx(
        self,
        fd: int,
        flags: int = AT_STATX_DONT_SYNC,
        mask: int = STATX_BASIC_STATS | STATX_MNT_ID,
    ) -> statx_buf:
        if not (opened := self._opens.get(fd)):
            return self._call_real("statx", fd, flags, mask)
        buf = statx_buf(stx_mode=stat.S_IFBLK | 0o600, stx_dev_minor=5)
        buf.stx_ino = 1000 * (opened.number + 2) + (opened.partition or 0)
        buf.stx_rdev_major, buf.stx_rdev_minor = self._device_number(*opened.node)
        return buf

    def preadv(self, fd: int, buffer: mmap.mmap, offset: int) -> int:
        if not (opened := self._opens.get(fd)):
            return int(self._call_real("preadv", fd, buffer, offset))
        loop = self._loops[opened.number]
        binding = self._bound(loop)
        length = max(min(len(buffer), loop.size - offset), 0)
        data = os.pread(binding.file_fd, length, binding.info.lo_offset + offset)
        buffer[: len(data)] = data
        return len(data)

    def fsync(self, fd: int) -> None:
        if fd not in self._opens:
            self._call_real("fsync", fd)

    def flock(self, fd: int, operation: int) -> None:
        opened = self._opens.get(fd)
        if opened is None:
            self._call_real("flock", fd, operation)
            return
        wanted = operation & ~fcntl.LOCK_NB
        opened.lock = fcntl.LOCK_UN  # a lock is let go of before another one is taken
        others = {each.lock for each in self._opens.values() if each.node == opened.node}
        conflict = {fcntl.LOCK_SH: {fcntl.LOCK_EX}, fcntl.LOCK_EX: {fcntl.LOCK_SH, fcntl.LOCK_EX}}
        if others & conflict.get(wanted, set()):
            if not operation & fcntl.LOCK_NB:
                raise AssertionError("nobody may wait for a lock without a deadline")
            _refuse(errno.EWOULDBLOCK)
        opened.lock = wanted

    def dup(self, fd: int) -> int:
        copy = os.dup(fd)
        os.set_inheritable(copy, False)
        if opened := self._opens.get(fd):
            opened.fds += 1
            self._opens[copy] = opened
        return copy

    def close(self, fd: int) -> None:
        opened = self._opens.pop(fd, None)
        os.close(fd)
        if opened is None:
            return
        opened.fds -= 1
        loop = self._loops.get(opened.number)
        if opened.fds or not loop or self._openers(loop) or not loop.binding:
            return
        if loop.binding.rundown or loop.binding.info.lo_flags & LO_FLAGS_AUTOCLEAR:
            self._unbind(loop)

    # --- /dev/loop-control ---------------------------------------------------------------------

    def open_loop_control(self) -> int:
        return self._opened(_Open(_CONTROL, None, os.O_RDWR))

    def loop_ctl_get_free(self, control_fd: int) -> int:
        for number, loop in sorted(self._loops.items()):
            if not loop.binding:
                return number
        return self.loop_ctl_add(control_fd, -1)

    def loop_ctl_add(self, control_fd: int, number: int) -> int:
        if number < 0:
            number = next(n for n in range(1 << 20) if n not in self._loops)
        if number in self._loops:
            _refuse(errno.EEXIST)
        self._loops[number] = _Loop(number, self._next_diskseq())
        return number

    def loop_ctl_remove(self, control_fd: int, number: int) -> None:
        loop = self._loops.get(number)
        if loop is None:
            _refuse(errno.ENODEV)
        if loop.binding or self._openers(loop):
            _refuse(errno.EBUSY)
        del self._loops[number]
        self._tell(number)

    # --- a loop device -------------------------------------------------------------------------

    def open_loop(self, number: int, flags: int) -> int:
        return self._open_node(number, None, flags)

    def reopen(self, fd: int, flags: int) -> int:
        opened = self._opens[fd]
        return self._open_node(opened.number, opened.partition, flags)

    def open_partition(self, number: int, partition: int, flags: int) -> int:
        return self._open_node(number, partition, flags)

    def partition_node_exists(self, number: int, partition: int) -> bool:
        return number in self._loops and partition in self._loops[number].partitions

    def loop_set_fd(self, loop_fd: int, file_fd: int) -> None:
        loop = self._loop(loop_fd)
        self._bind(loop, loop_fd, file_fd, loop_info64(), 512)

    def loop_configure(self, loop_fd: int, config: loop_config) -> None:
        if not self.traits.configure:
            _refuse(self.traits.unknown_ioctl)
        info = loop_info64.from_buffer_copy(config.info)
        block_size = config.block_size or 512
        _require_block_size(config.fd, block_size)
        if "sector size" in self.traits.forgets:
            block_size = 512
        loop = self._loop(loop_fd)
        self._bind(loop, loop_fd, config.fd, info, block_size)
        if "size limit" in self.traits.forgets:
            loop.size = self._capacity(loop, limited=False)
        if info.lo_flags & LO_FLAGS_PARTSCAN and "partition scan" not in self.traits.forgets:
            self._scan(loop)

    def loop_clr_fd(self, loop_fd: int) -> None:
        loop = self._loop(loop_fd)
        binding = self._bound(loop)
        binding.info.lo_flags |= LO_FLAGS_AUTOCLEAR
        if self._openers(loop) > 1:
            return
        if self.traits.unbinds_while_open:
            self._unbind(loop)
        else:
            binding.rundown = True

    def loop_get_status64(self, loop_fd: int) -> loop_info64:
        loop = self._loop(loop_fd)
        binding = self._bound(loop)
        info = loop_info64.from_buffer_copy(binding.info)
        buf = self.statx(binding.file_fd)
        info.lo_number = loop.number
        info.lo_device = os.makedev(buf.stx_dev_major, buf.stx_dev_minor)
        info.lo_inode = buf.stx_ino
        info.lo_rdevice = os.makedev(buf.stx_rdev_major, buf.stx_rdev_minor)
        return info

    def loop_set_status64(self, loop_fd: int, info: loop_info64) -> None:
        loop = self._loop(loop_fd)
        binding = self._bound(loop)
        if self.traits.busy_when_mounted and self._exclusive_openers(loop):
            _refuse(errno.EBUSY)
        new = info.lo_flags & LOOP_SET_STATUS_SETTABLE_FLAGS
        kept = binding.info.lo_flags & ~LO_FLAGS_AUTOCLEAR
        scans = bool(new & LO_FLAGS_PARTSCAN) and not binding.scanning
        binding.info.lo_flags = kept | new
        binding.info.lo_file_name = info.lo_file_name
        wanted = info.lo_offset, info.lo_sizelimit
        if wanted != (binding.info.lo_offset, binding.info.lo_sizelimit):
            # Only then is the file looked at.
            binding.info.lo_offset, binding.info.lo_sizelimit = wanted
            loop.size = self._capacity(loop)
        if scans:
            self._scan(loop)

    def loop_set_capacity(self, loop_fd: int) -> None:
        loop = self._loop(loop_fd)
        self._bound(loop)
        loop.size = self._capacity(loop)

    def loop_set_direct_io(self, loop_fd: int, enable: bool) -> None:
        binding = self._bound(self._loop(loop_fd))
        if enable and not self.traits.direct_io:
            _refuse(errno.EINVAL)
        binding.info.lo_flags &= ~LO_FLAGS_DIRECT_IO
        if enable:
            binding.info.lo_flags |= LO_FLAGS_DIRECT_IO

    def loop_set_block_size(self, loop_fd: int, size: int) -> None:
        loop = self._loop(loop_fd)
        binding = self._bound(loop)
        if self._exclusive_openers(loop):
            _refuse(errno.EBUSY)
        _require_block_size(binding.file_fd, size)
        binding.block_size = size

    # --- any block device ----------------------------------------------------------------------

    def blkgetdiskseq(self, block_fd: int) -> int:
        if not self.traits.diskseq:
            _refuse(self.traits.unknown_ioctl)
        return self._loop(block_fd).diskseq

    def blkgetsize64(self, block_fd: int) -> int:
        opened = self._opens[block_fd]
        loop = self._loops[opened.number]
        return loop.partitions[opened.partition].size if opened.partition else loop.size

    def blksszget(self, block_fd: int) -> int:
        binding = self._loop(block_fd).binding
        return binding.block_size if binding else 512

    def blkflsbuf(self, block_fd: int) -> None:
        self._loop(block_fd)

    def blkpg_add_partition(self, block_fd: int, number: int, start: int, length: int) -> None:
        loop = self._loop(block_fd)
        unit = loop.binding.block_size if loop.binding else 512
        if not 0 < number < DISK_MAX_PARTS or length <= 0 or start % unit or length % unit:
            _refuse(errno.EINVAL)
        if start + length > loop.size:
            _refuse(errno.EINVAL)
        if number in loop.partitions or _overlap(loop, start, length):
            _refuse(errno.EBUSY)
        loop.partitions[number] = PartitionExtent(number, start, length)

    def blkpg_del_partition(self, block_fd: int, number: int) -> None:
        loop = self._loop(block_fd)
        if number not in loop.partitions:
            _refuse(errno.ENXIO)
        if any(each.node == (loop.number, number) for each in self._opens.values()):
            _refuse(errno.EBUSY)
        del loop.partitions[number]

    def blkpg_resize_partition(self, block_fd: int, number: int, start: int, length: int) -> None:
        loop = self._loop(block_fd)
        there = loop.partitions.get(number)
        if there is None:
            _refuse(errno.ENXIO)
        if start != there.start or length <= 0 or length % 512:
            _refuse(errno.EINVAL)
        if _overlap(loop, start, length, but=number):
            _refuse(errno.EBUSY)
        loop.partitions[number] = there._replace(size=length)

    # --- sysfs ---------------------------------------------------------------------------------

    def loop_attribute(self, number: int, attribute: str) -> bytes:
        if number not in self._loops:
            _refuse(errno.ENOENT)
        loop = self._loops[number]
        found = self._attributes(loop)
        if loop.binding:
            found |= self._loop_attributes(loop.binding)
        if attribute not in found:
            _refuse(errno.ENOENT)
        value = found[attribute]
        return value if isinstance(value, bytes) else str(int(value)).encode()

    def _attributes(self, loop: _Loop) -> dict[str, Any]:
        binding = loop.binding
        read_only = bool(binding and binding.info.lo_flags & LO_FLAGS_READ_ONLY)
        # Later it is told by "loop/partscan" alone.
        scanned = binding and binding.scanning
        found = {
            "size": loop.size // 512,
            "ro": read_only,
            "dev": "{}:{}".format(*self._device_number(loop.number, None)).encode(),
            "ext_range": DISK_MAX_PARTS,
            "capability": b"%x" % (0 if scanned or self.traits.release >= (5, 17) else 0x200),
            "queue/logical_block_size": binding.block_size if binding else 512,
            "queue/discard_max_bytes": loop.discard_max,
            "queue/discard_max_hw_bytes": _DISCARD_MAX,
        }
        if self.traits.diskseq:
            found["diskseq"] = loop.diskseq
        if self.traits.says_partscan:
            found["partscan"] = bool(binding and binding.scanning)
        return found

    @staticmethod
    def _loop_attributes(binding: _Binding) -> dict[str, Any]:
        flags = binding.info.lo_flags
        return {
            "loop/backing_file": os.fsencode(os.readlink(f"/proc/self/fd/{binding.file_fd}")),
            "loop/offset": binding.info.lo_offset,
            "loop/sizelimit": binding.info.lo_sizelimit,
            "loop/autoclear": bool(flags & LO_FLAGS_AUTOCLEAR),
            "loop/partscan": bool(flags & LO_FLAGS_PARTSCAN),
            "loop/dio": bool(flags & LO_FLAGS_DIRECT_IO),
        }

    def set_loop_attribute(self, number: int, attribute: str, value: bytes) -> None:
        if not self.traits.writable_sysfs:
            _refuse(errno.EROFS)
        assert attribute == "queue/discard_max_bytes"
        self._loops[number].discard_max = min(int(value), _DISCARD_MAX)

    def uevent_seqnum(self) -> int:
        return self._seqnum

    def loop_binding(self, number: int) -> int | None:
        loop = self._loops.get(number)
        return loop.binding.which if loop and loop.binding else None

    def loop_numbers(self) -> list[int]:
        return sorted(self._loops)

    def loop_exists(self, number: int) -> bool:
        return number in self._loops

    def loop_bound(self, number: int) -> bool:
        return self.loop_binding(number) is not None

    def loop_partitions(self, number: int) -> list[PartitionExtent]:
        loop = self._loops.get(number)
        return sorted(loop.partitions.values()) if loop else []

    def loop_of_block_device(self, major: int, minor: int) -> int | None:
        found = self._node_of(major, minor)
        return found[0] if found else None

    def block_name(self, major: int, minor: int) -> str:
        if not (found := self._node_of(major, minor)):
            return str(self._call_real("block_name", major, minor))
        number, partition = found
        return f"loop{number}" if partition is None else f"loop{number}p{partition}"

    def block_attribute(self, major: int, minor: int, attribute: str) -> bytes:
        if not (found := self._node_of(major, minor)):
            data = self._call_real("block_attribute", major, minor, attribute)
            assert isinstance(data, bytes)
            return data
        number, partition = found
        if attribute.startswith("../"):
            if partition is None:
                _refuse(errno.ENOENT)
            return self.loop_attribute(number, attribute.removeprefix("../"))
        if partition is None:
            return self.loop_attribute(number, attribute)
        extent = self._loops[number].partitions.get(partition)
        if extent is None:
            _refuse(errno.ENOENT)  # whoever was told of it was slower than its removal
        values = {"partition": partition, "start": extent.start // 512, "size": extent.size // 512}
        values["ro"] = int(self.loop_attribute(number, "ro"))
        if attribute not in values:
            _refuse(errno.ENOENT)
        return str(values[attribute]).encode()

    def block_partitions(self, major: int, minor: int) -> list[PartitionExtent]:
        found = self._node_of(major, minor)
        return self.loop_partitions(found[0]) if found and found[1] is None else []

    def release(self) -> tuple[int, int]:
        return self.traits.release

    # --- the inside ----------------------------------------------------------------------------

    def _call_real(self, name: str, *args: Any) -> Any:
        return self._real[name](*args)

    def _opened(self, opened: _Open) -> int:
        fd = self._real_fd(opened)
        self._opens[fd] = opened
        return fd

    def _real_fd(self, opened: _Open) -> int:
        """An fd for it; on what is bound one that reads the file, for libblkid to see."""
        loop = self._loops.get(opened.number)
        if opened.partition is None and loop and loop.binding:
            path = f"/proc/self/fd/{loop.binding.file_fd}"
            return os.open(path, opened.flags & os.O_ACCMODE | os.O_CLOEXEC)
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def _open_node(self, number: int, partition: int | None, flags: int) -> int:
        loop = self._loops.get(number)
        if loop is None or (partition is not None and partition not in loop.partitions):
            _refuse(errno.ENOENT)
        if flags & os.O_EXCL and self._claimed(loop, partition):
            _refuse(errno.EBUSY)
        return self._opened(_Open(number, partition, flags))

    def _claimed(self, loop: _Loop, partition: int | None) -> bool:
        """Whether somebody has the device exclusively, or a part of it, or all of it."""
        return any(
            partition is None or each.partition in (None, partition)
            for each in self._exclusive_openers(loop)
        )

    def _exclusive_openers(self, loop: _Loop) -> list[_Open]:
        return [each for each in self._of(loop) if each.exclusive]

    def _openers(self, loop: _Loop) -> int:
        return len(self._of(loop))

    def _of(self, loop: _Loop) -> set[_Open]:
        return {each for each in self._opens.values() if each.number == loop.number}

    def _loop(self, fd: int) -> _Loop:
        opened = self._opens[fd]
        if opened.number not in self._loops:
            _refuse(errno.ENXIO)
        return self._loops[opened.number]

    @staticmethod
    def _bound(loop: _Loop) -> _Binding:
        if loop.binding is None or loop.binding.rundown:
            _refuse(errno.ENXIO)
        return loop.binding

    def _bind(
        self, loop: _Loop, loop_fd: int, file_fd: int, info: loop_info64, block_size: int
    ) -> None:
        try:
            flags = fcntl.fcntl(file_fd, fcntl.F_GETFL)
        except (OSError, OverflowError):
            _refuse(errno.EBADF)
        if loop.binding:
            _refuse(errno.EBUSY)
        writable = (flags & os.O_ACCMODE, self._opens[loop_fd].flags & os.O_ACCMODE)
        if os.O_RDONLY in writable:
            info.lo_flags |= LO_FLAGS_READ_ONLY
        direct = info.lo_flags & LO_FLAGS_DIRECT_IO or flags & os.O_DIRECT
        info.lo_flags &= ~LO_FLAGS_DIRECT_IO
        if direct and self.traits.direct_io:
            info.lo_flags |= LO_FLAGS_DIRECT_IO
        self._bindings += 1
        loop.binding = _Binding(self._bindings, self.dup(file_fd), info, block_size)
        loop.diskseq = self._next_diskseq()
        loop.size = self._capacity(loop)
        self._tell(loop.number)

    def _tell(self, number: int) -> None:
        self._seqnum += 1
        self.uevent(number, self._seqnum)

    def _unbind(self, loop: _Loop) -> None:
        assert loop.binding
        if loop.binding.scanning:
            loop.partitions.clear()
        binding, loop.binding = loop.binding, None
        self.close(binding.file_fd)
        loop.size = 0
        loop.diskseq = self._next_diskseq()
        self._tell(loop.number)

    def _scan(self, loop: _Loop) -> None:
        assert loop.binding
        loop.binding.scanning = True
        loop.partitions = {
            number: each for number, each in self.parsed.items() if each.start < loop.size
        }

    def _capacity(self, loop: _Loop, *, limited: bool = True) -> int:
        assert loop.binding
        info, file_fd = loop.binding.info, loop.binding.file_fd
        if file_fd in self._opens:
            file_size = self.blkgetsize64(file_fd)
        else:
            file_size = os.fstat(file_fd).st_size
        size = max(file_size - info.lo_offset, 0)
        if info.lo_sizelimit and limited:
            size = min(size, info.lo_sizelimit)
        return size // 512 * 512

    def _next_diskseq(self) -> int:
        self._diskseq += 1
        return self._diskseq

    @staticmethod
    def _device_number(number: int, partition: int | None) -> tuple[int, int]:
        if partition is None:
            return LOOP_MAJOR, number
        return _PARTITION_MAJOR, number * DISK_MAX_PARTS + partition

    def _node_of(self, major: int, minor: int) -> tuple[int, int | None] | None:
        if major == LOOP_MAJOR and minor in self._loops:
            return minor, None
        number, partition = divmod(minor, DISK_MAX_PARTS)
        if major == _PARTITION_MAJOR and number in self._loops:
            return number, partition
        return None


def _require_block_size(file_fd: int, size: int) -> None:
    try:
        os.fstat(file_fd)
    except (OSError, OverflowError):
        _refuse(errno.EBADF)
    if not 512 <= size <= PAGE or size & (size - 1):
        _refuse(errno.EINVAL)


def _overlap(loop: _Loop, start: int, length: int, but: int | None = None) -> bool:
    return any(
        each.start < start + length and start < each.start + each.size
        for each in loop.partitions.values()
        if each.number != but
    )


def _refuse(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))
