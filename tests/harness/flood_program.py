# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of a Flood: as many calls of loopd as the bus takes, of one kind, by one client.

Its arguments are the address of the bus, the kind, and the user to be.
"""

import os
import sys
from collections.abc import Sequence

from tests.harness import wire
from tests.harness.bus import LOOPD
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.raw import RawClient

BATCH = 64 * 1024


def call(
    member: str, signature: str = "", args: Sequence[object] = (), *, fds: int = 0, flags: int = 1
) -> bytes:
    """One call of the manager, without a reply unless `flags` say otherwise."""
    return wire.build(
        serial=1,
        path=MANAGER_PATH,
        interface=MANAGER,
        member=member,
        destination=LOOPD,
        signature=signature,
        body=wire.marshal(signature, args),
        unix_fds=fds or None,
        flags=flags,
    )


def text(size: int) -> bytes:
    return call("GetDeviceByNode", "s", ["x" * size])


# Kind: the message, and whether it carries an fd.
KINDS: dict[str, tuple[bytes, bool]] = {
    "small calls": (call("ListDevices"), False),
    "4 KiB calls": (text(4096), False),
    "128 KiB calls": (text(128 * 1024), False),
    "calls with an fd": (call("GetDevice", "h", [0], fds=1), True),
    "unread replies": (call("ListDevices", flags=0), False),
}


def main(address: str, kind: str, user: str) -> None:
    """Flood until killed."""
    message, with_fd = KINDS[kind]
    batch = message if with_fd else message * max(1, BATCH // len(message))
    fds = [os.memfd_create("flood")] if with_fd else []
    with RawClient(address, user=user) as client:
        while True:
            client.send_bytes(batch, fds, timeout=3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
