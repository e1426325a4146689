# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why there is no loopd: systemd tells every user over the bus.

The bus does not say that systemd failed to start loopd: a call would wait there for 25 s.
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
# Seconds before each look at systemd. loopd usually answers before the first.
_PAUSE = 0.2
# Looks without a job of systemd for loopd. On a busy machine the bus may take seconds to ask for a
# job, and until then a unit that has not failed looks like one that is not to be started.
_LOOKS = 3
_LOOKS_WITHOUT_FAILURE = 25
# Automatic restarts that fail before a call stops waiting for the next one.
_STARTS = 2
_NO_JOB = 0


class Unavailable(errors.BusError):
    """The bus works, but loopd is not there and could not be started."""


@contextlib.asynccontextmanager
async def noticed(connection: transport.Connection) -> AsyncIterator[None]:
    """Let a block wait for loopd's answer only while loopd is there or may start soon.

    Else raises Unavailable, with the reason.
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

    Empty as soon as loopd is there, or if systemd cannot be asked.
    """
    idle, least = 0, None
    with contextlib.suppress(errors.LoopError, errors.BusError):
        while not await _is_there(connection):
            unit = await _look(connection)
            least = unit["NRestarts"] if least is None else min(least, unit["NRestarts"])
            ended = unit["ActiveState"] in ("failed", "inactive")
            idle = idle + 1 if ended and unit["Job"][0] == _NO_JOB else 0
            has_failed = unit["LoadState"] != "loaded" or unit["Result"] != "success"
            looks = _LOOKS if has_failed else _LOOKS_WITHOUT_FAILURE
            if idle >= looks or unit["NRestarts"] >= least + _STARTS:
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
    """Properties of loopd's unit in systemd. Raises LoopError, BusError."""
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
    """Why loopd does not run, and the remedy; empty if its unit has not failed."""
    if unit["LoadState"] == "masked":
        return "loopd is masked: 'systemctl unmask loopd' lets it start"
    if unit["LoadState"] == "not-found":
        return ""  # the error of the bus says that, too
    if unit["LoadState"] != "loaded":
        return "systemd cannot read loopd.service: 'systemctl status loopd' says why"
    if unit["Result"] == "start-limit-hit":
        return (
            "systemd has given up starting loopd, which failed too often: 'journalctl -u loopd' "
            "says why, and 'systemctl reset-failed loopd' lets it start again"
        )
    # Between a failed start and the next one, a unit looks as if it had never failed.
    if (unit["Result"], unit["ActiveState"], unit["NRestarts"]) == ("success", "inactive", 0):
        return "systemd does not start loopd: 'systemctl status loopd' says why"
    if unit["StatusText"]:
        return (
            f"loopd cannot start: {unit['StatusText']}; once that is put right, "
            "'systemctl start loopd' starts it"
        )
    how = {"exit-code": f"exit status {unit['ExecMainStatus']}", "success": "again and again"}
    end = how.get(unit["Result"], unit["Result"])
    return f"loopd fails when it starts ({end}): 'journalctl -u loopd' says why"
