# SPDX-License-Identifier: LGPL-2.1-or-later
"""A double of systemd on a private bus: what a service can ask of its own unit and its jobs."""

from tests.harness import wire
from tests.harness.bus import SYSTEMD, PrivateBus
from tests.harness.double import Double
from tests.harness.fd_store import FdStore
from tests.harness.raw import BUS
from tests.harness.wire import Variant

UNIT_PATH = "/org/freedesktop/systemd1/unit/self"
JOB = "/org/freedesktop/systemd1/job/"


class SystemdDouble(Double):
    """Answers questions about the unit."""

    name = SYSTEMD

    def __init__(self, bus: PrivateBus, store: FdStore) -> None:
        """Tell of this store, and of no job until `job` names one's type (restart, stop)."""
        super().__init__(bus)
        self._store = store
        self.job: str | None = None
        self.number = 17
        """Of the job."""
        self.asked: list[str] = []
        """The properties that somebody has asked for."""

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
            text = f"the double of systemd does not know {message.path} {interface} {name}"
            self._reply_error(message, f"{BUS}.Error.UnknownObject", text)
        elif message.member == "GetAll":
            self._reply(message, "a{sv}", found)
        else:
            self._reply(message, "v", found[name[0]])
