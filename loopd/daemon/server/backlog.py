# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the bus holds of ours for users who do not read it.

dbus-daemon reads no more from a sender of whose messages it holds 127 MB or 64 fds. One client
that never reads could so make us mute for everyone. dbus-daemon says how much a client has not
read, and a user with too much unread gets no more answers until it reads. It holds a signal once
until the last listener has read it, and says how much it holds of ours in all; where that is too
much, nothing is told of the devices of those users of whom it is. dbus-broker charges the receiver,
disconnects a listener who does not read, and knows no such question.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from loopd.daemon.access import ROOT
from loopd.daemon.quota import share
from loopd.daemon.tasks import Tasks
from loopd.errors import LoopError, RefusedByBus, TimedOut

from .fair_queue import Account, Turns

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 1.0
_NO_SUCH_CLIENT = "org.freedesktop.DBus.Error.NameHasNoOwner"


class Unread(NamedTuple):
    """What a client may not have read yet."""

    bytes: int = 0
    fds: int = 0


# What a user may leave unread, and all users together. With what listeners may leave unread of
# signals that is four fifths of what the bus bears.
_PER_USER = Unread(2 << 20, 8)
_IN_ALL = Unread(32 << 20, 32)
_SIGNALS = 64 << 20
# How many bytes of signals are sent before the bus is asked.
_BETWEEN = 1 << 20


@dataclass(eq=False)
class _Reader:
    """A user who has been sent something."""

    unread: dict[str, Unread] = field(default_factory=dict)
    """By connection; what was sent, until the bus says how much of that is left."""
    total: Unread = field(default_factory=Unread)
    checking: bool = False
    room: asyncio.Future[None] | None = None
    """Done when the user gets answers again; None if it does."""

    def set(self, name: str, unread: Unread) -> None:
        """Note what a connection has not read."""
        before = self.unread.pop(name, Unread())
        if unread > Unread():
            self.unread[name] = unread
        self.total = Unread(
            *(t - b + u for t, b, u in zip(self.total, before, unread, strict=True))
        )


class Backlog:
    """Holds back the users who do not read.

    `ask` tells what the bus holds for a connection, and `held` how many bytes it holds of ours.
    """

    def __init__(
        self,
        turns: Turns,
        tasks: Tasks,
        ask: Callable[[str], Awaitable[Unread]],
        held: Callable[[], Awaitable[int]],
    ) -> None:
        self._turns = turns
        self._tasks = tasks
        self._ask = ask
        self._held = held
        self._knows = True
        """Whether the bus has an answer to that."""
        self._readers: dict[Account, _Reader] = {}
        self._signals: Counter[int] = Counter()
        """The bytes of signals that may be unread, by the owner of the device."""
        self._checking_signals = False
        self._untold: set[int] = set()
        """Those of whose devices nothing is told."""

    def sent(self, account: Account, name: str, size: int, fds: int) -> None:
        """Note an answer."""
        if account.uid == ROOT or not self._knows:
            return
        reader = self._readers.setdefault(account, _Reader())
        before = reader.unread.get(name, Unread())
        reader.set(name, Unread(before.bytes + size, before.fds + fds))
        self._hold(account, reader)
        # Asked before it is too much, so that nobody waits who reads.
        if not reader.checking and self._is_full(account, reader, part=2):
            reader.checking = True
            self._tasks.start(self._check(account, reader))

    def left(self, account: Account, name: str) -> None:
        """Forget a connection, for which the bus holds nothing any more."""
        if reader := self._readers.get(account):
            reader.set(name, Unread())
            self._hold(account, reader)

    async def room(self, account: Account, left: asyncio.Future[None]) -> None:
        """Wait until a user may have an answer, or the client has left."""
        while not left.done() and (reader := self._readers.get(account)) and reader.room:
            await asyncio.wait([reader.room, left], return_when=asyncio.FIRST_COMPLETED)

    def _is_full(self, account: Account, reader: _Reader, part: int = 1) -> bool:
        totals = [each.total for each in self._readers.values() if each is not reader]
        for kind in range(len(Unread._fields)):
            others = sum(total[kind] for total in totals)
            places = share(account.uid, of_root=0, of_others=others, in_all=_IN_ALL[kind])
            most = min(_PER_USER[kind], places) // part
            if reader.total[kind] and reader.total[kind] >= most:
                return True
        return False

    def _hold(self, account: Account, reader: _Reader) -> None:
        """Give a user no more answers, or go on."""
        account.deaf = self._knows and self._is_full(account, reader)
        if account.deaf and not reader.room:
            reader.room = asyncio.get_running_loop().create_future()
        elif not account.deaf and reader.room:
            reader.room.set_result(None)
            reader.room = None
            self._turns.resume(account)

    async def _check(self, account: Account, reader: _Reader) -> None:
        """Ask the bus what a user has not read, again and again until that is little."""
        pause = 0.01
        while self._is_full(account, reader, part=2):
            for name in [*reader.unread]:
                await self._check_one(reader, name)
                self._hold(account, reader)
            if not self._knows:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        reader.checking = False
        self._hold(account, reader)
        if not reader.unread:
            self._readers.pop(account, None)

    async def _check_one(self, reader: _Reader, name: str) -> None:
        before = reader.unread.get(name, Unread())
        try:
            told = await self._ask(name)
        except (TimedOut, RefusedByBus):
            return
        except LoopError as exc:
            told = Unread()
            self._knows = exc.dbus_name == _NO_SUCH_CLIENT
        if (now := reader.unread.get(name)) is None:
            return  # it has left
        # The bus also counts what others have sent; what was sent since may not be there yet.
        left = (min(t, b) + n - b for t, b, n in zip(told, before, now, strict=True))
        reader.set(name, Unread(*left))

    # --- signals --------------------------------------------------------------------------------

    def is_told(self, owner: int) -> bool:
        """Whether everyone may be told of a user's devices."""
        own, root = self._signals[owner], self._signals[ROOT]
        others = self._signals.total() - own - (root if owner != ROOT else 0)
        if own < share(owner, of_root=root, of_others=others, in_all=_SIGNALS):
            self._untold.discard(owner)
        elif owner not in self._untold:
            self._untold.add(owner)
            log.warning("listeners do not read: no signals about devices of uid %d", owner)
        return owner not in self._untold

    def signalled(self, owner: int, size: int) -> None:
        """Note a signal to everyone about a user's device."""
        if not self._knows:
            return
        self._signals[owner] += size
        if not self._checking_signals and self._signals.total() >= _BETWEEN:
            self._checking_signals = True
            self._tasks.start(self._check_signals())

    async def _check_signals(self) -> None:
        """Ask the bus what it holds of ours, again and again until that is little."""
        pause = 0.01
        while self._knows and self._signals.total() >= _BETWEEN:
            before = self._signals.total()
            try:
                held = await self._held()
            except (TimedOut, RefusedByBus):
                pass
            except LoopError:
                self._knows = False
                self._signals.clear()
            else:
                answers = sum(reader.total.bytes for reader in self._readers.values())
                self._have_read(before - max(held - answers, 0))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._checking_signals = False

    def _have_read(self, size: int) -> None:
        """Take so many bytes for read, of each user in proportion."""
        total = self._signals.total()
        left = 1 - max(size, 0) / total
        self._signals = Counter({uid: int(each * left) for uid, each in self._signals.items()})
        self._signals += Counter()  # without those of whom there is nothing
