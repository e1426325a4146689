# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of a Caller: a Gio client that does what it is told over its standard input.

Standard input is a unix stream socket; each line either way is one JSON object, and fds travel with
the line that says how many ("fds").  A request has an "id", which its answers carry.  The text of
this file is all that the process is started with: its uid may be unable to read the checkout.
"""

import array
import base64
import fcntl
import json
import os
import socket
import sys
from typing import Any

from gi.repository import Gio, GLib

LOOPD = "org.example.Loop1"


class Control:
    """The line to the test."""

    def __init__(self) -> None:
        self.socket = socket.socket(fileno=0)
        self.data = b""
        self.fds: list[int] = []

    def read(self) -> list[dict[str, Any]]:
        """Return the requests that have come in whole; leave when the test has gone."""
        try:
            data, control, _, _ = self.socket.recvmsg(
                1 << 16, socket.CMSG_SPACE(253 * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            data, control = b"", []
        for _, _, payload in control:
            self.fds += array.array("i", payload)
        if not data:
            os._exit(0)
        *lines, self.data = (self.data + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def write(self, event: dict[str, Any], fds: list[int] | None = None) -> None:
        """Send one event."""
        data = json.dumps(event | {"fds": len(fds or [])}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], rights)
            self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)


def from_json(value: Any) -> Any:
    """Return what GLib.Variant() takes for a value that the test wrote."""
    if isinstance(value, list):
        return [from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    match value["$"]:
        case "bytes":
            return list(base64.b64decode(value["data"]))
        case "variant":
            return GLib.Variant(value["signature"], from_json(value["value"]))
        case "tuple":
            return tuple(from_json(each) for each in value["items"])
        case "dict":
            return {from_json(key): from_json(each) for key, each in value["items"]}
    raise ValueError(value)


def to_json(value: GLib.Variant, fds: list[int]) -> Any:
    """Return a value that came over the bus as the test reads it; an `h` is a handle of ours."""
    kind = value.get_type_string()
    count = value.n_children() if value.is_container() else 0
    children = (value.get_child_value(index) for index in range(count))
    match kind[0]:
        case "v":
            inner = value.get_variant()
            content = to_json(inner, fds)
            return {"$": "variant", "signature": inner.get_type_string(), "value": content}
        case "h":
            index = value.get_handle()
            return {"$": "fd", "handle": fds[index] if index < len(fds) else -1}
        case "(":
            return {"$": "tuple", "items": [to_json(each, fds) for each in children]}
        case "a" if kind == "ay":
            data = value.get_data_as_bytes().get_data() or b""
            return {"$": "bytes", "data": base64.b64encode(data).decode()}
        case "a" if kind[1] == "{":
            pairs = [[to_json(each.get_child_value(i), fds) for i in (0, 1)] for each in children]
            return {"$": "dict", "items": pairs}
        case "a":
            return [to_json(each, fds) for each in children]
    return value.unpack()


class Program:
    """One connection to the bus and the fds it came by."""

    def __init__(self, address: str) -> None:
        self.control = Control()
        flags = Gio.DBusConnectionFlags
        self.bus = Gio.DBusConnection.new_for_address_sync(
            address,
            flags.AUTHENTICATION_CLIENT | flags.MESSAGE_BUS_CONNECTION,
            None,
            None,
        )
        self.bus.set_exit_on_close(False)
        self.bus.connect("closed", self.on_closed)
        self.bus.signal_subscribe(
            LOOPD, None, None, None, None, Gio.DBusSignalFlags.NONE, self.on_signal
        )
        # Any call will do: when it is answered, the bus knows what we subscribed to.
        self.bus.call_sync(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "GetId",
            None,
            None,
            Gio.DBusCallFlags.NONE,
            -1,
            None,
        )
        self.control.write({"event": "ready", "unique_name": self.bus.get_unique_name()})

    def run(self) -> None:
        """Serve requests until the test closes the line."""
        loop = GLib.MainLoop()
        GLib.unix_fd_add_full(
            GLib.PRIORITY_DEFAULT, 0, GLib.IOCondition.IN | GLib.IOCondition.HUP, self.on_input
        )
        loop.run()

    def on_input(self, *_: Any) -> bool:
        for request in self.control.read():
            fds = [self.control.fds.pop(0) for _ in range(request["fds"])]
            try:
                getattr(self, "do_" + request["do"])(request, fds)
            except OSError as exc:
                self.answer(request, errno=exc.errno, text=exc.strerror, file=exc.filename)
            except Exception as exc:  # noqa: BLE001 - the test decides what a failure means
                self.answer(request, failure=f"{type(exc).__name__}: {exc}")
        return True

    def answer(
        self, request: dict[str, Any], send_fds: list[int] | None = None, **event: Any
    ) -> None:
        self.control.write({"event": "done", "id": request["id"]} | event, send_fds)

    def on_closed(self, _bus: Any, vanished: bool, _error: Any) -> None:
        self.control.write({"event": "closed", "vanished": vanished})

    def on_signal(
        self, _bus: Any, sender: str, path: str, interface: str, member: str, body: Any, *_: Any
    ) -> None:
        self.control.write(
            {
                "event": "signal",
                "sender": sender,
                "path": path,
                "interface": interface,
                "member": member,
                "body": to_json(body, []),
            }
        )

    # What the test may ask for

    def do_call(self, request: dict[str, Any], fds: list[int]) -> None:
        message = Gio.DBusMessage.new_method_call(
            request["destination"], request["path"], request["interface"], request["member"]
        )
        flags = Gio.DBusMessageFlags.NONE
        if request["interactive"]:
            flags |= Gio.DBusMessageFlags.ALLOW_INTERACTIVE_AUTHORIZATION
        if request["no_reply"]:
            flags |= Gio.DBusMessageFlags.NO_REPLY_EXPECTED
        message.set_flags(flags)
        if request["signature"]:
            args = tuple(from_json(each) for each in request["args"])
            message.set_body(GLib.Variant(f"({request['signature']})", args))
        if request["files"]:
            attached = Gio.UnixFDList.new()
            for file in request["files"]:
                fd, ours = self.find_file(file, fds)
                attached.append(fd)  # a copy
                if ours:
                    os.close(fd)
            message.set_unix_fd_list(attached)
        if request["no_reply"]:
            self.bus.send_message(message, Gio.DBusSendMessageFlags.NONE)
        else:
            self.bus.send_message_with_reply(
                message,
                Gio.DBusSendMessageFlags.NONE,
                request["timeout"],
                None,
                self.on_reply,
                request,
            )
        self.bus.flush_sync(None)
        self.control.write({"event": "sent", "id": request["id"], "serial": message.get_serial()})

    def find_file(self, file: dict[str, Any], fds: list[int]) -> tuple[int, bool]:
        if "handle" in file:
            return file["handle"], False
        if "path" in file:
            return os.open(file["path"], file["flags"] | os.O_CLOEXEC, 0o600), True
        return fds.pop(0), True

    def on_reply(self, bus: Any, result: Any, request: dict[str, Any]) -> None:
        try:
            message = bus.send_message_with_reply_finish(result)
        except GLib.Error as exc:
            known = {Gio.IOErrorEnum.TIMED_OUT: "TimedOut", Gio.IOErrorEnum.CLOSED: "Closed"}
            name = known.get(exc.code, "Failed")
            self.answer(request, error=f"caller.{name}", text=exc.message)
            return
        attached = message.get_unix_fd_list()
        fds = list(attached.steal_fds()) if attached else []
        body = message.get_body()
        if message.get_message_type() == Gio.DBusMessageType.ERROR:
            text = body.unpack()[0] if message.get_signature().startswith("s") else ""
            self.answer(request, error=message.get_error_name(), text=text)
            return
        items = to_json(body, fds)["items"] if body else []
        self.answer(request, signature=message.get_signature(), body=items)

    def do_open(self, request: dict[str, Any], _fds: list[int]) -> None:
        fd = os.open(request["path"], request["flags"] | os.O_CLOEXEC, 0o600)
        self.answer(request, handle=fd)

    def do_adopt(self, request: dict[str, Any], fds: list[int]) -> None:
        self.answer(request, handle=fds[0])

    def do_send(self, request: dict[str, Any], _fds: list[int]) -> None:
        self.answer(request, send_fds=[request["handle"]])

    def do_evaluate(self, request: dict[str, Any], _fds: list[int]) -> None:
        names = {"os": os, "fcntl": fcntl, "fd": request["handle"], "program": self}
        names |= {name: from_json(value) for name, value in request["names"].items()}
        value = eval(request["expression"], names)  # noqa: S307 - the test is not hostile
        if isinstance(value, bytes):
            value = {"$": "bytes", "data": base64.b64encode(value).decode()}
        elif isinstance(value, tuple):
            value = list(value)
        self.answer(request, value=value)

    def do_disconnect(self, request: dict[str, Any], _fds: list[int]) -> None:
        self.bus.close_sync(None)
        self.answer(request)


Program(sys.argv[1]).run()
