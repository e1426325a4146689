# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a connection that has called us, and what it has under way."""

import asyncio
from dataclasses import dataclass, field

from .access import Client
from .call import Call
from .turns import Account


@dataclass(eq=False)
class Session:
    """What is known of a connection that has called us."""

    name: str
    left: asyncio.Future[None]
    client: Client | None = None
    account: Account | None = None
    waiting: list[Call] = field(default_factory=list)
    """Calls that came before we knew who it is."""
    calls: int = 0
    refusals: int = 0
    """Those that are still to be told."""
    spent: float = 0.0
    """Seconds of our time before we knew whom to charge for them."""

    @property
    def owner(self) -> object:
        """At whose expense the fds it sent are closed."""
        return self.account.uid if self.account else self.name

    def charge(self, seconds: float) -> None:
        """Count time that was spent on this connection."""
        if self.account:
            self.account.charge(seconds)
        else:
            self.spent += seconds
