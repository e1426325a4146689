# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a connection that has called us, and what it has under way."""

import asyncio
from dataclasses import dataclass, field

from loopd.daemon.access import Client

from .call import Call
from .fair_queue import Account

# Seconds for which a connection is not heard, at first and at most, and after which it is forgiven.
_SILENCE = 0.1
_LONGEST_SILENCE = 1.0
_FORGIVEN = 1.0


@dataclass(eq=False)
class Session:
    """What is known of a connection that has called us."""

    name: str
    left: asyncio.Future[None]
    client: Client | None = None
    account: Account | None = None
    identifying: asyncio.Task[None] | None = None
    """Asks the bus who it is."""
    awaited: asyncio.Future[None] | None = None
    """Done when the bus has said who it is, or has taken too long for others to wait."""
    waiting: list[Call] = field(default_factory=list)
    """Calls that came before we knew who it is."""
    calls: int = 0
    refusals: int = 0
    """Those that are still to be told."""
    spent: float = 0.0
    """Seconds of our time before we knew whom to charge for them."""
    _silence: float = 0.0
    _muted_until: float = 0.0

    def silence(self, now: float) -> float:
        """For how many seconds it is not to be heard from now on: longer each time, if it goes on.

        Else a flood would get so many calls in, each tenth of a second, that others wait for them.
        """
        goes_on = now < self._muted_until + _FORGIVEN
        self._silence = min(self._silence * 2, _LONGEST_SILENCE) if goes_on else _SILENCE
        self._muted_until = now + self._silence
        return self._silence

    @property
    def owner(self) -> int | None:
        """At whose expense the fds it sent are closed; all who are not known are one."""
        return self.account.uid if self.account else None

    def charge(self, seconds: float) -> None:
        """Count time that was spent on this connection."""
        if self.account:
            self.account.charge(seconds)
        else:
            self.spent += seconds
