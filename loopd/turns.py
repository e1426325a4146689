# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose call is begun next: users take turns by the time that their calls have taken so far.

A user who sends more than may be under way at a time is flooding, and has a tenth of a processor
for as long as that goes on. Everyone else may have all that is left.
"""

import asyncio
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from .access import ROOT

_T = TypeVar("_T")

# What a flooding user has of a processor, and how much of that at once, in seconds.
_SHARE = 0.1
_BURST = 0.05
# How long a user counts as flooding after the last call that was too many, in seconds.
_FLOOD = 1.0
# Users to remember before those who do nothing are looked for.
_MANY = 256


class Account:
    """What one user has under way, and how much of our time it has had."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.sessions = 0
        """Connections that have this account."""
        self.calls = 0
        """Calls under way, begun or not."""
        self.waiting: deque[Callable[[], None]] = deque()
        """What begins the calls that are not."""
        self.used = 0.0
        """Seconds, on a scale that leaves out the times when it wanted nothing."""
        self._left = _BURST
        self._filled = time.monotonic()
        self._flooding_until = 0.0

    def charge(self, seconds: float) -> None:
        """Count time that was spent on this user."""
        self._fill()
        self.used += seconds
        self._left = max(self._left - seconds, -_BURST)

    def flood(self) -> None:
        """Note that a call came which was too many."""
        if self.uid != ROOT:
            self._flooding_until = time.monotonic() + _FLOOD

    def wait(self) -> float:
        """The seconds until it may have more of our time; 0 for who does not flood."""
        self._fill()
        if self._filled >= self._flooding_until or self._left > 0:
            return 0.0
        return (_BURST / 10 - self._left) / _SHARE

    @property
    def idle(self) -> bool:
        """Whether there is nothing to remember."""
        self._fill()
        if self.sessions or self.calls:
            return False
        return self._left >= _BURST and self._filled >= self._flooding_until

    def _fill(self) -> None:
        now = time.monotonic()
        self._left = min(self._left + (now - self._filled) * _SHARE, _BURST)
        self._filled = now


class Turns:
    """Begins the calls, one in each turn of the event loop: what comes in is read in between."""

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

    def add(self, account: Account, begin: Callable[[], None]) -> None:
        """Have a call begun when it is its user's turn."""
        if not account.waiting:
            # Having wanted nothing for a time gives no claim to all the time since.
            account.used = max(account.used, self._used)
            self._waiting.add(account)
        account.waiting.append(begin)
        self._wake(0.0)

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
        waits = {account: account.wait() for account in self._waiting}
        account = min(waits, key=lambda each: (waits[each], each.used))
        if waits[account]:
            self._wake(waits[account])
            return
        self._used = account.used
        begin = account.waiting.popleft()
        if not account.waiting:
            self._waiting.remove(account)
        if self._waiting:
            self._wake(0.0)
        begin()


@types.coroutine
def metered(
    work: Coroutine[Any, Any, _T], charge: Callable[[float], None]
) -> Generator[Any, Any, _T]:
    """Await a coroutine, and charge the processor time of its steps on the event loop."""
    step: Callable[[Any], Any] = work.send
    value: Any = None
    while True:
        start = time.thread_time()
        try:
            waits_for = step(value)
        except StopIteration as end:
            result: _T = end.value
            return result
        finally:
            charge(time.thread_time() - start)
        try:
            step, value = work.send, (yield waits_for)
        # Cancellation, too, is the coroutine's to take.
        except BaseException as exc:  # noqa: BLE001
            step, value = work.throw, exc
