# SPDX-License-Identifier: LGPL-2.1-or-later
"""The serving end of the bus: who calls, with which fds, within which bounds, and how it ends.

Every method call goes one way: counted, its caller identified, put in its user's turn, admitted
from its header, parsed, its fds matched one by one with the method's signature, answered by exactly
one reply. One that is too many is told so from its header, or its sender is muted. What a method
means is the service's.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from loopd.bus import codec, frame, transport
from loopd.daemon.access import ROOT, Caller, Client
from loopd.daemon.config import Limits
from loopd.daemon.quota import share
from loopd.daemon.tasks import Tasks, charging
from loopd.daemon.threads import Threads, Work
from loopd.errors import BusError, Failed, LimitsExceeded, LoopError, from_os_error
from loopd.fd import OwnedFd

from .backlog import Backlog, Unread
from .call import Authorization, Call, Method, note_end
from .caller_state import Session
from .fair_queue import Account, Turns

log = logging.getLogger(__name__)

# A connection to which so many refusals are still to be told is not heard for a while.
_MAX_REFUSALS = 16
# Seconds for which nothing is read until the bus says whose fds come next.
_PATIENCE = 0.1
_STATS = f"{transport.BUS_NAME}.Debug.Stats"
_BUG = "loopd failed; its log says why"
_TOO_MANY = "too many calls are under way: try again later"

_REQUEST_NAME_DO_NOT_QUEUE = 4
_PRIMARY_OWNER = 1


Find = Callable[[int, str, str, str], tuple[Method, Any]]
"""The caller's uid, path, interface (may be empty) and member to the method and its object; raises
LoopError."""


class Bus:
    """Our place on the bus."""

    def __init__(
        self,
        connection: Callable[..., transport.Connection],
        limits: Limits,
        threads: Threads,
        *,
        who_is: Callable[[str], Awaitable[int]],
        find: Find,
        before_reply: Callable[[], None],
        client_left: Callable[[Client], None],
        on_quiet: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._limits = limits
        self._threads = threads
        self._who_is = who_is
        self._find = find
        self._before_reply = before_reply
        self._client_left = client_left
        self._on_quiet = on_quiet
        self._quiet = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[str, Session] = {}
        self._calls = 0
        self._calls_of_nobody = 0
        """Those of connections that we do not know yet."""
        self._turns = Turns()
        self._muted: set[bytes] = set()
        self._patient = True
        """Whether the bus last said in time who somebody is."""
        self._tasks = Tasks()
        self._backlog = Backlog(self._turns, self._tasks, self._unread, self._held)
        self.connection = connection(
            max_message=codec.MAX_MESSAGE,
            on_call=self._on_call,
            on_signal=self._on_signal,
            on_lost=on_lost,
            broadcasts=True,
            close_fds=self._close_fds,
            muted=self._muted,
            is_wary=lambda: threads.closes.crowded,
            trusts=self._trusts,
            whose=self._whose,
        )

    @property
    def busy(self) -> bool:
        """Whether calls are under way."""
        return bool(self._calls or self._calls_of_nobody)

    async def start(self) -> None:
        """Say hello, and hear of every connection that closes from now on."""
        await self.connection.hello()
        # The bus keeps order: the news of a client's end comes after its last message.
        await self.connection.call_bus(
            "AddMatch",
            "s",
            [
                (
                    f"type='signal',sender='{transport.BUS_NAME}',path='{transport.BUS_PATH}',"
                    f"interface='{transport.BUS_NAME}',member='NameOwnerChanged',arg2=''"
                )
            ],
        )

    async def rejoin(self, name: str) -> Client | None:
        """Take up a connection that a former loopd has served; None if it has left.

        Raises BusError if the bus does not say.
        """
        session = self._session(name)
        (is_there,) = await self.connection.call_bus("NameHasOwner", "s", [name])
        if is_there and session.client is None:
            await self._identified(session)
        if session.left.done() or not is_there:
            self._sessions.pop(name, None)
            return None
        if session.client is None:
            raise BusError(f"the bus does not say who {name} is")
        return session.client

    async def id(self) -> str:
        """The id of this bus, which another one has not."""
        (told,) = await self.connection.call_bus("GetId", "", [])
        return str(told)

    async def ping(self) -> None:
        """Return when the bus has answered where it answers our clients."""
        await self.connection.call_bus("GetId", "", [])

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
        owner: int,
        private: bool = False,
    ) -> None:
        """Send a signal about a user's device to everyone, or if private to those who have called.

        The latter are the user's own connections.
        """
        if not private:
            if self._backlog.is_told(owner):
                before = self.connection.sent
                self.connection.emit(path, interface, member, signature, body)
                self._backlog.signalled(owner, self.connection.sent - before)
            return
        for name, session in self._sessions.items():
            if session.client and session.client.uid == owner:
                self.connection.emit(path, interface, member, signature, body, destination=name)

    async def release(self, name: str, timeout: float) -> None:
        """Give up a name, and answer the calls that came for it, for at most `timeout` seconds."""
        try:
            await self.connection.call_bus("ReleaseName", "s", [name], timeout=timeout)
        except (LoopError, BusError) as exc:
            log.debug("cannot release %s: %s", name, exc)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.busy:
                    self._quiet.clear()
                    await self._quiet.wait()

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
            or header.sender != transport.BUS_NAME
            or header.member != "NameOwnerChanged"
            or header.signature != "sss"
        ):
            return
        name, _, new_owner = codec.parse(incoming.data).body
        if new_owner or not (session := self._sessions.pop(name, None)):
            return
        session.left.set_result(None)
        if session.account:
            session.account.sessions -= 1
            self._backlog.left(session.account, name)
        if session.client:
            with charging(session.charge):
                self._client_left(session.client)

    def _session(self, name: str) -> Session:
        session = self._sessions.get(name)
        if session is None:
            session = self._sessions[name] = Session(name, self._loop.create_future())
        return session

    def _identified(self, session: Session) -> asyncio.Task[None]:
        """What is done when it is known who a connection is, or that nobody says so."""
        if session.identifying is None or session.identifying.done():
            with charging(session.charge):
                session.identifying = self._tasks.start(self._identify(session))
        return session.identifying

    async def _identify(self, session: Session) -> None:
        """Find out who a connection is, which the bus knows and which never changes."""
        try:
            uid = await self._who_is(session.name)
        except (LoopError, BusError) as exc:
            # It has left, or the bus has.
            log.debug("nobody knows who %s is: %s", session.name, exc)
        else:
            session.client = Client(session.name, uid, session.left)
            session.account = self._turns.account(uid)
            session.account.sessions += not session.left.done()
            session.charge(session.spent)
            self._patient = True
        waiting, session.waiting = session.waiting, []
        self._calls_of_nobody -= len(waiting)
        for call in waiting:
            self._calls += 1
            if session.client and session.account:
                self._admit(session, session.client, session.account, call)
            else:
                self._answer_error(call.header, Failed("the bus does not say who is calling"))
                self._end(session, call)

    # --- calls ----------------------------------------------------------------------------------

    def _on_call(self, incoming: frame.Frame) -> None:
        start = time.thread_time()
        header = incoming.header
        if header is None or not header.sender:
            return
        session = self._session(header.sender)
        try:
            self._require_room(session, incoming)
        except LimitsExceeded as exc:
            self._refuse(session, header, exc)
        else:
            self._take(session, header, incoming)
        session.charge(time.thread_time() - start)

    def _require_room(self, session: Session, incoming: frame.Frame) -> None:
        """Raise LimitsExceeded if the message is too large, or too many are under way."""
        if not incoming.data:
            raise LimitsExceeded(f"a message may have {codec.MAX_MESSAGE} bytes at most")
        if session.calls >= self._limits.calls_per_connection:
            raise LimitsExceeded(
                f"{session.calls} calls of this connection are under way: wait for their answers"
            )
        # Of each stranger one call is taken: it may be root's.
        if self._calls_of_nobody >= self._limits.calls and session.waiting:
            raise LimitsExceeded(_TOO_MANY)

    def _refuse(self, session: Session, header: frame.Header, error: LimitsExceeded) -> None:
        """Tell that a call is too many, when it is its user's turn, or hear no more of them."""
        name = session.name.encode()
        if name in self._muted:
            return
        if session.refusals >= _MAX_REFUSALS:
            self._muted.add(name)
            self._loop.call_later(session.silence(self._loop.time()), self._muted.discard, name)
            return
        session.refusals += 1
        tell = partial(self._tell, session, header, error)
        if session.account:
            session.account.flood()
            self._turns.add(session.account, tell)
        else:
            self._loop.call_soon(tell)

    def _tell(self, session: Session, header: frame.Header, error: LimitsExceeded) -> None:
        start = time.thread_time()
        session.refusals -= 1
        self._answer_error(header, error)
        session.charge(time.thread_time() - start)

    def _take(self, session: Session, header: frame.Header, incoming: frame.Frame) -> None:
        fds, incoming.fds = incoming.fds, []
        close = partial(self._close_fd, session)
        owned = [OwnedFd(fd, close) for fd in fds]
        call = Call(header, incoming.data, owned, incoming.fds_lost)
        session.calls += 1
        if session.client and session.account:
            self._calls += 1
            self._admit(session, session.client, session.account, call)
            return
        self._calls_of_nobody += 1
        session.waiting.append(call)
        self._identified(session)

    def _admit(self, session: Session, client: Client, account: Account, call: Call) -> None:
        """Have a call served when it is its user's turn, or refuse it."""
        account.calls += 1
        try:
            self._require_place(client.uid, account)
        except LimitsExceeded as exc:
            self._refuse(session, call.header, exc)
            self._end(session, call)
        else:
            begin = partial(self._begin, session, client, call)
            self._turns.add(account, begin, partial(self._give_way, session, call))

    def _require_place(self, uid: int, account: Account) -> None:
        """Raise LimitsExceeded if a user, this call included, has too many, and no other more."""
        limits = self._limits
        most = limits.calls_per_user if account.proven else limits.calls_per_connection
        if uid != ROOT and account.calls > min(most, limits.calls_per_user):
            raise LimitsExceeded("too many calls of this user are under way: try again later")
        root = self._turns.account(ROOT).calls
        others = self._calls - account.calls - (root if uid != ROOT else 0)
        places = share(uid, of_root=root, of_others=others, in_all=limits.calls)
        if account.calls > places and not self._turns.give_way(account):
            raise LimitsExceeded(_TOO_MANY)

    def _give_way(self, session: Session, call: Call) -> None:
        """Refuse a call that waits, in favour of a user who has fewer."""
        self._answer_error(call.header, LimitsExceeded(_TOO_MANY))
        self._end(session, call)

    def _whose(self, name: str) -> object:
        """The user of a connection; those that we do not know yet are as one."""
        if name == transport.BUS_NAME:
            return name
        session = self._sessions.get(name)
        return session.account.uid if session and session.account else None

    def _close_fd(self, session: Session, fd: int) -> None:
        self._threads.close_fd(fd, owner=session.owner)

    def _close_fds(self, fds: Iterable[int], sender: str) -> None:
        session = self._sessions.get(sender)
        self._threads.close_fds(fds, session.owner if session else None)

    def _trusts(self, sender: str) -> bool | asyncio.Future[None]:
        """Whether fds of a sender are taken while closing those of others may take for ever.

        A future says that it is not known yet whose they are, and is done before long.
        """
        if not sender:
            return False
        session = self._session(sender)
        if session.account:
            return not self._threads.closes.is_full(session.owner)
        if session.awaited is None and self._patient:
            session.awaited = self._tasks.start(self._await_identity(session))
        if session.awaited is None or session.awaited.done():
            return False
        return session.awaited

    async def _await_identity(self, session: Session) -> None:
        """Wait until it is known who a connection is, at its user's expense and not for long."""
        start = time.monotonic()
        done, _ = await asyncio.wait([self._identified(session)], timeout=_PATIENCE)
        # One who is late may be late with the answer about anybody.
        self._patient = bool(done)
        session.charge(time.monotonic() - start)

    def _begin(self, session: Session, client: Client, call: Call) -> None:
        """Serve a call, or refuse it; synchronous, so that nothing is left half-owned."""
        start = time.thread_time()
        header = call.header
        try:
            client.require_present()
            method, target = self._find(client.uid, header.path, header.interface, header.member)
            arguments = call.arguments(method)
        except LoopError as exc:
            self._answer_error(header, exc)
            self._end(session, call)
        # A bug of ours: it costs this call, not its place and its fds.
        except Exception:
            log.exception("a call of %s cannot be begun", header.sender, extra=client.fields)
            self._answer_error(header, Failed(_BUG))
            self._end(session, call)
        else:
            with charging(session.charge):
                self._tasks.start(self._serve(session, client, call, method, target, arguments))
        session.charge(time.thread_time() - start)

    def _end(self, session: Session, call: Call) -> None:
        """Close what came with a call and nobody has taken, and count it no more."""
        for fd in call.fds:
            fd.close()
        session.calls -= 1
        self._calls -= 1
        if session.account:
            session.account.calls -= 1
        if not self.busy:
            self._quiet.set()
            self._on_quiet()

    async def _serve(
        self,
        session: Session,
        client: Client,
        call: Call,
        method: Method,
        target: object,
        arguments: list[Any],
    ) -> None:
        header = call.header
        caller = Caller(client, bool(header.flags & frame.ALLOW_INTERACTIVE_AUTHORIZATION))
        try:
            result = await method.handler(caller, target, *arguments)
            if session.account and method.authorization is Authorization.MANAGER:
                session.account.proven = True
            note_end(caller, method, "done")
            await self._answer(session, header, client, method, result)
        except LoopError as exc:
            note_end(caller, method, exc.dbus_name)
            self._answer_error(header, exc)
        except OSError as exc:
            error = from_os_error(exc, method.name)
            note_end(caller, method, error.dbus_name)
            self._answer_error(header, error)
        except BusError as exc:
            log.debug("no answer to %s: %s", header.sender, exc)
        # Whatever else comes up is a bug of ours: the log has it whole, the caller none of it.
        except Exception:
            log.exception("%s of %s failed", method.name, header.sender, extra=client.fields)
            self._answer_error(header, Failed(_BUG))
        finally:
            self._end(session, call)

    async def _answer(
        self,
        session: Session,
        header: frame.Header,
        client: Client,
        method: Method,
        result: tuple[Any, ...],
    ) -> None:
        fds = [value for value in result if isinstance(value, OwnedFd)]
        try:
            if session.account:
                await self._backlog.room(session.account, client.left)
            self._before_reply()
            if header.flags & frame.NO_REPLY_EXPECTED:
                return
            body = [fds.index(value) if isinstance(value, OwnedFd) else value for value in result]
            before = self.connection.sent
            written = self.connection.reply(
                header, method.out_signature, body, [fd.fileno() for fd in fds]
            )
            self._sends(header.sender, written, before, len(fds))
            if fds:
                # They have to stay open until the bus has them.
                await asyncio.wait([written])
        finally:
            for fd in fds:
                # Not with the clients' files: these are devices, whose ends may wait for them.
                close = fd.move().close
                self._tasks.start(self._threads.run_in_turn(client.uid, Work.ENDING, close))

    def _answer_error(self, header: frame.Header, error: LoopError) -> None:
        if header.flags & frame.NO_REPLY_EXPECTED:
            return
        try:
            before = self.connection.sent
            written = self.connection.reply_error(header, error.dbus_name, str(error))
            self._sends(header.sender, written, before)
        except BusError as exc:
            log.debug("no answer to %s: %s", header.sender, exc)

    def _sends(self, name: str, written: asyncio.Future[None], before: int, fds: int = 0) -> None:
        """Note an answer, at the expense of its user; `before` is what had been sent before it."""
        session = self._sessions.get(name)
        if session and session.account:
            self._turns.sends(session.account, written)
            self._backlog.sent(session.account, name, self.connection.sent - before, fds)

    async def _unread(self, name: str) -> Unread:
        """Ask the bus what it holds for a connection, after all that we have sent so far."""
        told = await self._stats(name)
        return Unread(told["OutgoingBytes"].value, told["OutgoingFDs"].value)

    async def _held(self) -> int:
        """Ask the bus how many bytes it holds of ours."""
        told = await self._stats(self.connection.name)
        return int(told["IncomingBytes"].value)

    async def _stats(self, name: str) -> dict[str, codec.Variant]:
        (told,) = await self.connection.call(
            transport.BUS_NAME,
            transport.BUS_PATH,
            _STATS,
            "GetConnectionStats",
            "s",
            [name],
            timeout=10.0,
        )
        stats: dict[str, codec.Variant] = told
        return stats
