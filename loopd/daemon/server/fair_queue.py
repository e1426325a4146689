# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose call is begun next: users take turns by the time that their calls have taken so far.

Of a processor a user has half in the long run, and all of it for some seconds. A user who sends
more than may be under way at a time is flooding, and has a tenth for as long as that goes on.
Root's calls never wait.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from loopd.daemon.access import ROOT
from loopd.daemon.budget import Bucket

# What a user has of a processor, and how much of that at once, in seconds: a thousand pairs of
# Attach and Detach as fast as they go.
_SHARE = 0.5
_BURST = 3.0
# The same for one who is flooding.
_FLOOD_SHARE = 0.1
_FLOOD_BURST = 0.05
# How much of our time is worth waking up for, in seconds.
_STEP = 0.005
# Answers of a user that wait for the bus before more of its calls are begun: others wait for them.
_MAX_UNSENT = 4
# How long calls are begun before what comes in is read, in seconds.
_TURN = 0.005
# How long a user counts as flooding after the last call that was too many, in seconds.
_FLOOD = 1.0
# Users to remember before those who do nothing are looked for.
_MANY = 256


class _Waiting(NamedTuple):
    begin: Callable[[], None]
    refuse: Callable[[], None] | None
    """Called instead where the call gives way to another user's; None if it cannot."""


class Account:
    """What one user has under way, and how much of our time it has had."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.sessions = 0
        """Connections that have this account."""
        self.calls = 0
        """Calls under way, begun or not."""
        self.waiting: deque[_Waiting] = deque()
        """Those that are not."""
        self.proven = uid == ROOT
        """Whether a call of its has been authorized."""
        self.unsent = 0
        """Answers that the bus has not taken yet."""
        self.deaf = False
        """Whether it has not read what the bus holds for it, and gets no more until it does."""
        self.used = 0.0
        """Seconds, on a scale that leaves out the times when it wanted nothing."""
        self._usual = Bucket(burst=_BURST, rate=_SHARE, step=_STEP)
        self._flooding = Bucket(burst=_FLOOD_BURST, rate=_FLOOD_SHARE, step=_STEP)
        self._flooding_until = 0.0
        self._owed = 0.0
        """Seconds that are yet to be taken from both, less than a step."""

    def charge(self, seconds: float) -> None:
        """Count time that was spent on this user."""
        self.used += seconds
        self._owed += seconds
        # An Attach and a Detach are charged in fifteen pieces: the buckets took longer than most.
        if self._owed >= _STEP:
            self._usual.take(self._owed)
            self._flooding.take(self._owed)
            self._owed = 0.0

    def flood(self) -> None:
        """Note that a call came which was too many."""
        self._flooding_until = time.monotonic() + _FLOOD

    def wait(self) -> float:
        """The seconds until it may have more of our time; inf if the bus or itself has to read."""
        if self.uid == ROOT:
            return 0.0
        if self.deaf or self.unsent >= _MAX_UNSENT:
            return math.inf
        wait = self._usual.wait()
        return max(wait, self._flooding.wait()) if self._is_flooding else wait

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember."""
        if self.sessions or self.calls or self._is_flooding:
            return False
        return self._usual.full and self._flooding.full

    @property
    def _is_flooding(self) -> bool:
        return time.monotonic() < self._flooding_until


class Turns:
    """Begins the calls, one of a user in each turn of the event loop, which reads in between."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._accounts: dict[int, Account] = {}
        self._waiting: set[Account] = set()
        self._used = 0.0
        """What the account had used whose turn was last."""
        self._next: asyncio.Handle | None = None

    def account(self, uid: int) -> Account:
        """The account of a user."""
        account = self._accounts.get(uid)
        if account is None:
            if len(self._accounts) >= _MANY:
                self._accounts = {k: v for k, v in self._accounts.items() if not v.idle}
            account = self._accounts[uid] = Account(uid)
        return account

    def add(
        self,
        account: Account,
        begin: Callable[[], None],
        refuse: Callable[[], None] | None = None,
    ) -> None:
        """Have a call begun when it is its user's turn, unless it gives way before."""
        if not account.waiting:
            # Having wanted nothing for a time gives no claim to all the time since.
            account.used = max(account.used, self._used)
            self._waiting.add(account)
        account.waiting.append(_Waiting(begin, refuse))
        self._wake(0.0)

    def sends(self, account: Account, written: asyncio.Future[None]) -> None:
        """Note an answer to a user, which is `written` when the bus has taken it."""
        if written.done():
            return

        def sent(_: asyncio.Future[None]) -> None:
            account.unsent -= 1
            if account.waiting:
                self._wake(0.0)

        account.unsent += 1
        written.add_done_callback(sent)

    def resume(self, account: Account) -> None:
        """Begin the calls of a user who was deaf."""
        if account.waiting:
            self._wake(0.0)

    def give_way(self, account: Account) -> bool:
        """Refuse the latest waiting call of the user with most of them, if those are more.

        Returns whether there was one.
        """
        most = sorted(self._waiting, key=lambda each: each.calls, reverse=True)
        for other in most:
            if other.uid == ROOT or other.calls <= account.calls:
                continue
            for call in reversed(other.waiting):
                if call.refuse:
                    self._remove(other, call)
                    call.refuse()
                    return True
        return False

    def _remove(self, account: Account, call: _Waiting) -> None:
        account.waiting.remove(call)
        if not account.waiting:
            self._waiting.remove(account)

    def _wake(self, wait: float) -> None:
        if self._next and not wait:
            self._next.cancel()
            self._next = None
        if self._next is None:
            if wait:
                self._next = self._loop.call_later(wait, self._turn)
            else:
                self._next = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._next = None
        if not self._waiting:
            return
        waits = {account: account.wait() for account in self._waiting}
        if wait := min(waits.values()):
            if wait < math.inf:
                self._wake(wait)
            return
        ready = sorted((each for each in waits if not waits[each]), key=lambda each: each.used)
        self._used = ready[0].used
        end = time.monotonic() + _TURN
        try:
            for account in ready:
                # Who has used more waits for the others, and what comes in waits for all of this.
                if account.used > self._used + _STEP or time.monotonic() > end:
                    break
                call = account.waiting[0]
                self._remove(account, call)
                call.begin()
        finally:
            if self._waiting:
                self._wake(0.0)
