# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd is told of a program of ours, the daemon or loopctl; after sd_notify(3)."""

import array
import logging
import os
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)


def present() -> bool:
    """Whether systemd started us, and wants to hear of us."""
    return "NOTIFY_SOCKET" in os.environ


def tell(state: str, fds: Sequence[int] = ()) -> bool:
    """Tell systemd, if it started us; whether that was done. After sd_notify(3).

    It may have to wait until systemd reads, which the library's own would do with all threads: it
    keeps the interpreter's lock meanwhile.
    """
    if not present():
        return False
    address = os.environ["NOTIFY_SOCKET"]
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(address)
            sender.sendmsg([state.encode()], rights)
    except OSError as exc:
        log.warning("cannot notify systemd: %s", exc)
        return False
    return True
