# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to a message bus for daemon and client alike: sockets, fds, calls and replies.

Ours, on top of the library's codec, because the libraries' own connections take a full socket for
a lost one, leave received fds open and read for as long as others send. Reading and writing
happen on the event loop in bounded slices; nothing here blocks.
"""

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

from loopd import errors
from loopd.errors import BusError
from loopd.fd import OwnedFd

from . import codec, frame
from .outbox import Outbox

log = logging.getLogger(__name__)

BUS_NAME = "org.freedesktop.DBus"
BUS_PATH = "/org/freedesktop/DBus"

_CHUNK = 65536
_ROOM_FOR_FDS = socket.CMSG_SPACE(253 * 4)  # SCM_MAX_FD
# Plain numbers: with the enumerations a message of a flood of fds takes 11 us, not 8.
_RECEIVE = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_PEEK = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)
_LOST = int(socket.MSG_CTRUNC)
_SLICE = 0.005  # seconds of reading before others get their turn


def _close_fds(fds: Iterable[int], _: str) -> None:
    for fd in fds:
        os.close(fd)


class Connection:
    """One connection, to be used once `hello` has returned.

    `on_call` and `on_signal` get frames and return at once; where there is none, what it would get
    is skipped unread. Fds that they do not take out of `frame.fds` are closed by `close_fds`, which
    is told whose they are. If it hears only `broadcasts`, signals to one connection are skipped
    unread, too. Of senders in `muted` nothing is heard at all. While `is_wary`, fds are
    left to the kernel but of those whom it `trusts`; where the answer to that is a future, nothing
    is read until that is done. `whose` tells to whom a destination belongs. `on_lost` is
    called once when the bus is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        max_message: int,
        on_call: Callable[[frame.Frame], None] | None,
        on_signal: Callable[[frame.Frame], None] | None,
        on_lost: Callable[[str], None],
        broadcasts: bool = False,
        close_fds: Callable[[Iterable[int], str], None] = _close_fds,
        muted: Collection[bytes] = frozenset(),
        is_wary: Callable[[], bool] = lambda: False,
        trusts: Callable[[str], bool | asyncio.Future[None]] = lambda sender: True,
        whose: Callable[[str], Hashable] = str,
    ) -> None:
        self._socket = sock
        types = [frame.METHOD_RETURN, frame.ERROR]
        types += [frame.METHOD_CALL] if on_call else []
        types += [frame.SIGNAL] if on_signal else []
        self._reader = frame.Reader(max_message, muted, types, broadcasts=broadcasts)
        self._on_call = on_call
        self._on_signal = on_signal
        self._on_lost = on_lost
        self._close_fds = close_fds
        # One for all, because so many large ones in turn leave the heap in pieces.
        self._chunk = memoryview(bytearray(_CHUNK))
        self._unwanted: dict[str, list[int]] = {}
        self._muted = muted
        self._fd_flood = False
        """Whether the last fds came from somebody muted, so that the next ones will, too."""
        self._is_wary = is_wary
        self._trusts = trusts
        self._loop = asyncio.get_running_loop()
        self._serial = 0
        self.name = ""
        """Our unique name."""
        self._calls: dict[int, tuple[str, asyncio.Future[tuple[codec.Message, list[OwnedFd]]]]] = {}
        self._outbox = Outbox(sock, self._lose, whose)
        self._lost = False
        self._loop.add_reader(sock, self._readable)

    # --- outgoing -------------------------------------------------------------------------------

    async def hello(self) -> None:
        """Say hello to the bus, which serves nobody before that."""
        (self.name,) = await self.call_bus("Hello", "", [])

    async def call_bus(
        self, member: str, signature: str, body: Sequence[Any], *, timeout: float = 10.0
    ) -> list[Any]:
        """Call a method of the bus itself and return the body of the reply."""
        return await self.call(
            BUS_NAME, BUS_PATH, BUS_NAME, member, signature, body, timeout=timeout
        )

    async def user_of(self, name: str) -> int:
        """Ask the bus for the uid of a connection."""
        (uid,) = await self.call_bus("GetConnectionUnixUser", "s", [name])
        return int(uid)

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None,
        interactive: bool = False,
        fds: Sequence[int] = (),
    ) -> list[Any]:
        """Call a method and return the reply's body; fds in the reply are closed.

        Raises the error that the reply names, RefusedByBus where it is the bus that is full,
        TimedOut after `timeout` seconds, BusError.
        """
        reply, reply_fds = await self.call_with_fds(
            destination,
            path,
            interface,
            member,
            signature,
            body,
            timeout=timeout,
            interactive=interactive,
            fds=fds,
        )
        for fd in reply_fds:
            fd.close()
        return reply

    async def call_with_fds(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None,
        interactive: bool = False,
        fds: Sequence[int] = (),
    ) -> tuple[list[Any], list[OwnedFd]]:
        """As `call`, and return the reply's fds too, which the caller owns then."""
        serial = self._next_serial()
        message = codec.method_call(
            destination,
            path,
            interface,
            member,
            signature,
            body,
            serial=serial,
            fds=fds,
            interactive=interactive,
        )
        future: asyncio.Future[tuple[codec.Message, list[OwnedFd]]] = self._loop.create_future()
        self._calls[serial] = (destination, future)
        try:
            self._send(message, destination)
            async with asyncio.timeout(timeout):
                reply, reply_fds = await future
        except TimeoutError as exc:
            raise errors.TimedOut(f"{destination} did not answer {member} in time") from exc
        finally:
            del self._calls[serial]
        if reply.message_type == codec.MessageType.ERROR:
            for fd in reply_fds:
                fd.close()
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else ""
            error = errors.by_name(reply.error_name or "", text)
            if isinstance(error, errors.LimitsExceeded) and reply.sender == BUS_NAME:
                error = errors.RefusedByBus(text)
            raise error
        return reply.body, reply_fds

    @property
    def sent(self) -> int:
        """The bytes sent so far, or waiting to be."""
        return self._outbox.total

    def reply(
        self, to: frame.Header, signature: str, body: Sequence[Any], fds: Sequence[int] = ()
    ) -> asyncio.Future[None]:
        """Answer a call; the fds must stay open until the future is done."""
        message = codec.method_return(
            to.sender, to.serial, signature, body, serial=self._next_serial(), fds=fds
        )
        return self._send(message, to.sender)

    def reply_error(self, to: frame.Header, name: str, text: str) -> asyncio.Future[None]:
        """Answer a call with an error."""
        message = codec.error(to.sender, to.serial, name, text, serial=self._next_serial())
        return self._send(message, to.sender)

    def emit(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        destination: str = "",
    ) -> None:
        """Send a signal to everyone who listens, or to one; nobody does once the bus is lost."""
        if self._lost:
            return
        message = codec.signal(
            path,
            interface,
            member,
            signature,
            body,
            serial=self._next_serial(),
            destination=destination,
        )
        self._outbox.put(codec.serialize(message), (), destination, soon=True)

    async def drain(self) -> None:
        """Wait until all that was sent is with the bus."""
        await self._outbox.drain()

    def close(self) -> None:
        """Close the connection without telling `on_lost`."""
        if not self._lost:
            self._lost = True
            self._finish(BusError("the connection was closed"))

    def _next_serial(self) -> int:
        self._serial = self._serial % 0xFFFFFFFF + 1  # 0 is none
        return self._serial

    def _send(self, message: codec.Message, destination: str) -> asyncio.Future[None]:
        if self._lost:
            raise BusError("the connection to the bus is lost")
        return self._outbox.put(codec.serialize(message), message.unix_fds, destination)

    # --- incoming -------------------------------------------------------------------------------

    def _readable(self) -> None:
        end = time.monotonic() + _SLICE
        try:
            while not self._lost and (piece := self._receive()):
                data, fds, lost = piece
                if not data:
                    self._lose("the bus closed the connection")
                    break
                for incoming in self._reader.feed(data, fds, fds_lost=lost):
                    self._dispatch(incoming)
                if time.monotonic() > end:
                    break  # the event loop calls again after the others
        except BlockingIOError:
            pass
        except frame.MalformedStream as exc:
            self._lose(f"the bus sent what is no message: {exc}")
        except OSError as exc:
            self._lose(f"cannot read from the bus: {exc.strerror}")
        # Once for all that came: in a flood of fds, handing over each would cost most.
        self._close_unwanted()

    def _receive(self) -> tuple[memoryview, list[int], bool] | None:
        """The next piece of the stream, for use at once, its fds, and whether some are lost.

        None if it has to wait until its sender is known.
        """
        chunk, room = self._chunk, _ROOM_FOR_FDS
        wary = self._is_wary()
        if self._fd_flood or wary:
            # An fd that has a number with us must be closed. One without room the kernel drops,
            # which costs less, and flushes nothing.
            size, _, flags, _ = self._socket.recvmsg_into([chunk], 0, _PEEK)
            chunk = chunk[:size]
            sender = self._reader.last_sender(chunk)
            self._fd_flood = sender.encode() in self._muted
            if self._fd_flood:
                room = 0
            elif wary and flags & _LOST:
                trusted = self._trusts(sender)
                if isinstance(trusted, asyncio.Future):
                    self._pause(trusted)
                    return None
                room = room if trusted else 0
        size, ancillary, flags, _ = self._socket.recvmsg_into([chunk], room, _RECEIVE)
        fds = [
            fd
            for level, kind, content in ancillary
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
            for (fd,) in struct.iter_unpack("i", content[: len(content) // 4 * 4])
        ]
        return chunk[:size], fds, bool(flags & _LOST)

    def _close_unwanted(self) -> None:
        for sender, unwanted in self._unwanted.items():
            self._close_fds(unwanted, sender)
        self._unwanted.clear()

    def _pause(self, until: asyncio.Future[None]) -> None:
        """Read no more until something is done."""
        self._loop.remove_reader(self._socket)
        until.add_done_callback(self._resume)

    def _resume(self, _: asyncio.Future[None]) -> None:
        if not self._lost:
            self._loop.add_reader(self._socket, self._readable)

    def _dispatch(self, incoming: frame.Frame) -> None:
        try:
            header = incoming.header
            if header is None:
                return
            if header.type == frame.METHOD_CALL and self._on_call:
                self._on_call(incoming)
            elif header.type == frame.SIGNAL and self._on_signal:
                # After the news of a sender's end it is not known whose they are.
                self._close_unwanted()
                self._on_signal(incoming)
            elif header.type in (frame.METHOD_RETURN, frame.ERROR):
                self._on_reply(header, incoming)
        # A bug that one message shows must not cost the ones read with it, or their fds.
        except Exception:
            log.exception("a message could not be taken")
        finally:
            # Whatever nobody has taken by now, nobody will.
            if incoming.fds:
                self._fd_flood |= incoming.muted
                self._unwanted.setdefault(incoming.sender, []).extend(incoming.fds)

    def _on_reply(self, header: frame.Header, incoming: frame.Frame) -> None:
        destination, future = self._calls.get(header.reply_serial, ("", None))
        if future is None or future.done():
            return
        # A well-known name answers under its owner's unique one, the bus as itself.
        if (destination[0] == ":" or destination == BUS_NAME) and header.sender != destination:
            return
        if incoming.fds_lost:
            future.set_exception(errors.Failed("the file descriptors of a reply were lost"))
            return
        try:
            reply = codec.parse(incoming.data)
        except codec.MalformedMessage as exc:
            log.warning("%s sent a reply that cannot be read: %s", header.sender, exc)
            future.set_exception(errors.Failed("the reply cannot be read"))
            return
        close = partial(self._close_one, sender=incoming.sender)
        fds = [OwnedFd(fd, close) for fd in incoming.fds]
        incoming.fds = []
        future.set_result((reply, fds))

    def _close_one(self, fd: int, sender: str) -> None:
        self._close_fds([fd], sender)

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            self._finish(BusError(why))
            self._on_lost(why)

    def _finish(self, error: BusError) -> None:
        self._loop.remove_reader(self._socket)
        self._outbox.close()
        self._socket.close()
        self._close_fds(self._reader.take_fds(), "")
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(error)
