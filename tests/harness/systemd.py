# SPDX-License-Identifier: LGPL-2.1-or-later
"""A double of systemd on a private bus: what a service can ask of its own unit and its jobs."""

import os
import threading
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.bus import SYSTEMD, PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.fd_store import FdStore
from tests.harness.raw import BUS, DisconnectedError, RawClient
from tests.harness.wire import Variant

UNIT_PATH = "/org/freedesktop/systemd1/unit/self"
JOB = "/org/freedesktop/systemd1/job/"


class SystemdDouble:
    """Answers questions about the unit from a thread, from the start of the `with` block."""

    def __init__(self, bus: PrivateBus, store: FdStore) -> None:
        """Tell of this store, and of no job until `job` names one's type (restart, stop)."""
        self._bus = bus
        self._store = store
        self.job: str | None = None
        self.number = 17
        """Of the job."""
        self.asked: list[str] = []
        """The properties that somebody has asked for."""

    def __enter__(self) -> Self:
        self._client: RawClient = self._bus.connect()
        (result,) = self._client.call_bus("RequestName", "su", [SYSTEMD, 4])
        assert result == 1
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="systemd double")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.write(self._wake[1], b"x")
        self._thread.join()
        for fd in self._wake:
            os.close(fd)
        self._client.close()

    def _serve(self) -> None:
        try:
            while True:
                for message in self._client.drain():
                    if message.type == wire.METHOD_CALL:
                        self._answer(message)
                fds = [self._client.fileno(), self._wake[0]]
                if self._wake[0] in Deadline(3600).wait_readable(fds, "a question"):
                    return
                self._client.received.append(self._client.receive())
        except DisconnectedError:
            pass  # the bus has gone

    def _properties(self, path: str | None, interface: str) -> dict[str, Variant] | None:
        job = JOB + str(self.number)
        match path, interface.removeprefix(f"{SYSTEMD}."):
            case "/org/freedesktop/systemd1/unit/self", "Service":
                return {
                    "FileDescriptorStoreMax": Variant("u", self._store.maximum),
                    "NFileDescriptorStore": Variant("u", len(self._store)),
                }
            case "/org/freedesktop/systemd1/unit/self", "Unit":
                return {"Job": Variant("(uo)", (self.number, job) if self.job else (0, "/"))}
            case str(), "Job" if path == job and self.job:
                return {"JobType": Variant("s", self.job), "State": Variant("s", "running")}
        return None

    def _answer(self, message: wire.Message) -> None:
        interface, *name = message.body if message.interface == f"{BUS}.Properties" else ("",)
        self.asked += name
        found = self._properties(message.path, interface)
        if found is None or (name and name[0] not in found):
            answer: dict[str, Any] = {
                "type": wire.ERROR,
                "error_name": f"{BUS}.Error.UnknownObject",
                "signature": "s",
                "args": [f"the double of systemd does not know {message.path} {interface} {name}"],
            }
        elif message.member == "GetAll":
            answer = {"type": wire.METHOD_RETURN, "signature": "a{sv}", "args": [found]}
        else:
            answer = {"type": wire.METHOD_RETURN, "signature": "v", "args": [found[name[0]]]}
        self._client.send(
            None,
            None,
            None,
            destination=message.sender,
            reply_serial=message.serial,
            flags=1,
            **answer,
        )
