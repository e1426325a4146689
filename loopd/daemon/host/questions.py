# SPDX-License-Identifier: LGPL-2.1-or-later
"""The second connection to the bus: for questions to polkit, logind, systemd and the bus itself.

No flood of calls is in the way of the answers there. It takes neither fds nor calls, and a name of
its own stands in the bus policy, which lets nothing but answers and broadcasts through to it.
dbus-broker ends a connection that takes no fds and is answered with some; none of those who are
asked does that.
"""

import logging
from collections.abc import Callable
from functools import partial

from loopd.bus import codec, dial, transport
from loopd.bus.frame import Frame
from loopd.daemon.threads import Threads
from loopd.errors import BusError, LoopError

log = logging.getLogger(__name__)

NAME = "org.example.Loop1.Questions"

_PRIMARY_OWNER = 1


async def connect(
    threads: Threads,
    address: str,
    *,
    on_signal: Callable[[Frame], None],
    on_lost: Callable[[str], None],
) -> transport.Connection:
    """Connect, and say hello. Raises BusError."""
    connection = transport.Connection(
        await threads.run(partial(dial.connect, address, fds=False)),
        max_message=codec.MAX_MESSAGE,
        on_call=None,
        on_signal=on_signal,
        broadcasts=True,
        on_lost=on_lost,
    )
    try:
        await connection.hello()
    except BaseException:
        connection.close()
        raise
    return connection


async def protect(connection: transport.Connection) -> None:
    """Own the name; without it the connection is still protected by skipping what it gets."""
    try:
        # In the queue behind a former loopd, which keeps its name until its end.
        (answer,) = await connection.call_bus("RequestName", "su", [NAME, 0])
        problem = "" if answer == _PRIMARY_OWNER else "another process owns it"
    except (LoopError, BusError) as exc:
        problem = str(exc)
    if problem:
        log.warning("cannot own %s, so the bus policy does not protect it: %s", NAME, problem)
