# SPDX-License-Identifier: LGPL-2.1-or-later
"""The serving end of the bus: who calls, with which fds, within which bounds, and how it ends.

Every method call goes one way: admitted from its header, parsed, its fds matched one by one with
the method's signature, answered by exactly one reply. What a method means is the service's.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from . import codec, frame, wire
from .access import ROOT, Caller, Client
from .config import Limits
from .errors import BusError, Failed, InvalidArgs, LimitsExceeded, LoopError, from_os_error
from .fd import OwnedFd
from .tasks import Tasks
from .threads import Threads

log = logging.getLogger(__name__)

MAX_MESSAGE = 128 * 1024

_REQUEST_NAME_DO_NOT_QUEUE = 4
_PRIMARY_OWNER = 1


class Authorization(Enum):
    """Who decides whether a method may be called. There is no default."""

    FREE = "anyone may: it only tells what is public"
    MANAGER = "the manager asks for what the table in `access` demands"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as it is served; the handler gets the caller, the object and the arguments."""

    name: str
    in_signature: str
    out_signature: str
    authorization: Authorization
    handler: Callable[..., Awaitable[tuple[Any, ...]]]


Find = Callable[[str, str, str], tuple[Method, Any]]
"""Path, interface (may be empty) and member to the method and its object; raises LoopError."""


class _Session:
    """What is known of a connection that has called us."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.left: asyncio.Future[None] = loop.create_future()
        self.client: Client | None = None
        self.identified = asyncio.Lock()
        self.calls = 0


class Bus:
    """Our place on the bus."""

    def __init__(
        self,
        connection: Callable[..., wire.Connection],
        limits: Limits,
        threads: Threads,
        *,
        find: Find,
        before_reply: Callable[[], None],
        client_left: Callable[[Client], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._limits = limits
        self._threads = threads
        self._find = find
        self._before_reply = before_reply
        self._client_left = client_left
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[str, _Session] = {}
        self._calls = 0
        self._calls_of_user: Counter[int] = Counter()
        self._tasks = Tasks()
        self.connection = connection(
            max_message=MAX_MESSAGE,
            on_call=self._on_call,
            on_signal=self._on_signal,
            on_lost=on_lost,
            close_fd=threads.close_fd,
        )

    async def start(self) -> None:
        """Say hello, and hear of every connection that closes from now on."""
        await self.connection.hello()
        # The bus keeps order: the news of a client's end comes after its last message.
        await self.connection.call_bus(
            "AddMatch",
            "s",
            [
                (
                    f"type='signal',sender='{wire.BUS_NAME}',path='{wire.BUS_PATH}',"
                    f"interface='{wire.BUS_NAME}',member='NameOwnerChanged',arg2=''"
                )
            ],
        )

    async def own(self, name: str) -> None:
        """Take a well-known name; whoever waits for it is served from now on.

        Raises BusError if another process has it.
        """
        (answer,) = await self.connection.call_bus(
            "RequestName", "su", [name, _REQUEST_NAME_DO_NOT_QUEUE]
        )
        if answer != _PRIMARY_OWNER:
            raise BusError(f"another process owns {name} already")

    def emit(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[Any],
        *,
        uid: int | None = None,
    ) -> None:
        """Send a signal to everyone, or to the connections of one user that have called us."""
        if uid is None:
            self.connection.emit(path, interface, member, signature, body)
            return
        for name, session in self._sessions.items():
            if session.client and session.client.uid == uid:
                self.connection.emit(path, interface, member, signature, body, destination=name)

    async def release(self, name: str, timeout: float) -> None:
        """Give up a name, and answer the calls that came for it, for at most `timeout` seconds."""
        try:
            await self.connection.call_bus("ReleaseName", "s", [name], timeout=timeout)
        except (LoopError, BusError) as exc:
            log.debug("cannot release %s: %s", name, exc)
        await self._tasks.finish(timeout)

    async def leave(self, timeout: float) -> None:
        """Leave the bus when it has taken what was written, after `timeout` seconds at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.connection.drain(), timeout)
        self.connection.close()

    # --- clients --------------------------------------------------------------------------------

    def _on_signal(self, incoming: frame.Frame) -> None:
        header = incoming.header
        if (
            header is None
            or header.sender != wire.BUS_NAME
            or header.member != "NameOwnerChanged"
            or header.signature != "sss"
        ):
            return
        name, _, new_owner = codec.parse(incoming.data).body
        if new_owner or not (session := self._sessions.pop(name, None)):
            return
        session.left.set_result(None)
        if session.client:
            self._client_left(session.client)

    async def _identify(self, session: _Session) -> Client:
        """Who a connection is, which the bus knows and which never changes."""
        async with session.identified:
            if session.client is None:
                (uid,) = await self.connection.call_bus(
                    "GetConnectionUnixUser", "s", [session.name]
                )
                session.client = Client(session.name, uid, session.left)
        session.client.require_present()
        return session.client

    # --- calls ----------------------------------------------------------------------------------

    def _on_call(self, incoming: frame.Frame) -> None:
        header = incoming.header
        if header is None or not header.sender:
            return
        try:
            self._admit(header, incoming)
        except LoopError as exc:
            self._answer_error(header, exc)

    def _admit(self, header: frame.Header, incoming: frame.Frame) -> None:
        """Take on a call and its fds, or raise; synchronous, so that nothing is left half-owned."""
        if not incoming.data:
            raise LimitsExceeded(f"a message may have {MAX_MESSAGE} bytes at most")
        session = self._sessions.get(header.sender)
        if session is None:
            session = self._sessions[header.sender] = _Session(header.sender, self._loop)
        if session.calls >= self._limits.calls_per_connection:
            raise LimitsExceeded(
                f"{session.calls} calls of this connection are under way: wait for their answers"
            )
        if self._calls >= self._limits.calls:
            raise LimitsExceeded("too many calls are under way: try again later")
        if session.client:
            self._require_room(session.client)
        method, target = self._find(header.path, header.interface, header.member)
        if header.signature != method.in_signature:
            raise InvalidArgs(
                f"{method.name} takes arguments of the signature '{method.in_signature}', "
                f"not '{header.signature}'"
            )
        if incoming.fds_lost:
            raise LimitsExceeded("the file descriptors did not arrive: try again later")
        # Checked before parsing: a variant may hold a handle too, and no option of ours does.
        wanted = method.in_signature.count("h")
        if not len(incoming.fds) == header.unix_fds == wanted:
            raise InvalidArgs(
                f"{method.name} takes {wanted} file descriptors, and {len(incoming.fds)} came"
            )
        try:
            arguments = codec.parse(incoming.data).body
        except codec.MalformedMessage as exc:
            log.debug("a message of %s cannot be read: %s", header.sender, exc)
            raise InvalidArgs("the message cannot be read") from exc
        arguments = self._with_fds(method, arguments, incoming)
        session.calls += 1
        self._calls += 1
        self._tasks.start(self._serve(session, header, method, target, arguments))

    def _with_fds(self, method: Method, arguments: list[Any], incoming: frame.Frame) -> list[Any]:
        """Put fds that we own in the place of their indices, each used exactly once."""
        # A handle is always an argument of its own in our signatures, so its place is known.
        places = [
            place
            for place, kind in enumerate(codec.argument_types(method.in_signature))
            if kind == "h"
        ]
        if sorted(arguments[place] for place in places) != [*range(len(incoming.fds))]:
            raise InvalidArgs(f"{method.name} got a handle that is no file descriptor it passed")
        fds, incoming.fds = incoming.fds, []
        for place in places:
            arguments[place] = OwnedFd(fds[arguments[place]], self._threads.close_fd)
        return arguments

    def _require_room(self, client: Client) -> None:
        """Raise LimitsExceeded if the user has too many calls under way; root is not bound."""
        if client.uid != ROOT and self._calls_of_user[client.uid] >= self._limits.calls_per_user:
            raise LimitsExceeded("too many calls of this user are under way: try again later")

    async def _serve(
        self,
        session: _Session,
        header: frame.Header,
        method: Method,
        target: object,
        arguments: list[Any],
    ) -> None:
        uid = None
        try:
            client = await self._identify(session)
            self._require_room(client)
            uid = client.uid
            self._calls_of_user[uid] += 1
            interactive = bool(header.flags & frame.ALLOW_INTERACTIVE_AUTHORIZATION)
            result = await method.handler(Caller(client, interactive), target, *arguments)
            await self._answer(header, method, result)
        except LoopError as exc:
            self._answer_error(header, exc)
        except OSError as exc:
            self._answer_error(header, from_os_error(exc, method.name))
        except BusError as exc:
            log.debug("no answer to %s: %s", header.sender, exc)
        # Whatever else comes up is a bug of ours: the log has it whole, the caller none of it.
        except Exception:
            log.exception("%s of %s failed", method.name, header.sender)
            self._answer_error(header, Failed("loopd failed; its log says why"))
        finally:
            for argument in arguments:
                if isinstance(argument, OwnedFd):
                    argument.close()
            session.calls -= 1
            self._calls -= 1
            if uid is not None:
                self._calls_of_user[uid] -= 1
                if not self._calls_of_user[uid]:
                    del self._calls_of_user[uid]

    async def _answer(self, header: frame.Header, method: Method, result: tuple[Any, ...]) -> None:
        self._before_reply()
        fds = [value for value in result if isinstance(value, OwnedFd)]
        try:
            if header.flags & frame.NO_REPLY_EXPECTED:
                return
            body = [fds.index(value) if isinstance(value, OwnedFd) else value for value in result]
            written = self.connection.reply(
                header, method.out_signature, body, [fd.fileno() for fd in fds]
            )
            if fds:
                # They have to stay open until the bus has them.
                await asyncio.wait([written])
        finally:
            for fd in fds:
                # Not with the clients' files: these never hang, and a device waits for them.
                self._tasks.start(self._threads.run(fd.move().close))

    def _answer_error(self, header: frame.Header, error: LoopError) -> None:
        if header.flags & frame.NO_REPLY_EXPECTED:
            return
        try:
            self.connection.reply_error(header, error.dbus_name, str(error))
        except BusError as exc:
            log.debug("no answer to %s: %s", header.sender, exc)
