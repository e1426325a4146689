# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of loopd as another uid, in a process of its own that can be killed.

A Caller keeps one Gio connection for its life.  Files are opened by the caller under its own rights
(a path or a File), or passed to it by the test (an int); fds in replies stay with it as RemoteFd.
Values go and come as tests.harness.wire has them: Variant for a `v` that is sent, and plain values
for those received, except in a Reply.
"""

import array
import base64
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.harness import loops
from tests.harness import template as templates
from tests.harness.bus import LOOPD, PrivateBus
from tests.harness.deadline import DEFAULT_TIMEOUT, Deadline
from tests.harness.process import Process
from tests.harness.raw import BUS
from tests.harness.template import Template
from tests.harness.wire import CallError, Variant, plain

MANAGER_PATH = "/org/example/Loop1"
MANAGER = LOOPD
DEVICE = f"{LOOPD}.Device"
PROPERTIES = f"{BUS}.Properties"
OBJECT_MANAGER = f"{BUS}.ObjectManager"

TEMPLATE = "caller"
_PROGRAM = Path(__file__).with_name("caller_program.py")

# A virtual environment may be closed to the caller's uid; Debian's own Python is not, and has gi.
_PYTHON = getattr(sys, "_base_executable", sys.executable)

OPTION_TYPES = {
    "read-only": "b",
    "offset": "t",
    "size-limit": "t",
    "sector-size": "u",
    "partition-scan": "b",
    "direct-io": "b",
    "reference": "s",
    "lock": "s",
    "lifetime": "s",
    "allow-overlap": "b",
    "number": "u",
    "lazy": "b",
    "force": "b",
    "partition": "u",
}
"""The type of each option there is."""


def options(mapping: Mapping[str, Any] | None = None, **named: Any) -> dict[str, Variant]:
    """Return an a{sv}: `read_only=True` is the key read-only, with the type it should have.

    `mapping` takes keys as they are; a Variant in either has the type it says, right or wrong.
    """
    given = {key.replace("_", "-"): value for key, value in named.items()} | dict(mapping or {})
    return {
        key: value if isinstance(value, Variant) else Variant(OPTION_TYPES[key], value)
        for key, value in given.items()
    }


class CallerDiedError(Exception):
    """The caller's process ended while the test waited for it."""


class Attached(NamedTuple):
    """What Attach returned."""

    path: str
    node: str
    diskseq: int

    @property
    def number(self) -> int:
        """N in /dev/loopN."""
        return int(self.node.removeprefix("/dev/loop"))


@dataclass(frozen=True)
class File:
    """A file that the caller opens for one call and then closes."""

    path: str | Path
    flags: int = os.O_RDWR


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply with its types: each `v` in the body is a Variant, each `h` a RemoteFd."""

    signature: str
    body: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A signal that the caller received from loopd."""

    sender: str
    path: str
    interface: str
    member: str
    args: tuple[Any, ...]


class RemoteFd:
    """An fd in the caller's process."""

    def __init__(self, caller: "Caller", handle: int) -> None:
        """Speak of fd number `handle` of `caller`."""
        self.caller = caller
        self.handle = handle

    def __repr__(self) -> str:
        return f"<fd {self.handle} of {self.caller.name}>"

    def evaluate(self, expression: str, **names: Any) -> Any:
        """Evaluate Python in the caller, where `fd` is this one; see Caller.evaluate()."""
        return self.caller.evaluate(expression, fd=self, **names)

    def read(self, size: int, offset: int = 0) -> bytes:
        """Return up to `size` bytes from `offset`."""
        return bytes(self.evaluate("os.pread(fd, size, offset)", size=size, offset=offset))

    def write(self, data: bytes, offset: int = 0) -> int:
        """Write at `offset`; return how much was written."""
        return int(self.evaluate("os.pwrite(fd, bytes(data), offset)", data=data, offset=offset))

    def stat(self) -> os.stat_result:
        """Return what fstat() says in the caller."""
        return os.stat_result(self.evaluate("list(os.fstat(fd))"))

    def flags(self) -> int:
        """Return the file status flags (F_GETFL)."""
        return int(self.evaluate("fcntl.fcntl(fd, fcntl.F_GETFL)"))

    def at_end(self, timeout: float | None = None) -> bool:
        """Wait until it is readable; say whether that is the end of file."""
        limit = DEFAULT_TIMEOUT if timeout is None else timeout
        ready = self.evaluate(
            "__import__('select').select([fd], [], [], limit)[0] and os.read(fd, 1) == b''",
            limit=limit,
            timeout=limit + DEFAULT_TIMEOUT,
        )
        if ready == []:
            raise TimeoutError(f"{self}: nothing within {limit:g} s")
        return bool(ready)

    def close(self) -> None:
        """Close it in the caller."""
        self.evaluate("os.close(fd)")

    def fetch(self) -> int:
        """Return a copy in the test's own process, which the test must close."""
        return self.caller._fetch(self.handle)


FileArgument = int | str | Path | File | RemoteFd


class Call:
    """A call under way."""

    def __init__(self, caller: "Caller", request: int, what: str, serial: int) -> None:
        """Wait for nothing yet."""
        self._caller = caller
        self._request = request
        self._what = what
        self.serial = serial

    def reply(self, timeout: float | None = None) -> Reply:
        """Wait for the reply; CallError if it is an error."""
        done = self._caller._answer(self._request, "done", self._what, Deadline(timeout))
        if "error" in done:
            raise CallError(done["error"], done["text"])
        body = tuple(_from_json(each, self._caller) for each in done["body"])
        return Reply(signature=done["signature"], body=body)

    def end(self, timeout: float | None = None) -> tuple[Any, ...]:
        """Wait for the reply; return its plain values."""
        return tuple(plain(self.reply(timeout).body))


def template_of_callers() -> Template:
    """What callers are forked from, under the name TEMPLATE in `templates.shared`."""
    return Template(["gi.repository.Gio", "gi.repository.GLib"], python=[_PYTHON, "-I"])


class Caller:
    """A process of `user` with a connection to the bus, until it is closed or killed."""

    def __init__(self, bus: PrivateBus, user: str | None = "nobody") -> None:
        """Prepare a caller as `user`; None is whoever runs the tests."""
        self._address = bus.address
        self._user = user
        self.name = f"caller {user or 'self'}"
        self._exit = ExitStack()
        self._events: dict[tuple[int, str], dict[str, Any]] = {}
        self._requests = 0
        self._data = b""
        self._fds: list[int] = []
        self.signals: list[Signal] = []
        """The signals received and not yet taken by wait_signal()."""
        self.closed: bool | None = None
        """None while connected; then whether the bus closed the connection and not the caller."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.callback(self._close_fds)
            self._control = stack.enter_context(ours)
            with theirs:
                self.process = stack.enter_context(self._start(theirs.fileno()))
            ready = self._answer(0, "ready", "the connection to the bus", Deadline())
            self.unique_name: str = ready["unique_name"]
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._exit:
            if kind is not None:
                self.process.kill()
            elif self.process.status is None:
                self.close()

    def _start(self, stdin: int) -> Process:
        program = _PROGRAM.read_text()
        template = templates.shared.get(TEMPLATE)
        if template and os.getuid() == 0:
            return template.start(self.name, program, [self._address], user=self._user, stdin=stdin)
        return Process(
            [_PYTHON, "-I", "-c", program, self._address],
            name=self.name,
            user=self._user,
            stdin=stdin,
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    # Its life

    def kill(self) -> None:
        """End it by SIGKILL, in the midst of whatever it does."""
        self.process.kill()

    def disconnect(self) -> None:
        """Close its connection in good order; the process and its fds stay."""
        self._do("disconnect")

    def close(self) -> None:
        """Let it end in good order."""
        self._control.shutdown(socket.SHUT_RDWR)
        self.process.wait()

    # Calls

    def call(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        *args: Any,
        timeout: float | None = None,
        **how: Any,
    ) -> tuple[Any, ...]:
        """Call, and return the plain values of the reply; CallError if it is an error.

        `how` is what call_begin() takes.
        """
        return self.call_begin(path, interface, member, signature, *args, **how).end(timeout)

    def call_begin(
        self,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        *args: Any,
        fds: Sequence[FileArgument] = (),
        destination: str = LOOPD,
        interactive: bool = False,
        no_reply: bool = False,
        gio_timeout: float | None = None,
    ) -> Call:
        """Send a call, and return once it has been written to the bus.

        An `h` among the `args` is an index into `fds`.  After `gio_timeout` seconds, if given, the
        caller itself gives up, as CallError `caller.TimedOut`.
        """
        passed, files = self._files(fds)
        request = self._request(
            "call",
            passed,
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            args=[_to_json(each) for each in args],
            files=files,
            interactive=interactive,
            no_reply=no_reply,
            timeout=0x7FFFFFFF if gio_timeout is None else int(gio_timeout * 1000),
        )
        what = f"{member} of {self.name}"
        sent = self._answer(request, "sent", what, Deadline())
        return Call(self, request, what, sent["serial"])

    # loopd's own methods

    def attach_begin(
        self,
        file: FileArgument,
        mode: str = "rw",
        mapping: Mapping[str, Any] | None = None,
        *,
        interactive: bool = False,
        **named: Any,
    ) -> Call:
        """Begin Attach of a file, a path being opened in `mode` r or rw; options as options()."""
        return self.call_begin(
            MANAGER_PATH,
            MANAGER,
            "Attach",
            "ha{sv}",
            0,
            options(mapping, **named),
            fds=[_opened(file, mode)],
            interactive=interactive,
        )

    def attach(
        self,
        file: FileArgument,
        mode: str = "rw",
        mapping: Mapping[str, Any] | None = None,
        *,
        interactive: bool = False,
        **named: Any,
    ) -> Attached:
        """Attach a file; see attach_begin()."""
        call = self.attach_begin(file, mode, mapping, interactive=interactive, **named)
        attached = Attached(*call.end())
        loops.used_numbers.add(attached.number)
        return attached

    def detach(self, path: str, mapping: Mapping[str, Any] | None = None, **named: Any) -> bool:
        """Detach the device object; return whether it is gone."""
        (gone,) = self.device(path, "Detach", "a{sv}", options(mapping, **named))
        return bool(gone)

    def resize(self, path: str, mapping: Mapping[str, Any] | None = None, **named: Any) -> int:
        """Resize the device object; return its size now."""
        (size,) = self.device(path, "Resize", "a{sv}", options(mapping, **named))
        return int(size)

    def open_device(
        self, path: str, mode: str = "rw", mapping: Mapping[str, Any] | None = None, **named: Any
    ) -> RemoteFd:
        """Open the device object; the fd stays with the caller."""
        (fd,) = self.device(path, "Open", "sa{sv}", mode, options(mapping, **named))
        assert isinstance(fd, RemoteFd)
        return fd

    def device(self, path: str, member: str, signature: str = "", *args: Any, **how: Any) -> Any:
        """Call a method of a device object; return its plain values."""
        return self.call(path, DEVICE, member, signature, *args, **how)

    def manager(self, member: str, signature: str = "", *args: Any, **how: Any) -> Any:
        """Call a method of the manager; return its plain values."""
        return self.call(MANAGER_PATH, MANAGER, member, signature, *args, **how)

    def get_all(self, path: str, interface: str = DEVICE) -> dict[str, Any]:
        """Return the properties of an object."""
        (properties,) = self.call(path, PROPERTIES, "GetAll", "s", interface)
        return dict(properties)

    def get(self, path: str, name: str, interface: str = DEVICE) -> Any:
        """Return one property of an object."""
        return self.call(path, PROPERTIES, "Get", "ss", interface, name)[0]

    def managed_objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return what GetManagedObjects says."""
        return dict(self.call(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects")[0])

    def wait_signal(
        self,
        member: str,
        predicate: Callable[[Signal], bool] = lambda _: True,
        timeout: float | None = None,
    ) -> Signal:
        """Wait for a signal of loopd, and take it and no other out of `signals`."""
        deadline = Deadline(timeout)
        while True:
            for index, signal in enumerate(self.signals):
                if signal.member == member and predicate(signal):
                    return self.signals.pop(index)
            self._read(deadline, f"the signal {member} for {self.name}")

    def sync_signals(self) -> list[Signal]:
        """Return every signal sent before now, which a call to the bus comes after."""
        self.call("/org/freedesktop/DBus", BUS, "GetId", destination=BUS)
        return self.signals

    # Its own rights

    def open(self, path: str | Path, flags: int = os.O_RDWR) -> RemoteFd:
        """Open a file under the caller's rights; OSError as there."""
        return RemoteFd(self, self._do("open", path=os.fspath(path), flags=flags)["handle"])

    def adopt(self, fd: int) -> RemoteFd:
        """Give the caller a copy of an fd of the test."""
        return RemoteFd(self, self._do("adopt", [fd])["handle"])

    def evaluate(
        self,
        expression: str,
        *,
        fd: RemoteFd | None = None,
        timeout: float | None = None,
        **names: Any,
    ) -> Any:
        """Return the value of a Python expression in the caller; OSError as there.

        It sees os, fcntl, `fd` (the number) and `names`; bytes arrive as a list of numbers.
        """
        done = self._do(
            "evaluate",
            timeout=timeout,
            expression=expression,
            handle=fd.handle if fd else -1,
            names={name: _to_json(value) for name, value in names.items()},
        )
        return _from_json(done["value"], self)

    def _fetch(self, handle: int) -> int:
        done = self._do("send", handle=handle)
        (fd,) = done["received"]
        return int(fd)

    # The line to the process

    def _files(self, files: Sequence[FileArgument]) -> tuple[list[int], list[dict[str, Any]]]:
        passed: list[int] = []
        described: list[dict[str, Any]] = []
        for file in files:
            match file:
                case int():
                    passed.append(file)
                    described.append({})
                case RemoteFd():
                    described.append({"handle": file.handle})
                case File():
                    described.append({"path": os.fspath(file.path), "flags": file.flags})
                case _:
                    described.append({"path": os.fspath(file), "flags": os.O_RDWR})
        return passed, described

    def _request(self, do: str, passed: Sequence[int] = (), **fields: Any) -> int:
        self._requests += 1
        request = {"id": self._requests, "do": do, "fds": len(passed)} | fields
        data = json.dumps(request).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passed))]
        try:
            sent = self._control.sendmsg([data], rights if passed else [])
            self._control.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise self._died() from exc
        return self._requests

    def _do(
        self, do: str, passed: Sequence[int] = (), timeout: float | None = None, **fields: Any
    ) -> dict[str, Any]:
        # "timeout" of the request itself belongs to calls alone.
        request = self._request(do, passed, **fields)
        return self._answer(request, "done", f"{do} of {self.name}", Deadline(timeout))

    def _answer(self, request: int, event: str, what: str, deadline: Deadline) -> dict[str, Any]:
        # A request that could not even be carried out is "done" without having been "sent".
        while not (keys := {(request, event), (request, "done")} & self._events.keys()):
            self._read(deadline, what)
        found = self._events.pop((request, event) if (request, event) in keys else keys.pop())
        if "errno" in found:
            raise OSError(found["errno"], found["text"], found["file"])
        if "failure" in found:
            raise RuntimeError(f"{what}: {found['failure']}")
        return found

    def _read(self, deadline: Deadline, what: str) -> None:
        deadline.wait_readable([self._control.fileno()], what)
        try:
            data, control, _, _ = self._control.recvmsg(
                1 << 16, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            data, control = b"", []
        for _, _, payload in control:
            self._fds += array.array("i", payload)
        if not data:
            raise self._died()
        *lines, self._data = (self._data + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        count = event["fds"]
        event["received"], self._fds = self._fds[:count], self._fds[count:]
        match event["event"]:
            case "signal":
                self.signals.append(
                    Signal(
                        sender=event["sender"],
                        path=event["path"],
                        interface=event["interface"],
                        member=event["member"],
                        args=plain(_from_json(event["body"], self)),
                    )
                )
            case "closed":
                self.closed = event["vanished"]
            case kind:
                self._events[event.get("id", 0), kind] = event

    def _died(self) -> CallerDiedError:
        status = self.process.wait()
        return CallerDiedError(f"{self.name} ended ({status})\n{self.process.log.text}")

    def _close_fds(self) -> None:
        for fd in self._fds + [fd for event in self._events.values() for fd in event["received"]]:
            os.close(fd)
        self._fds.clear()
        self._events.clear()


def _opened(file: FileArgument, mode: str) -> FileArgument:
    if isinstance(file, str | Path):
        return File(file, {"r": os.O_RDONLY, "rw": os.O_RDWR, "w": os.O_WRONLY}[mode])
    return file


def _to_json(value: Any) -> Any:
    match value:
        case bytes():
            return {"$": "bytes", "data": base64.b64encode(value).decode()}
        case Variant():
            return {"$": "variant", "signature": value.signature, "value": _to_json(value.value)}
        case tuple():
            return {"$": "tuple", "items": [_to_json(each) for each in value]}
        case dict():
            return {
                "$": "dict",
                "items": [[_to_json(key), _to_json(each)] for key, each in value.items()],
            }
        case list():
            return [_to_json(each) for each in value]
    return value


def _from_json(value: Any, caller: Caller) -> Any:
    if isinstance(value, list):
        return [_from_json(each, caller) for each in value]
    if not isinstance(value, dict):
        return value
    match value["$"]:
        case "bytes":
            return base64.b64decode(value["data"])
        case "variant":
            return Variant(value["signature"], _from_json(value["value"], caller))
        case "tuple":
            return tuple(_from_json(each, caller) for each in value["items"])
        case "dict":
            return {
                _from_json(key, caller): _from_json(each, caller) for key, each in value["items"]
            }
        case "fd":
            return RemoteFd(caller, value["handle"])
    raise ValueError(value)
