# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions to logind: whether it knows a user, and that it may have forgotten one.

Its signals are hints only, because anybody may send us one: what counts is what it answers.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from loopd.errors import BusError, LoopError, NotSupported, PeerError

log = logging.getLogger(__name__)

NAME = "org.freedesktop.login1"
_PATH = "/org/freedesktop/login1"
_MANAGER = "org.freedesktop.login1.Manager"
_NO_SUCH_USER = "org.freedesktop.login1.NoSuchUser"
_TIMEOUT = 5.0

HINTS = (
    f"type='signal',sender='{NAME}',path='{_PATH}',interface='{_MANAGER}',member='UserRemoved'",
    # One that has started again may have forgotten users meanwhile.
    (
        "type='signal',sender='org.freedesktop.DBus',path='/org/freedesktop/DBus',"
        f"interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{NAME}'"
    ),
)
"""What to ask the bus for: each of it means that users may be gone."""

Call = Callable[..., Awaitable[list[Any]]]


class Logind:
    """logind, asked through `call`, which is a connection's method of that name."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def knows(self, uid: int) -> bool:
        """Whether a user has a session, lingers, or has left so shortly that it is kept.

        Raises NotSupported where there is no logind, and whatever keeps it from answering.
        """
        try:
            await self._call(NAME, _PATH, _MANAGER, "GetUser", "u", [uid], timeout=_TIMEOUT)
        except PeerError as exc:
            if exc.dbus_name == _NO_SUCH_USER:
                return False
            raise NotSupported(
                "lifetime: there is no logind here that says when a user has left"
            ) from exc
        return True

    async def has_forgotten(self, uid: int) -> bool:
        """Whether it says clearly that it does not know a user; everything uncertain is a no."""
        try:
            return not await self.knows(uid)
        except (LoopError, BusError) as exc:
            log.debug("logind does not say whether uid %d is there: %s", uid, exc)
            return False
