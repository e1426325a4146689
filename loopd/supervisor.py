# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd is told of us: that we are ready, alive, or stopping."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable

from .errors import BusError, LoopError

log = logging.getLogger(__name__)


def tell(state: str) -> None:
    """Tell systemd, if it started us and its library is installed."""
    if "NOTIFY_SOCKET" not in os.environ:
        return
    try:
        from systemd.daemon import notify

        notify(state)
    except (ImportError, OSError) as exc:
        log.warning("cannot notify systemd: %s", exc)


def watchdog_interval() -> float | None:
    """Seconds within which systemd wants to hear of us, after sd_watchdog_enabled(3)."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not usec.isdecimal() or int(usec) == 0 or pid not in (None, str(os.getpid())):
        return None
    return int(usec) / 1e6


async def stay_alive(interval: float, ask_bus: Callable[[], Awaitable[object]]) -> None:
    """Tell systemd over and over that we serve, which is when an answer of the bus reaches us.

    Whoever hears no more of it starts us anew: a loopd whom nobody can call is of no use.
    """
    while True:
        try:
            await ask_bus()
        except (LoopError, BusError) as exc:
            log.warning("the bus does not answer: %s", exc)
        else:
            tell("WATCHDOG=1")
        await asyncio.sleep(interval / 2)
