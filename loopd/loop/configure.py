# SPDX-License-Identifier: LGPL-2.1-or-later
"""Binds one file to one unbound loop device, by LOOP_CONFIGURE or by the calls that came before it.

Whichever it is, what the kernel made of it is looked at, and not taken on trust. Whoever calls
undoes a binding that is not as it should be, and decides whether to try again elsewhere.
"""

import errno
import logging
from collections.abc import Callable
from functools import partial

from loopd.errors import InvalidArgs

from . import block_device, kernel
from .request import DEFAULT_SECTOR_SIZE, AttachRequest
from .uapi import (
    LO_FLAGS_AUTOCLEAR,
    LO_FLAGS_DIRECT_IO,
    LO_FLAGS_PARTSCAN,
    LO_FLAGS_READ_ONLY,
    LOOP_SET_STATUS_SETTABLE_FLAGS,
    loop_config,
    loop_info64,
)

log = logging.getLogger(__name__)

# Less than the 512 bytes that the kernel counts sizes in: the device has none.
_NOTHING = 511
# A loop device says the former of an ioctl that it does not know.
_UNKNOWN_IOCTL = (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FD = 0xFFFFFFFF


class Retry(Exception):
    """This attempt led nowhere, another may."""


class Taken(Retry):
    """Someone else bound, locked or removed the device between our calls."""


class NoNode(Retry):
    """The device is there, and its node is not."""


class Misplaced(Retry):
    """Something else is in the place of the device's node."""


class StalePartitions(Retry):
    """The device has partitions of a former life."""


class StaleLimit(Retry):
    """The unbound device discards less than it can, as it was told in a former life."""

    def __init__(self, number: int) -> None:
        super().__init__(f"loop{number} has a limit on discards")
        self.number = number


class DirectIORefused(Retry):
    """The kernel bound the file, but not in direct I/O mode."""


class Forgotten(Retry):
    """LOOP_CONFIGURE did not do all it was told; it will not be asked again."""


class Driver:
    """What the running kernel's loop driver can do, as far as trying has told.

    What was learned is kept for as long as the object, so there is one for a process.
    """

    def __init__(self) -> None:
        self.configures = True
        """Whether LOOP_CONFIGURE is there and does what it says."""

    def bind(
        self,
        number: int,
        loop_fd: int,
        file_fd: int,
        request: AttachRequest,
        bound: Callable[[], None],
    ) -> None:
        """Bind a file to an unbound device, as the request says, and make sure that it is so.

        The device carries autoclear and is read-only if it was opened so. `bound` is called once
        the file is bound, before whatever may still fail. For partitions PARTSCAN is set, but the
        kernel's own parser gets to see nothing: partitions would appear, vanish and come again.

        Raises a Retry, InvalidArgs for a sector size that the kernel does not take, OSError.
        """
        config = _config(file_fd, request)
        if self.configures and self._configure(loop_fd, config):
            bound()
            _require_size(loop_fd, config)
            if forgotten := _forgotten(number, loop_fd, config):
                self.configures = False
                # Not on the same device: clearing it is not done at once.
                raise Forgotten(f"LOOP_CONFIGURE forgets the {forgotten}")
        else:
            _set_fd(loop_fd, config)
            bound()
            set_status(loop_fd, config.info)
            if config.info.lo_offset or config.info.lo_sizelimit:
                # Before Linux 5.0 the cache would keep what was read of another range.
                _try(partial(kernel.blkflsbuf, loop_fd), "flush the cache")
            _set_block_size(loop_fd, config.block_size)
            _require_size(loop_fd, config)
            if request.direct_io:
                _try(partial(kernel.loop_set_direct_io, loop_fd, True), "turn direct I/O on")
        _verify_direct_io(number, loop_fd, request)
        if request.partition_scan:
            config.info.lo_sizelimit = request.size_limit
            set_status(loop_fd, config.info)
            _require_size(loop_fd, config)

    def _configure(self, loop_fd: int, config: loop_config) -> bool:
        """Call LOOP_CONFIGURE; false if this kernel has none."""
        try:
            kernel.loop_configure(loop_fd, config)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise Taken("bound by someone else in between") from exc
            if exc.errno not in _UNKNOWN_IOCTL:
                raise
            if not _has_loop_configure(loop_fd):
                log.debug("this kernel has no LOOP_CONFIGURE: going by LOOP_SET_FD from now on")
                self.configures = False
                return False
            raise
        return True


def _has_loop_configure(loop_fd: int) -> bool:
    """Whether EINVAL was about the arguments, and did not mean that the call is unknown."""
    try:
        kernel.loop_configure(loop_fd, loop_config(fd=_NO_FD))
    except OSError as exc:
        return exc.errno not in _UNKNOWN_IOCTL
    return True


def _config(file_fd: int, request: AttachRequest) -> loop_config:
    sector_size = request.sector_size or DEFAULT_SECTOR_SIZE
    config = loop_config(fd=file_fd, block_size=sector_size)
    config.info.lo_offset = request.offset
    # Where partitions are to be found, the kernel's own parser looks now: see `bind`. One sector
    # would be enough for it to see an MBR or a SUN label.
    config.info.lo_sizelimit = _NOTHING if request.partition_scan else request.size_limit
    config.info.lo_file_name = request.reference
    config.info.lo_flags = (
        LO_FLAGS_AUTOCLEAR
        | (LO_FLAGS_READ_ONLY if request.read_only else 0)
        | (LO_FLAGS_DIRECT_IO if request.direct_io else 0)
        | (LO_FLAGS_PARTSCAN if request.partition_scan else 0)
    )
    return config


def _forgotten(number: int, loop_fd: int, config: loop_config) -> str:
    """What LOOP_CONFIGURE has not done; Linux 5.8 itself forgets the limit and the scan."""
    if kernel.blksszget(loop_fd) != config.block_size:
        return "sector size"
    limit = config.info.lo_sizelimit
    if limit and kernel.blkgetsize64(loop_fd) > limit:
        return "size limit"
    scans = config.info.lo_flags & LO_FLAGS_PARTSCAN
    if scans and not block_device.scans_partitions(partial(kernel.loop_attribute, number)):
        return "partition scan"
    return ""


def _require_size(loop_fd: int, config: loop_config) -> None:
    """Refuse a file that its owner has made smaller since it was checked."""
    if config.info.lo_sizelimit == _NOTHING:
        return  # it shows once the limit is the real one
    if kernel.blkgetsize64(loop_fd) < (config.info.lo_sizelimit or config.block_size):
        raise InvalidArgs("the file has become smaller while it was attached")


def _set_fd(loop_fd: int, config: loop_config) -> None:
    try:
        kernel.loop_set_fd(loop_fd, config.fd)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Taken("bound by someone else in between") from exc
        raise


def set_status(loop_fd: int, info: loop_info64) -> None:
    """Call LOOP_SET_STATUS64, whose flags are those that it heeds. Raises OSError."""
    settable = loop_info64.from_buffer_copy(info)
    settable.lo_flags &= LOOP_SET_STATUS_SETTABLE_FLAGS
    block_device.patiently(partial(kernel.loop_set_status64, loop_fd, settable))


def _set_block_size(loop_fd: int, size: int) -> None:
    _try(partial(kernel.loop_set_block_size, loop_fd, size), "set the sector size")
    if kernel.blksszget(loop_fd) != size:
        raise InvalidArgs(f"sector-size: this kernel does not take {size}")


def _verify_direct_io(number: int, loop_fd: int, request: AttachRequest) -> None:
    direct_io = kernel.loop_attribute(number, "loop/dio") == b"1"
    if request.direct_io and not direct_io:
        raise DirectIORefused("direct I/O refused")
    if direct_io and not request.direct_io:
        # A file open with O_DIRECT turns it on by itself; the option is what counts.
        kernel.loop_set_direct_io(loop_fd, False)


def _try(call: Callable[[], None], what: str) -> None:
    """Do without where the kernel does not let us; what is in effect is looked at later."""
    try:
        call()
    except OSError as exc:
        log.debug("cannot %s: %s", what, exc.strerror)
