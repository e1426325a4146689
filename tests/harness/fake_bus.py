# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bus that lies: a loopd connects to it, and it sends what no dbus-daemon lets through."""

import fcntl
import os
import socket
import sys
import termios
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.area import area
from tests.harness.bus import LOOPD
from tests.harness.deadline import Deadline
from tests.harness.process import Process
from tests.harness.raw import BUS, RawClient

_ANSWERS: dict[str, tuple[str, list[Any]]] = {
    "Hello": ("s", [":1.1"]),
    "NameHasOwner": ("b", [False]),
    "GetId": ("s", ["0" * 32]),
    "AddMatch": ("", []),
    "RequestName": ("u", [1]),
    "GetConnectionUnixUser": ("u", [0]),
    "GetConnectionCredentials": ("a{sv}", [{"UnixUserID": wire.Variant("u", 0)}]),
}


class FakeBus:
    """Listens from the start of the `with` block, and serves the loopd that connects.

    Of loopd's connections the one that asks for the name is its service; the other asks questions.

    `errors` are what calls of the bus's own methods are answered with, where there is one.
    """

    def __init__(self) -> None:
        """Answer everything well for now."""
        self.errors: dict[str, str] = {}
        self._connections: list[_Connection] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(area("fake-bus"))
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            self._listener.bind(str(directory / "socket"))
            self._listener.listen()
            self.address = f"unix:path={directory}/socket"
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def wait_owned(self, name: str, *, process: Process) -> None:
        """Serve whoever connects until it owns the name; what Daemon calls."""
        assert name == LOOPD
        deadline = Deadline()
        while not self._serve(deadline, f"{process.name} to own its name"):
            pass

    def _serve(self, deadline: Deadline, what: str) -> bool:
        """Serve whoever wants something; whether somebody has just been given the name."""
        for connection in self._connections:
            if connection.has_message():
                if not connection.serve(deadline):
                    return False
                self._service = connection
                return True
        fds = {each.fileno(): each for each in self._connections}
        for fd in deadline.wait_readable([self._listener.fileno(), *fds], what):
            if fd == self._listener.fileno():
                accepted = _Connection(self._listener.accept()[0], self.errors)
                self._connections.append(self._exit.enter_context(accepted))
            else:
                fds[fd].read(deadline)
        return False

    def send(
        self,
        member: str,
        signature: str = "",
        args: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        **how: Any,
    ) -> int:
        """Send a call of the manager, as from a client, and return its serial.

        `how` goes to RawClient.send(), `sender` excepted, which is the client's unique name.
        """
        sender = (wire.SENDER, wire.Variant("s", how.pop("sender", ":1.7")))
        how.setdefault("extra_fields", [])
        how["extra_fields"] = [sender, *how["extra_fields"]]
        path, interface = how.pop("path", "/org/example/Loop1"), how.pop("interface", LOOPD)
        return self._service.send(path, interface, member, signature, args, fds=fds, **how)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send anything."""
        self._service.send_bytes(data, fds)

    @property
    def received(self) -> list[wire.Message]:
        """What was sent to others on the bus, and no reply() has taken."""
        return [message for each in self._connections for message in each.received]

    def unread(self) -> int:
        """Return how many bytes of the service's nobody has read from the socket."""
        size = fcntl.ioctl(self._service.fileno(), termios.FIONREAD, b"\0" * 4)
        return int.from_bytes(size, sys.byteorder)

    def next_serial(self) -> int:
        """Return a serial not used before."""
        return self._service.next_serial()

    def reply(self, serial: int) -> wire.Message:
        """Serve until the call with this serial is answered; return that."""
        deadline = Deadline()
        while True:
            for index, message in enumerate(self._service.received):
                if message.reply_serial == serial:
                    return self._service.received.pop(index)
            self._serve(deadline, f"the answer to call {serial}")


class _Connection(RawClient):
    """The bus's end of a connection."""

    def __init__(self, connection: socket.socket, errors: dict[str, str]) -> None:
        self._socket = connection
        self._errors = errors
        self._data = bytearray()
        self._fds: list[int] = []
        self._serial = 0
        self.received: list[wire.Message] = []
        # Whoever asks for everything at once has sent these lines when it begins.
        deadline = Deadline()
        while b"BEGIN\r\n" not in self._data:
            self._read(deadline, "the authentication")
        asked, _, rest = bytes(self._data).partition(b"BEGIN\r\n")
        self._data = bytearray(rest)
        agreed = b"AGREE_UNIX_FD\r\n" if b"NEGOTIATE_UNIX_FD" in asked else b""
        who = b"DATA\r\n" if b"DATA\r\n" in asked else b""  # one that claims no uid is asked for it
        self.send_bytes(who + b"OK " + b"0" * 32 + b"\r\n" + agreed)

    def has_message(self) -> bool:
        """Whether a whole message has been read."""
        return len(self._data) >= 16 and len(self._data) >= wire.frame_length(self._data[:16])

    def read(self, deadline: Deadline) -> None:
        """Read what is there."""
        self._read(deadline, "a message to the bus")

    def serve(self, deadline: Deadline) -> bool:
        """Take one message, and answer it if it is for the bus; whether it asked for LOOPD."""
        message = self._next(deadline, "a message to the bus")
        for fd in message.fds:
            os.close(fd)
        message.fds.clear()
        if message.type == wire.METHOD_CALL and message.fields[wire.DESTINATION] == BUS:
            signature, args = _ANSWERS[str(message.member)]
            error = self._errors.get(str(message.member))
            if error:
                signature, args = "s", ["no"]
            self.send(
                None,
                None,
                None,
                signature,
                args,
                type=wire.ERROR if error else wire.METHOD_RETURN,
                error_name=error,
                destination=":1.1",
                reply_serial=message.serial,
                extra_fields=[(wire.SENDER, wire.Variant("s", BUS))],
            )
            return message.member == "RequestName" and message.body[0] == LOOPD
        self.received.append(message)
        return False
