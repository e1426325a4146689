# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the system bus is, and how to be let in: the part of a connection that blocks."""

import os
import socket
from urllib.parse import unquote_to_bytes

from loopd.errors import BusError

SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"

_CONNECT_TIMEOUT = 10.0


def system_bus_address() -> str:
    """Where the system bus is, as libdbus finds it."""
    return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS


def connect(address: str, *, fds: bool = True) -> socket.socket:
    """Connect and authenticate; blocks for as long as the bus needs, at most 10 s.

    `address` is a D-Bus server address, several separated by ";". Without `fds` the bus sends no
    message that has any. Raises BusError.
    """
    problem = f"no address of a bus that can be used: {address!r}"
    for part in filter(None, address.split(";")):
        transport, _, rest = part.partition(":")
        keys = dict(pair.split("=", 1) for pair in rest.split(",") if "=" in pair)
        if transport != "unix" or not (keys.get("path") or keys.get("abstract")):
            continue
        if "path" in keys:
            where = unquote_to_bytes(keys["path"])
        else:
            where = b"\0" + unquote_to_bytes(keys["abstract"])
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(_CONNECT_TIMEOUT)
            sock.connect(where)
            _authenticate(sock, fds=fds)
            sock.setblocking(False)
        except (OSError, BusError) as exc:
            sock.close()
            reason = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
            problem = f"cannot connect to the bus at {part}: {reason}"
            continue
        return sock
    raise BusError(problem)


def _authenticate(sock: socket.socket, *, fds: bool) -> None:
    # All at once, as sd-bus does: after BEGIN the bus says nothing before we do. No uid is claimed,
    # as in a user namespace ours is not the one that the bus sees, which asks for it by DATA then.
    negotiate = b"NEGOTIATE_UNIX_FD\r\n" if fds else b""
    sock.sendall(b"\0AUTH EXTERNAL\r\nDATA\r\n" + negotiate + b"BEGIN\r\n")
    answer = b""
    while answer.count(b"\r\n") < 2 + fds:
        data = sock.recv(512)
        if not data or len(answer) > 4096:
            raise BusError("the bus ended the authentication")
        answer += data
        if answer.startswith(b"REJECTED"):
            raise BusError("the bus refused the authentication: it does not take this user")
    asked, let_in, *agreed = answer.split(b"\r\n")
    if asked != b"DATA" or not let_in.startswith(b"OK "):
        raise BusError(f"the bus refused the authentication: {_shown(asked, let_in)}")
    if fds and agreed[0] != b"AGREE_UNIX_FD":
        raise BusError(f"the bus passes no file descriptors: {_shown(agreed[0])}")


def _shown(*lines: bytes) -> str:
    """Lines of a bus in a sentence."""
    return ", ".join(repr(line.decode(errors="replace"))[1:-1] for line in lines if line)
