# SPDX-License-Identifier: LGPL-2.1-or-later
"""A D-Bus client that sends exactly the bytes and the fds it is told.

It can therefore lie in ways that no library can.  The index in the body, the UNIX_FDS field and the
fds that travel along are three separate things:

- the index in a body is nobody's business but the receiver's: every value passes dbus-daemon;
- fewer fds than UNIX_FDS says: dbus-daemon disconnects the sender;
- more fds than UNIX_FDS says: dbus-daemon keeps the rest for the sender's next message, and
  disconnects a sender whose fds stay unclaimed for pending_fd_timeout (150 s);
- UNIX_FDS above max_message_unix_fds (16): dbus-daemon disconnects the sender.
"""

import array
import ctypes
import os
import platform
import pwd
import socket
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.deadline import Deadline

BUS = "org.freedesktop.DBus"
BUS_PATH = "/org/freedesktop/DBus"
MAX_FDS = 253


class DisconnectedError(Exception):
    """The bus closed the connection."""


class RawClient:
    """A connection to a bus whose every byte is the test's."""

    def __init__(
        self, address: str, *, user: str | int | None = None, unix_fds: bool = True
    ) -> None:
        """Connect and say Hello, as `user` when one is named (for that one must be root).

        A number is a uid, and the gid of the same number; nobody need have an account for it.
        """
        self._socket = _connect(address, user)
        self._data = bytearray()
        self._fds: list[int] = []
        self._serial = 0
        self.received: list[wire.Message] = []
        """Messages that were read while another was waited for, oldest first."""
        try:
            self._authenticate(os.getuid() if user is None else _ids(user)[0], unix_fds)
            self.unique_name: str = self.call_bus("Hello")[0]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's fd, for polling."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection and every fd received and not taken."""
        self._socket.close()
        for fd in self._fds + [fd for message in self.received for fd in message.fds]:
            os.close(fd)
        self._fds.clear()
        self.received.clear()

    def _authenticate(self, uid: int, unix_fds: bool) -> None:
        deadline = Deadline()
        self._write(b"\0AUTH EXTERNAL " + str(uid).encode().hex().encode() + b"\r\n", (), deadline)
        self._expect(b"OK ", deadline)
        if unix_fds:
            self._write(b"NEGOTIATE_UNIX_FD\r\n", (), deadline)
            self._expect(b"AGREE_UNIX_FD", deadline)
        self._write(b"BEGIN\r\n", (), deadline)

    def _expect(self, answer: bytes, deadline: Deadline) -> None:
        while b"\r\n" not in self._data:
            self._read(deadline, "the bus's answer to the authentication")
        line, _, rest = bytes(self._data).partition(b"\r\n")
        self._data = bytearray(rest)
        if not line.startswith(answer):
            raise ConnectionRefusedError(f"the bus said {line!r}, not {answer!r}")

    # Sending

    def next_serial(self) -> int:
        """Return a serial not used before on this connection."""
        self._serial += 1
        return self._serial

    def send_bytes(
        self, data: bytes, fds: Sequence[int] = (), timeout: float | None = None
    ) -> None:
        """Send these bytes with these fds attached to the first of them."""
        self._write(data, fds, Deadline(timeout))

    def send(
        self,
        path: str | None,
        interface: str | None,
        member: str | None,
        signature: str = "",
        args: Sequence[Any] = (),
        *,
        destination: str | None = "org.example.Loop1",
        fds: Sequence[int] = (),
        unix_fds: int | None = None,
        body: bytes | None = None,
        **header: Any,
    ) -> int:
        """Send a call and return its serial.

        `fds` travel along; `unix_fds` is what the header says of them (their number when None; 0 is
        said, too), and `body` replaces what `args` would be.  Other arguments go to wire.build().
        """
        serial = header.pop("serial", None) or self.next_serial()
        data = wire.build(
            serial=serial,
            path=path,
            interface=interface,
            member=member,
            destination=destination,
            signature=signature,
            body=wire.marshal(signature, args) if body is None else body,
            unix_fds=(len(fds) or None) if unix_fds is None else unix_fds,
            **header,
        )
        self.send_bytes(data, fds)
        return int(serial)

    def _write(self, data: bytes, fds: Sequence[int], deadline: Deadline) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        view = memoryview(data)
        while view:
            deadline.wait_writable([self._socket.fileno()], "room in the bus's socket")
            try:
                sent = self._socket.sendmsg([view], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError) as exc:
                raise DisconnectedError("the bus closed the connection") from exc
            view, rights = view[sent:], []

    # Receiving

    def receive(self, timeout: float | None = None) -> wire.Message:
        """Return the next message, whatever it is; its fds are the caller's to close."""
        if self.received:
            return self.received.pop(0)
        return self._next(Deadline(timeout), "a message")

    def receive_where(
        self,
        matches: Callable[[wire.Message], bool],
        what: str,
        timeout: float | None = None,
        deadline: Deadline | None = None,
    ) -> wire.Message:
        """Return the first message that `matches`, keeping the others in `received`."""
        for index, message in enumerate(self.received):
            if matches(message):
                return self.received.pop(index)
        deadline = deadline or Deadline(timeout)
        while not matches(message := self._next(deadline, what)):
            self.received.append(message)
        return message

    def reply(self, serial: int, timeout: float | None = None) -> wire.Message:
        """Return what answered the call with this serial, be it an error."""
        return self.receive_where(
            lambda message: message.reply_serial == serial, f"the reply to call {serial}", timeout
        )

    def drain(self) -> list[wire.Message]:
        """Return every message that has been read in, without waiting for more.

        To be called before polling fileno(), which tells nothing of what is in our own buffer.
        """
        while (message := self._parse()) is not None:
            self.received.append(message)
        drained, self.received = self.received, []
        return drained

    def _next(self, deadline: Deadline, what: str) -> wire.Message:
        while (message := self._parse()) is None:
            self._read(deadline, what)
        return message

    def _parse(self) -> wire.Message | None:
        if len(self._data) < 16:
            return None
        length = wire.frame_length(bytes(self._data[:16]))
        if len(self._data) < length:
            return None
        message = wire.parse(bytes(self._data[:length]))
        del self._data[:length]
        count = message.fields.get(wire.UNIX_FDS, 0)
        message.fds, self._fds = self._fds[:count], self._fds[count:]
        return message

    def _read(self, deadline: Deadline, what: str) -> None:
        deadline.wait_readable([self._socket.fileno()], what)
        try:
            data, control, _, _ = self._socket.recvmsg(
                65536, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError as exc:
            raise DisconnectedError("the bus closed the connection") from exc
        for level, kind, payload in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array.array("i", payload)
        if not data:
            raise DisconnectedError("the bus closed the connection")
        self._data += data

    def wait_disconnected(self, timeout: float | None = None) -> None:
        """Read until the bus closes the connection; TimeoutError if it does not."""
        deadline = Deadline(timeout)
        try:
            while True:
                self.received.append(self._next(deadline, "the bus closing the connection"))
        except DisconnectedError:
            return

    # Calling

    def call(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        args: Sequence[Any] = (),
        *,
        timeout: float | None = None,
        **how: Any,
    ) -> wire.Message:
        """Call, and return the reply; an error is raised as CallError.  `how` goes to send()."""
        reply = self.reply(self.send(path, interface, member, signature, args, **how), timeout)
        if reply.type == wire.ERROR:
            for fd in reply.fds:
                os.close(fd)
            text = reply.body[0] if reply.signature.startswith("s") else ""
            raise wire.CallError(str(reply.error_name), text)
        return reply

    def call_bus(
        self, member: str, signature: str = "", args: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Call the bus itself and return what it answered."""
        return self.call(BUS_PATH, BUS, member, signature, args, destination=BUS).body

    def add_match(self, rule: str) -> None:
        """Ask the bus for the signals that match `rule`."""
        self.call_bus("AddMatch", "s", [rule])

    def owner_of(self, name: str) -> str | None:
        """Return the unique name that owns `name` now, None if nobody does."""
        try:
            return str(self.call_bus("GetNameOwner", "s", [name])[0])
        except wire.CallError as exc:
            if exc.name != "org.freedesktop.DBus.Error.NameHasNoOwner":
                raise
            return None


def _ids(user: str | int) -> tuple[int, int]:
    """Return the uid and the gid of a user."""
    if isinstance(user, int):
        return user, user
    account = pwd.getpwnam(user)
    return account.pw_uid, account.pw_gid


def _connect(address: str, user: str | int | None) -> socket.socket:
    transport, _, options = address.split(";")[0].partition(":")
    path = dict(option.split("=", 1) for option in options.split(","))["path"]
    if transport != "unix":
        raise ValueError(f"only a unix socket is understood, not {address}")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if user is None:
            connection.connect(path)
        else:
            _as_user(user, lambda: connection.connect(path))
    except BaseException:
        connection.close()
        raise
    return connection


# setgroups, setresgid, setresuid. Called directly they change the calling thread alone, where the C
# library's wrappers change the whole process.
_SYSCALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}


def _as_user(user: str | int, work: Callable[[], None]) -> None:
    """Do `work` in a thread that is `user`: the kernel notes a peer's uid when it connects."""
    uid, gid = _ids(user)
    setgroups, setresgid, setresuid = _SYSCALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    failures: list[BaseException] = []

    def call(number: int, *arguments: int | ctypes.c_uint | None) -> None:
        if libc.syscall(number, *arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def run() -> None:
        try:
            call(setgroups, 0, None)
            call(setresgid, *[ctypes.c_uint(gid)] * 3)
            call(setresuid, *[ctypes.c_uint(uid)] * 3)
            work()
        except BaseException as exc:  # noqa: BLE001 - raised again by the thread that waits
            failures.append(exc)

    thread = threading.Thread(target=run, name=f"as {user}")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
