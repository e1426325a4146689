# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long devices are kept: by a connection, by a user's being there, and by Holds beside them.

A Hold is a pair of connected sockets. The client has one of them, and the Hold lasts until its last
copy is closed, in any process, or shut down. Reading it gives its end when the device is gone.
"""

import asyncio
import logging
import select
import socket
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from loopd.daemon.access import Client
from loopd.daemon.config import Limits
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.host.logind import Logind
from loopd.daemon.quota import Place, Quota
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.errors import NoSuchDevice, NotSupported
from loopd.fd import OwnedFd

from .device import ATTACHED, Device
from .leases import CONNECTION, SYSTEM, USER, Lease, Leases
from .records import Records
from .registry import Registry

log = logging.getLogger(__name__)

# Between two rounds of questions to logind, because anybody may send what makes us ask.
_PAUSE = 0.1


@dataclass(eq=False)
class _Hold:
    name: str
    device: Device
    uid: int
    our_end: OwnedFd
    place: Place


class Lifetimes:
    """The leases and the Holds of all devices; `let_go` detaches those that nothing keeps."""

    def __init__(
        self,
        leases: Leases,
        registry: Registry,
        records: Records,
        store: FdStore,
        threads: Threads,
        logind: Logind,
        limits: Limits,
        let_go: Callable[[list[Device]], None],
    ) -> None:
        self._leases = leases
        self._registry = registry
        self._records = records
        self._store = store
        self._threads = threads
        self._logind = logind
        self._let_go = let_go
        self._quota = Quota(
            "Holds", per_user=limits.holds_per_user, in_all=limits.holds, hint="close one first"
        )
        self._holds: defaultdict[str, set[_Hold]] = defaultdict(set)
        self._by_fd: dict[int, _Hold] = {}
        # A set of its own, because the event loop would ask for what can be read: nothing ever can,
        # and a socket whose other end cannot send always says that it is at its end.
        self._ends = select.epoll()
        self._looking = False
        self._look_again = False
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ends.fileno(), self._some_closed)

    def close(self) -> None:
        """Take note of no Hold's end any more."""
        self._loop.remove_reader(self._ends.fileno())
        self._ends.close()

    # --- leases ---------------------------------------------------------------------------------

    async def require(self, uid: int, lifetime: str) -> None:
        """Raise NotSupported if a device of this user cannot have such a lifetime."""
        if lifetime == USER and not await self._logind.knows(uid):
            raise NotSupported(
                f"lifetime: logind does not know the uid {uid}, so it would not say when it leaves"
            )

    def grant(self, device: Device, client: Client, lifetime: str) -> None:
        """Keep a device for so long from now on, on disk first; `connection` is the client's.

        Raises OSError, and then nothing has changed.
        """
        lease = _lease(device, client, lifetime)
        self._records.save(device, lease)
        self._grant(device, lease)

    def announce(self, device: Device, client: Client, lifetime: str) -> None:
        """Record what is about to be granted, should loopd die before it is. Raises OSError."""
        self._records.save(device, _lease(device, client, lifetime))

    def _grant(self, device: Device, lease: Lease) -> None:
        self._leases.end(device.path)
        device.lease = lease
        self._leases.grant(lease)
        # The user may have left after logind was asked and before it was noted.
        if lease.lifetime == USER:
            self.users_may_have_left()

    def take_back(
        self, device: Device, lease: Lease, holds: dict[str, tuple[int, OwnedFd]]
    ) -> None:
        """Take up the lease and the Holds, by name, of a device that a former loopd attached."""
        self._grant(device, lease)
        for name, (uid, our_end) in holds.items():
            self._watch(_Hold(name, device, uid, our_end, self._quota.take_back(uid)))

    def holder_is_gone(self, device: Device) -> None:
        """End the lease of a connection that has left while there was no loopd."""
        if device.lease:
            self._over([device.lease], f"{device.lease.holder} has left", {"UID": device.owner})

    def end(self, device: Device) -> None:
        """Keep a device no more, whatever does."""
        self._leases.end(device.path)
        device.lease = None

    def gone(self, device: Device) -> None:
        """Tell those who hold a device that it is gone."""
        self.end(device)
        for hold in [*self._holds.get(device.path, ())]:
            self._close(hold)

    def client_left(self, client: Client) -> None:
        """End what was kept by a connection."""
        self._over(self._leases.held_by(client.name), f"{client.name} has left", client.fields)

    def users_may_have_left(self) -> None:
        """Ask logind whether the users whom it knew are still there."""
        self._look_again = True
        if not self._looking:
            self._looking = True
            self._tasks.start(self._look_for_users())

    async def _look_for_users(self) -> None:
        try:
            while self._look_again:
                self._look_again = False
                for uid in self._leases.users():
                    if not await self._logind.has_forgotten(uid):
                        continue
                    leases = self._leases.of_user(uid)
                    self._over(leases, f"the user {uid} has left", {"UID": uid})
                await asyncio.sleep(_PAUSE)
        finally:
            self._looking = False

    def _over(self, leases: list[Lease], why: str, fields: dict[str, object]) -> None:
        """Leave devices to those who hold them."""
        unheld = []
        for lease in leases:
            self._leases.over(lease)
            device = self._registry.at(lease.device)
            if device is None:
                continue
            if device.holds:
                extra = {"ACTION": "Detach", **fields, **device.fields}
                count = len(device.holds)
                log.info("%s: %s is kept by %d Holds", why, device.node, count, extra=extra)
                self._registry.changed(device)
            else:
                unheld.append(device)
        for device in unheld:
            extra = {"ACTION": "Detach", **fields, **device.fields}
            log.info("%s: detaching %s", why, device.node, extra=extra)
        self._let_go(unheld)

    # --- Holds ----------------------------------------------------------------------------------

    async def hold(self, device: Device, client: Client) -> OwnedFd:
        """Keep a device for as long as the returned fd, or a copy of it, is open.

        Raises LimitsExceeded, AccessDenied, NoSuchDevice, and OSError if it cannot be recorded.
        """
        with self._quota.take(client.uid) as place, ExitStack() as failed:
            ours, theirs = _connected()
            failed.enter_context(theirs)
            failed.enter_context(ours)
            name = self._store.name(device.label, "hold")
            # Only with its device, or it would last a little longer than that. In turn: systemd may
            # not read for a while, and many Holds must not take all threads.
            if self._store.keeps(device.label):
                our_end = await self._threads.run_in_turn(
                    client.uid,
                    Work.OPERATION,
                    partial(self._store.keep, name, ours),
                    late=OwnedFd.close,
                )
            else:
                our_end = ours.move()
            hold = _Hold(name, device, client.uid, our_end, place.keep())
            failed.callback(self._start_end, hold)
            client.require_present()
            if not self._registry.knows(device) or device.state != ATTACHED:
                raise NoSuchDevice(f"{device.node} is gone")
            # On disk first: the next loopd drops a Hold that it has no record of.
            device.holds = {**device.holds, name: client.uid}
            failed.callback(self._count, device)
            self._records.save(device)
            failed.pop_all()
            self._watch(hold)
        return theirs

    def _watch(self, hold: _Hold) -> None:
        self._holds[hold.device.path].add(hold)
        self._by_fd[hold.our_end.fileno()] = hold
        self._ends.register(hold.our_end.fileno(), 0)  # tells of a hangup and nothing else
        self._count(hold.device)

    def _some_closed(self) -> None:
        for fd, _ in self._ends.poll(0):
            if hold := self._by_fd.get(fd):
                self._closed(hold)

    def _closed(self, hold: _Hold) -> None:
        """Take note that nobody has the client's end open any more."""
        device = hold.device
        self._close(hold)
        if device.lease and device.lease.over and not device.holds and device.state == ATTACHED:
            extra = {"ACTION": "Detach", "UID": device.owner, **device.fields}
            log.info("nobody holds %s any more: detaching it", device.node, extra=extra)
            self._let_go([device])

    def _close(self, hold: _Hold) -> None:
        # Also out of the set, where it would stay for as long as systemd has a copy.
        self._ends.unregister(hold.our_end.fileno())
        del self._by_fd[hold.our_end.fileno()]
        self._start_end(hold)
        holds = self._holds[hold.device.path]
        holds.discard(hold)
        if not holds:
            del self._holds[hold.device.path]
        self._count(hold.device)

    def _start_end(self, hold: _Hold) -> None:
        if self._store.keeps(hold.name):
            self._tasks.start(self._end(hold))
        else:
            hold.our_end.close()
            hold.place.free()

    async def _end(self, hold: _Hold) -> None:
        """Close a Hold, whose place is free when the store has room again."""
        with hold.place:
            await self._threads.run_in_turn(hold.uid, Work.ENDING, hold.our_end.close)

    def _count(self, device: Device) -> None:
        device.holds = {hold.name: hold.uid for hold in self._holds.get(device.path, ())}
        if self._registry.knows(device):
            self._registry.changed(device)


def _connected() -> tuple[OwnedFd, OwnedFd]:
    """Our end and the client's, which can send neither bytes nor fds.

    No pipe: its user could make it larger, at the expense of root's share of the memory for pipes.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        theirs.shutdown(socket.SHUT_WR)
        return OwnedFd(ours.detach()), OwnedFd(theirs.detach())


def _lease(device: Device, client: Client, lifetime: str) -> Lease:
    holder = client.name if lifetime == CONNECTION else ""
    return Lease(device.path, device.owner, holder, lifetime, autoclear=lifetime != SYSTEM)
