# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd has passed to us, and is asked about us; that we live, told over and over."""

import asyncio
import importlib.util
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from loopd import notify
from loopd.errors import BusError, LoopError

log = logging.getLogger(__name__)

_NAME = "org.freedesktop.systemd1"
_OWN_UNIT = "/org/freedesktop/systemd1/unit/self"
_TIMEOUT = 5.0
_NO_JOB = 0

Call = Callable[..., Awaitable[list[Any]]]


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
        if not notify.present() or importlib.util.find_spec("systemd") is None:
            return 0
        try:
            return int(await self._get(_OWN_UNIT, "Service", "FileDescriptorStoreMax"))
        except (LoopError, BusError) as exc:
            log.warning("systemd does not say how many fds it keeps for us: %s", exc)
            return 0

    async def restarts(self) -> bool:
        """Whether we are stopped only to be started again; no, if systemd does not say."""
        if not notify.present():
            return False
        try:
            number, path = await self._get(_OWN_UNIT, "Unit", "Job")
            return number != _NO_JOB and str(await self._get(path, "Job", "JobType")) == "restart"
        except (LoopError, BusError) as exc:
            log.warning("systemd does not say whether it starts us again: %s", exc)
            return False
