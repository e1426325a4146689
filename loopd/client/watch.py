# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client hears from the bus without asking: of devices, and that one has ended, and how.

It knows object paths only, and never calls loopd itself.
"""

import asyncio
import contextlib
from collections.abc import Callable, Generator
from enum import Enum
from typing import Any, NamedTuple

from loopd import errors
from loopd.bus import codec, frame, transport

NAME = "org.example.Loop1"
PATH = "/org/example/Loop1"
DEVICE = NAME + ".Device"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PROPERTIES = "org.freedesktop.DBus.Properties"

_RULES = (
    f"type='signal',sender='{transport.BUS_NAME}',member='NameOwnerChanged',arg0='{NAME}'",
    f"type='signal',sender='{NAME}',interface='{OBJECT_MANAGER}'",
    f"type='signal',sender='{NAME}',interface='{PROPERTIES}',member='PropertiesChanged'",
)


class Ended(Enum):
    """How a device ended for its client."""

    DETACHED = "detached"
    """Somebody has detached it; if it is in use, it goes with its last user."""
    DAEMON_LEFT = "daemon left"
    """loopd has left the bus for good, and what it held goes with it."""
    BUS_LOST = "bus lost"
    """The connection is gone, and with it all that was attached over it."""


class Heard(NamedTuple):
    """A signal of loopd's, or of the bus about it."""

    member: str
    path: str
    body: list[Any]


class Watch:
    """The signals of one connection, for those who wait for the end of a device."""

    def __init__(self) -> None:
        self._owner = ""
        self._waiting: dict[str, set[asyncio.Future[Ended]]] = {}
        self._listeners: list[Callable[[Heard | None], None]] = []
        self._subscribed = False
        self._subscribing = asyncio.Lock()
        self._lost = False

    @property
    def present(self) -> bool:
        """Whether some loopd is on the bus, as far as has been heard."""
        return self._owner != ""

    @contextlib.contextmanager
    def watched(self, path: str) -> Generator[asyncio.Future[Ended], None, None]:
        """A future that is done when the device of this path ends."""
        future: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        if self._lost:
            future.set_result(Ended.BUS_LOST)
        waiting = self._waiting.setdefault(path, set())
        waiting.add(future)
        try:
            yield future
        finally:
            waiting.discard(future)
            if not waiting:
                self._waiting.pop(path, None)

    @contextlib.contextmanager
    def listening(self, listener: Callable[[Heard | None], None]) -> Generator[None, None, None]:
        """Have a function called with each signal, and with None when the bus is lost."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    async def subscribe(self, connection: transport.Connection) -> None:
        """Ask the bus for the signals; what came before has to be asked for.

        Raises errors.BusError, TimedOut.
        """
        async with self._subscribing:
            if self._subscribed:
                return
            for rule in _RULES:
                await connection.call_bus("AddMatch", "s", [rule])
            with contextlib.suppress(errors.PeerError):  # it may have no owner
                (self._owner,) = await connection.call_bus("GetNameOwner", "s", [NAME])
            self._subscribed = True

    def on_signal(self, signal: frame.Frame) -> None:
        """Take a signal; it may come from anybody, since a match does not keep off direct ones."""
        header = signal.header
        if header is None or header.sender not in (self._owner, transport.BUS_NAME):
            return
        try:
            body = codec.parse(signal.data).body
        except codec.MalformedMessage:
            return
        match header.sender == transport.BUS_NAME, header.member, body:
            case True, "NameOwnerChanged", [name, _, str(owner)] if name == NAME:
                if self._owner:
                    self.end_all(Ended.DAEMON_LEFT)
                self._owner = owner
            case False, "InterfacesAdded", [str(), dict()]:
                pass
            case False, "InterfacesRemoved", [str(path), list()]:
                self._end(path, Ended.DETACHED)
            case False, "PropertiesChanged", [interface, dict(changed), _] if interface == DEVICE:
                state = changed.get("State")
                if isinstance(state, codec.Variant) and state.value != "attached":
                    self._end(header.path, Ended.DETACHED)
            case _:
                return
        self._tell(Heard(header.member, header.path, body))

    def end_all(self, how: Ended) -> None:
        """Tell all who wait that their device is out of reach, and who will, if the bus is."""
        if how is Ended.BUS_LOST:
            self._lost = True
            self._tell(None)
        for path in list(self._waiting):
            self._end(path, how)

    def _tell(self, heard: Heard | None) -> None:
        for listener in [*self._listeners]:
            listener(heard)

    def _end(self, path: str, how: Ended) -> None:
        for future in self._waiting.get(path, ()):
            if not future.done():
                future.set_result(how)
