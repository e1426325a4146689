# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we send, until the bus has taken it: so much at most, and little does not wait for much.

Users share what the bus reads, whatever the number of their connections. What goes to one user
stays in its order, and so does all that is sent before and after something for everyone: a signal
comes before the answers that follow it.
"""

import asyncio
import itertools
import logging
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

# What waits for a slow bus: all in all, and before it for one user.
_MAX_QUEUED = 16 << 20
_MAX_QUEUED_PER_DESTINATION = 4 << 20
# What may be in the socket, where nothing can go before it any more: dbus-daemon reads 4 KiB of it
# in a round, and a round is long where the bus has much to do.
_IN_SOCKET = 8 << 10
# Messages in one write.
_AT_A_TIME = 16
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


@dataclass(slots=True)
class _Outgoing:
    data: memoryview
    fds: Sequence[int]
    owner: Hashable
    """Whose it is; empty if it is for everyone."""
    written: asyncio.Future[None]
    place: int
    """Lower numbers go first: where its owner would be if all got as many bytes."""


class Outbox:
    """The sending half of a connection.

    `on_error` is told why nothing can be sent any more; `whose` tells to whom a destination
    belongs.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_error: Callable[[str], None],
        whose: Callable[[str], Hashable] = str,
    ) -> None:
        self._socket = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _IN_SOCKET)
        self._on_error = on_error
        self._whose = whose
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Outgoing] = deque()
        self._queued: Counter[Hashable] = Counter()
        self._places: dict[Hashable, int] = {}
        """The place of the last message for each owner of some that wait."""
        self._place = 0
        """That of the last one sent."""
        self._waits = False
        """Whether the socket was full."""
        self.total = 0
        """The bytes put in so far."""

    def put(
        self, message: bytes, fds: Sequence[int], destination: str, *, soon: bool = False
    ) -> asyncio.Future[None]:
        """Send a message; the fds must stay open until the future is done.

        One that is to go `soon` goes with what else is put in this turn of the event loop: each
        write wakes the bus. The future is cancelled where the message is dropped, for too many that
        wait already.
        """
        written: asyncio.Future[None] = self._loop.create_future()
        data = memoryview(message)
        owner = self._whose(destination) if destination else ""
        if not self._make_room(owner, len(data)):
            log.warning("the bus is slow: dropped a message for %s", destination or "everyone")
            written.cancel()
            return written
        place = max(self._places.get(owner, 0), self._place) + len(data)
        outgoing = _Outgoing(data, fds, owner, written, place)
        if self._queue:
            self._insert(outgoing)
        else:
            self._queue.append(outgoing)
        self._places[owner] = place
        self._queued[owner] += len(data)
        self.total += len(data)
        if self._waits:
            pass  # for the socket, which is full
        elif not soon or len(self._queue) >= _AT_A_TIME:
            self._writable()
        elif len(self._queue) == 1:
            # Unlike call_soon, after all that is ready to run now: an answer may come of it.
            self._loop.call_later(0, self._writable)
        return written

    async def drain(self) -> None:
        """Wait until all that was put in is sent, or never will be."""
        while self._queue:
            await asyncio.wait([self._queue[-1].written])

    def close(self) -> None:
        """Send what the socket takes at once, and no more."""
        self._writable()
        self._loop.remove_writer(self._socket)
        self._waits = False
        for outgoing in self._queue:
            if not outgoing.written.done():
                outgoing.written.cancel()
        self._queue.clear()

    def _make_room(self, owner: Hashable, size: int) -> bool:
        """Whether a message may wait; whoever fills the queue loses what waits for it."""
        if self._queued[owner] + size > _MAX_QUEUED_PER_DESTINATION:
            return False
        if self._queued.total() + size > _MAX_QUEUED:
            filler = max(self._queued, key=self._queued.__getitem__)
            log.warning(
                "the bus is slow: dropped what waited for %s",
                "everyone" if filler == "" else filler,
            )
            first, *rest = self._queue  # the first may be half written
            self._queue = deque([first])
            for outgoing in rest:
                if outgoing.owner == filler:
                    outgoing.written.cancel()
                    self._queued[filler] -= len(outgoing.data)
                else:
                    self._queue.append(outgoing)
            self._forget(filler)
        return True

    def _forget(self, owner: Hashable) -> None:
        if not self._queued[owner]:
            del self._queued[owner]
            self._places.pop(owner, None)

    def _insert(self, outgoing: _Outgoing) -> None:
        """Put a message before those of users who get more."""
        at = len(self._queue)
        while at > 1:  # the first may be half written
            before = self._queue[at - 1]
            for_everyone = "" in (before.owner, outgoing.owner)
            if for_everyone or before.place <= outgoing.place:
                break
            at -= 1
        self._queue.insert(at, outgoing)

    def _writable(self) -> None:
        try:
            while self._queue:
                self._sent(self._socket.sendmsg(*self._next()))
        except BlockingIOError:
            # A full socket is no lost one: what is left goes when there is room.
            self._loop.add_writer(self._socket, self._writable)
            self._waits = True
            return
        except OSError as exc:
            self._loop.call_soon(self._on_error, f"cannot write to the bus: {exc.strerror}")
        if self._waits:
            self._waits = False
            self._loop.remove_writer(self._socket)

    def _next(self) -> tuple[list[memoryview], list[tuple[int, int, bytes]], int]:
        """The first message, alone if it has fds, and else with others that have none.

        dbus-broker takes fds for those of the last message that came in one piece with them.
        """
        first = self._queue[0]
        if first.fds:
            fds = struct.pack(f"{len(first.fds)}i", *first.fds)
            return [first.data], [(int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), fds)], _SEND
        data = []
        for outgoing in itertools.islice(self._queue, _AT_A_TIME):
            if outgoing.fds:
                break
            data.append(outgoing.data)
        return data, [], _SEND

    def _sent(self, size: int) -> None:
        """Take what is sent out of the queue; the fds went with its first byte."""
        while size:
            first = self._queue[0]
            part = min(size, len(first.data))
            size -= part
            first.data, first.fds = first.data[part:], ()
            self._queued[first.owner] -= part
            if not first.data:
                self._queue.popleft()
                self._place = max(self._place, first.place)
                self._forget(first.owner)
                if not first.written.done():
                    first.written.set_result(None)
