# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why there is no loopd, as systemd tells everybody who asks it over the bus.

The bus does not say that systemd's job has failed: calls wait 25 s there for a loopd that does not
come.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from loopd import errors
from loopd.bus import transport

from .watch import NAME

_SYSTEMD = "org.freedesktop.systemd1"
_UNIT = "/org/freedesktop/systemd1/unit/loopd_2eservice"
_TIMEOUT = 5.0
# Seconds between looks. loopd is there sooner as a rule, and then nobody looks.
_PAUSE = 0.2
# So many looks in which systemd does nothing for loopd: dbus-broker takes its time to ask it.
_LOOKS = 3
# So many starts of its own accord that systemd makes in vain, before nobody waits for the next.
_STARTS = 2
_NO_JOB = 0


class Unavailable(errors.BusError):
    """The bus is there, but loopd is not, and could not be started."""


@contextlib.asynccontextmanager
async def noticed(connection: transport.Connection) -> AsyncIterator[None]:
    """Do what waits for an answer of loopd, for as long as there is a loopd or may be one soon.

    Raises Unavailable, with the reason.
    """
    loop = asyncio.get_running_loop()
    watching: list[asyncio.Task[None]] = []
    reason = ""

    async def watch() -> None:
        nonlocal reason
        if reason := await _failure(connection):
            patience.reschedule(loop.time())

    # Most answers come before the first look, and cost no task.
    begin = loop.call_later(_PAUSE, lambda: watching.append(loop.create_task(watch())))
    try:
        async with asyncio.timeout(None) as patience:
            yield
    except TimeoutError as exc:
        raise Unavailable(reason) from exc
    finally:
        begin.cancel()
        for task in watching:
            task.cancel()


async def reason(connection: transport.Connection) -> str:
    """Why systemd does not start loopd; empty if it does not say."""
    with contextlib.suppress(errors.LoopError, errors.BusError):
        return _sentence(await _look(connection))
    return ""


async def _failure(connection: transport.Connection) -> str:
    """Wait until it is certain that loopd does not start, and say why.

    Empty as soon as it is there, or where nobody can tell.
    """
    idle, least = 0, None
    with contextlib.suppress(errors.LoopError, errors.BusError):
        while not await _is_there(connection):
            unit = await _look(connection)
            least = unit["NRestarts"] if least is None else min(least, unit["NRestarts"])
            ended = unit["ActiveState"] in ("failed", "inactive")
            idle = idle + 1 if ended and unit["Job"][0] == _NO_JOB else 0
            if idle == _LOOKS or unit["NRestarts"] >= least + _STARTS:
                return _sentence(unit)
            await asyncio.sleep(_PAUSE)
    return ""


async def _is_there(connection: transport.Connection) -> bool:
    try:
        await connection.call_bus("GetNameOwner", "s", [NAME])
    except errors.PeerError:
        return False
    return True


async def _look(connection: transport.Connection) -> dict[str, Any]:
    """What systemd knows of loopd's unit. Raises LoopError, BusError."""
    wanted = {
        "Unit": ("LoadState", "ActiveState", "Job"),
        "Service": ("Result", "ExecMainStatus", "StatusText", "NRestarts"),
    }
    found = {}
    for interface, names in wanted.items():
        for name in names:
            (value,) = await connection.call(
                _SYSTEMD,
                _UNIT,
                "org.freedesktop.DBus.Properties",
                "Get",
                "ss",
                [f"{_SYSTEMD}.{interface}", name],
                timeout=_TIMEOUT,
            )
            found[name] = value.value
    return found


def _sentence(unit: dict[str, Any]) -> str:
    """Why it does not run, and what to do; empty if it has not failed."""
    if unit["LoadState"] == "masked":
        return "loopd is masked: 'systemctl unmask loopd' lets it start"
    if unit["LoadState"] == "not-found":
        return ""  # the bus says that, too
    if unit["LoadState"] != "loaded":
        return "systemd cannot read loopd.service: 'systemctl status loopd' says why"
    if unit["Result"] == "start-limit-hit":
        return (
            "systemd has given up starting loopd, which failed too often: 'journalctl -u loopd' "
            "says why, and 'systemctl reset-failed loopd' lets it start again"
        )
    if unit["Result"] == "success" and unit["ActiveState"] == "inactive":
        return "systemd does not start loopd: 'systemctl status loopd' says why"
    if unit["StatusText"]:
        return (
            f"loopd cannot start: {unit['StatusText']}; once that is put right, "
            "'systemctl start loopd' starts it"
        )
    how = {"exit-code": f"exit status {unit['ExecMainStatus']}", "success": "again and again"}
    end = how.get(unit["Result"], unit["Result"])
    return f"loopd fails when it starts ({end}): 'journalctl -u loopd' says why"
