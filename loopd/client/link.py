# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client's connection to loopd: calls, their deadlines and fds, and what no answer means.

It knows the name of loopd, none of its methods, and keeps nothing of the devices.
"""

import asyncio
import re
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

from loopd import errors
from loopd.bus import codec, dial, transport
from loopd.fd import OwnedFd

from . import absence
from .absence import Unavailable
from .watch import NAME, PROPERTIES, Ended, Watch

_T = TypeVar("_T")

# Longer than loopd itself takes before it gives up, with time for its start.
_TIMEOUT = 90.0
_INTERACTIVE_TIMEOUT = 400.0
# Seconds between the attempts to have a call passed on by a bus that is full: 5 s in all, most of
# them so short that a flood of others, of which every few messages get through, costs little.
_PAUSES = (0.002,) * 50 + (0.01,) * 90 + (0.1,) * 40
_MAX_MESSAGE = 64 << 20  # all objects of a machine come in one reply
# What is said by the bus, or by whoever starts services for it, when there is no loopd.
_NOT_THERE = re.compile(
    r"org\.freedesktop\.DBus\.Error\."
    r"(ServiceUnknown|NameHasNoOwner|TimedOut|Spawn\..+)|org\.freedesktop\.systemd1\..+"
)
_NO_REPLY = "org.freedesktop.DBus.Error.NoReply"
_LIMITS = {"t": 1 << 64, "u": 1 << 32}

Options = dict[str, codec.Variant]
Checks = Sequence[Callable[[Any], bool]]


class Unanswered(Unavailable):
    """loopd left before it answered, and nobody knows whether it did what it was asked to do."""


class Disconnected(errors.BusError):
    """The connection to the bus is lost, and what was bound to it is over; see Client.reconnect."""


class Link:
    """One connection at a time, over which anything can be asked of loopd."""

    def __init__(
        self,
        connection: transport.Connection,
        watch: Watch,
        interactive: bool,
        *,
        address: str = "",
    ) -> None:
        self._connection = connection
        self.watch = watch
        self._interactive = interactive
        self._address = address
        self._tasks: set[asyncio.Task[Any]] = set()
        self.name = ""
        """The unique name that the connection has on the bus."""

    @classmethod
    async def connect(cls, address: str, interactive: bool) -> Self:
        """Connect to the bus; `interactive` allows polkit to ask somebody in every call.

        Raises errors.BusError.
        """
        connection, watch, name = await _opened(address)
        link = cls(connection, watch, interactive, address=address)
        link.name = name
        return link

    async def reconnect(self) -> str:
        """Leave the bus and connect to it anew; returns the name that the old connection had.

        Raises errors.BusError, and nothing has changed then but that the old one is closed.
        """
        self.close()
        former = self.name
        self._connection, self.watch, self.name = await _opened(self._address)
        return former

    async def uid(self) -> int:
        """The uid that the bus knows us by. Raises errors.BusError."""
        return await self._connection.user_of(self.name)

    def close(self) -> None:
        """Leave the bus."""
        self._connection.close()
        self.watch.end_all(Ended.BUS_LOST)

    async def subscribe(self) -> None:
        """Have `watch` hear of devices from now on."""
        await self.watch.subscribe(self._connection)

    async def has_owner(self, name: str) -> bool:
        """Whether somebody has a name on the bus; nobody is started for it.

        Raises errors.BusError, TimedOut.
        """
        return await self._connection.call_bus("NameHasOwner", "s", [name]) == [True]

    async def property_of(self, name: str, path: str, interface: str, member: str) -> Any:
        """A property of another service's, of any type. Raises errors.LoopError, BusError."""
        body = [interface, member]
        answer = await self._connection.call(
            name, path, PROPERTIES, "Get", "ss", body, timeout=_TIMEOUT
        )
        return answer[0].value if answer and isinstance(answer[0], codec.Variant) else None

    async def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        returns: Checks = (),
        again: bool = True,
    ) -> list[Any]:
        """Call a method that takes and returns no fds; see `call_with_fds`.

        Raises Failed if the answer does not have a value for which each of `returns` is true.
        """
        answer, fds = await self.call_with_fds(
            path, interface, member, signature, body, again=again
        )
        for fd in fds:
            fd.close()
        return _checked_answer(answer, returns)

    async def call_with_fds(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        fds: Sequence[int] = (),
        *,
        again: bool = True,
    ) -> tuple[list[Any], list[OwnedFd]]:
        """Call any method of loopd; returns the body and the fds, which are the caller's then.

        What the bus does not pass on, because of what others send, is sent again for a while. What
        a loopd that left has not answered is sent to the next one, once, if it can be done `again`.
        Raises the error that loopd answers, TimedOut, Unavailable, errors.BusError.
        """
        pauses = iter(_PAUSES)
        while True:
            try:
                return await self._try(path, interface, member, signature, body, fds)
            except errors.RefusedByBus:
                # loopd has not seen the call.
                if (pause := next(pauses, None)) is None:
                    raise
                await asyncio.sleep(pause)
            except Unanswered:
                if not again:
                    raise
                again = False

    async def _try(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        fds: Sequence[int],
    ) -> tuple[list[Any], list[OwnedFd]]:
        try:
            async with absence.noticed(self._connection):
                return await self._connection.call_with_fds(
                    NAME,
                    path,
                    interface,
                    member,
                    signature,
                    body,
                    timeout=_INTERACTIVE_TIMEOUT if self._interactive else _TIMEOUT,
                    interactive=self._interactive,
                    fds=fds,
                )
        except errors.PeerError as exc:
            if exc.dbus_name == _NO_REPLY:
                raise Unanswered("loopd ended before it answered: its log may say why") from exc
            if _NOT_THERE.fullmatch(exc.dbus_name):
                why = await absence.reason(self._connection)
                raise Unavailable(why or f"there is no loopd, is it installed? ({exc})") from exc
            raise
        except Unavailable:
            raise
        except errors.BusError as exc:
            raise Disconnected(str(exc)) from exc

    def start_passing(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: Sequence[Any],
        fd: OwnedFd,
        *,
        returns: Checks,
        again: bool = True,
    ) -> asyncio.Task[list[Any]]:
        """Begin a call that passes an fd, which it owns until the end; `returns` is as in `call`.

        Who gives up waiting leaves the task running (`asyncio.shield`): a message that is still
        queued names the fd by its number.
        """

        async def call() -> list[Any]:
            with fd:
                answer, fds = await self.call_with_fds(
                    path, interface, member, signature, body, [fd.fileno()], again=again
                )
            for unexpected in fds:
                unexpected.close()
            return _checked_answer(answer, returns)

        return self.start(call())

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run something beside the caller, and keep it from being forgotten."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def is_a(kind: type) -> Callable[[Any], bool]:
    """Whether a value is of exactly this type: a bool is no number."""
    return lambda value: type(value) is kind


def _checked_answer(answer: list[Any], checks: Checks) -> list[Any]:
    if checks and not (
        len(answer) == len(checks)
        and all(check(value) for check, value in zip(checks, answer, strict=True))
    ):
        raise errors.Failed("loopd does not answer as its interface says")
    return answer


def make_options(*given: tuple[str, str, Any]) -> Options:
    """The a{sv} of what is given: key, type, and a value that None leaves out.

    Raises InvalidArgs.
    """
    return {
        key: codec.Variant(kind, checked(key, kind, value))
        for key, kind, value in given
        if value is not None
    }


def checked(key: str, kind: str, value: Any) -> Any:
    """A value of a basic type that may go onto a bus, which ends the connection over any other.

    Raises InvalidArgs, which names the key.
    """
    if kind in _LIMITS and not 0 <= value < _LIMITS[kind]:
        raise errors.InvalidArgs(f"{key}: {value} is out of range")
    if kind == "s":
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise errors.InvalidArgs(f"{key}: is not UTF-8") from exc
        if "\0" in value:
            raise errors.InvalidArgs(f"{key}: contains a null character")
    return value


async def _opened(address: str) -> tuple[transport.Connection, Watch, str]:
    """A connection that has said hello, what it hears, and its name."""
    sock = await _connected(address)
    watch = Watch()
    connection = transport.Connection(
        sock,
        max_message=_MAX_MESSAGE,
        on_call=None,  # nobody has anything to ask of a client
        on_signal=watch.on_signal,
        on_lost=lambda why: watch.end_all(Ended.BUS_LOST),
    )
    try:
        (name,) = await connection.call_bus("Hello", "", [])
    except BaseException:
        connection.close()
        raise
    return connection, watch, name


async def _connected(address: str) -> socket.socket:
    """Connect in a thread, since that blocks."""

    def close(late: asyncio.Future[socket.socket]) -> None:
        if late.exception() is None:
            late.result().close()

    loop = asyncio.get_running_loop()
    connecting = loop.run_in_executor(None, dial.connect, address)
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(close)
        raise
