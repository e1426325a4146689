# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd is told of us, and asked about us: ready, alive, stopping, and whether for good."""

import array
import asyncio
import importlib.util
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .errors import BusError, LoopError

log = logging.getLogger(__name__)

_NAME = "org.freedesktop.systemd1"
_OWN_UNIT = "/org/freedesktop/systemd1/unit/self"
_TIMEOUT = 5.0
_NO_JOB = 0

Call = Callable[..., Awaitable[list[Any]]]


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


def passes_fds() -> bool:
    """Whether systemd has passed any fds to us that `passed_fds` has not taken."""
    return "LISTEN_FDS" in os.environ


def passed_fds() -> dict[str, list[int]]:
    """The fds that systemd has passed to us, by name."""
    if not passes_fds():
        return {}
    try:
        from systemd.daemon import listen_fds_with_names

        found: dict[str, list[int]] = {}
        for fd, name in listen_fds_with_names(unset_environment=True).items():
            found.setdefault(name, []).append(fd)
    except (ImportError, OSError) as exc:
        log.warning("cannot take what systemd has kept: %s", exc)
        return {}
    return found


def watchdog_interval() -> float | None:
    """Seconds within which systemd wants to hear of us, after sd_watchdog_enabled(3)."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not usec.isdecimal() or int(usec) == 0 or pid not in (None, str(os.getpid())):
        return None
    return int(usec) / 1e6


async def stay_alive(
    interval: float,
    ask_bus: Callable[[], Awaitable[object]],
    look: Callable[[], Awaitable[object]],
    tell: Callable[[str], Awaitable[object]],
) -> None:
    """Tell systemd over and over that we serve, which is when an answer of the bus reaches us.

    Whoever hears no more of it starts us anew: a loopd whom nobody can call is of no use. Each
    time, `look` looks after what else is to be. `tell` may wait until systemd reads.
    """
    while True:
        try:
            await ask_bus()
        except (LoopError, BusError) as exc:
            log.warning("the bus does not answer: %s", exc)
        else:
            await tell("WATCHDOG=1")
        await look()
        await asyncio.sleep(interval / 2)


class Unit:
    """Our unit, asked for over the bus through `call`, a connection's method of that name."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def _get(self, path: str, interface: str, name: str) -> Any:
        (value,) = await self._call(
            _NAME,
            path,
            "org.freedesktop.DBus.Properties",
            "Get",
            "ss",
            [f"{_NAME}.{interface}", name],
            timeout=_TIMEOUT,
        )
        return value.value

    async def fds_kept(self) -> int:
        """How many fds systemd keeps for us now. Raises LoopError, BusError."""
        return int(await self._get(_OWN_UNIT, "Service", "NFileDescriptorStore"))

    async def fds_at_most(self) -> int:
        """How many fds systemd would keep for us; 0 if it does not say."""
        # Without the library nothing could be taken back.
        if not present() or importlib.util.find_spec("systemd") is None:
            return 0
        try:
            return int(await self._get(_OWN_UNIT, "Service", "FileDescriptorStoreMax"))
        except (LoopError, BusError) as exc:
            log.warning("systemd does not say how many fds it keeps for us: %s", exc)
            return 0

    async def restarts(self) -> bool:
        """Whether we are stopped only to be started again; no, if systemd does not say."""
        if not present():
            return False
        try:
            number, path = await self._get(_OWN_UNIT, "Unit", "Job")
            return number != _NO_JOB and str(await self._get(path, "Job", "JobType")) == "restart"
        except (LoopError, BusError) as exc:
            log.warning("systemd does not say whether it starts us again: %s", exc)
            return False
