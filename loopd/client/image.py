# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files to attach: opened by the client, with its own rights and no more."""

import errno
import os

from ..fd import OwnedFd

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def open_file(path: Path, *, read_only: bool | None = None) -> OwnedFd:
    """Open a file to attach with the rights of this process, read-write if that is allowed.

    `read_only` of None falls back to reading alone where writing is not allowed; True and False
    do not. Blocks as long as the filesystem does. Raises OSError, that of the first attempt.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return OwnedFd(os.open(path, flags | (os.O_RDONLY if read_only else os.O_RDWR)))
    except OSError as exc:
        if read_only is not None or exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        try:
            return OwnedFd(os.open(path, flags | os.O_RDONLY))
        except OSError:
            raise exc from None


def name_file(path: Path) -> OwnedFd:
    """Open a file, a node or a partition only to tell loopd which one is meant.

    That needs no right to read it, waits for no filesystem's server, and does not count as a user
    of a device that is to be detached. Raises OSError.
    """
    return OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC))
