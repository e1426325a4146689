# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts the daemon together: the use cases on the parts of the host, and the D-Bus face on both.

Each part is given the parts below it. All calls in the other direction are in Upwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket
from typing import Any

from loopd.bus import transport
from loopd.bus.frame import Frame
from loopd.daemon.access import Client
from loopd.daemon.actions.attach import Attaching
from loopd.daemon.actions.change import Operations
from loopd.daemon.actions.detach import Ending
from loopd.daemon.actions.guard import Manager
from loopd.daemon.actions.restore import Restoring
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.leases import Leases
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.locks import Locks
from loopd.daemon.devices.overlap import Claims
from loopd.daemon.devices.records import Records
from loopd.daemon.devices.registry import Listeners, Registry
from loopd.daemon.devices.spare_numbers import Spares
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.host.logind import Logind
from loopd.daemon.host.polkit import Authority
from loopd.daemon.host.udev_marks import Markers
from loopd.daemon.host.uevent_budget import Uevents
from loopd.daemon.server.announcer import Announcer
from loopd.daemon.server.dispatcher import Bus
from loopd.daemon.server.interface import Service

from .config import Config
from .idle import Idle
from .quota import Quota
from .threads import Threads


class Host:
    """The parts that do not need the use cases. A test replaces the last three."""

    def __init__(
        self,
        runtime_directory: Path,
        threads: Threads,
        *,
        authority: Authority,
        logind: Logind,
        numbers: Callable[[], list[int]],
    ) -> None:
        """`numbers` lists the numbers of all loop devices that exist."""
        self.threads = threads
        self.markers = Markers(runtime_directory)
        self.records = Records(runtime_directory)
        self.store = FdStore()
        self.authority = authority
        self.logind = logind
        self.numbers = numbers


@dataclass(frozen=True)
class UseCases:
    """The devices, and what can be done with them. No part in here knows D-Bus."""

    host: Host
    registry: Registry
    leases: Leases
    lifetimes: Lifetimes
    locks: Locks
    claims: Claims
    quota: Quota
    spares: Spares
    ending: Ending
    manager: Manager
    operations: Operations
    attaching: Attaching


@dataclass(frozen=True)
class Daemon:
    """All parts of the daemon, put together and not started."""

    use_cases: UseCases
    announcer: Announcer
    bus: Bus
    idle: Idle
    restoring: Restoring


class Upwards:
    """The calls that parts make of parts above them.

    The assembly sets those parts when it has made them.
    """

    records: Records
    registry: Registry
    lifetimes: Lifetimes | None = None
    ending: Ending
    manager: Manager
    announcer: Announcer
    bus: Bus
    idle: Idle

    def added(self, device: Device) -> None:
        """The registry has a new device."""
        self.ending.device_came(device)
        self.records.note(device)
        self.announcer.added(device)

    def changed(self, device: Device) -> None:
        """The registry has seen a device change."""
        if self.registry.knows(device):
            self.records.note(device)
            self.announcer.changed(device)
            self.ending.device_changed(device)

    def removed(self, device: Device) -> None:
        """The registry has forgotten a device."""
        self.ending.device_gone(device)
        self.announcer.removed(device)
        if device.managed:
            self.records.remove(device.label)
            self.idle.touch()

    def record(self, device: Device) -> None:
        """A lock has changed. A device that is being attached is recorded when it has its lease."""
        if self.registry.knows(device):
            self.records.save(device)

    def let_go_all(self, devices: list[Device]) -> None:
        """The leases of these devices have ended."""
        self.ending.let_go_all(devices)

    def heard(self, _: Frame) -> None:
        """The bus has sent a signal that logind.HINTS asks for, which can come before the parts."""
        if self.lifetimes:
            self.lifetimes.users_may_have_left()

    def emit(self, *signal: Any, **whose: Any) -> None:
        """The announcer has a signal to send."""
        self.bus.emit(*signal, **whose)

    def client_left(self, client: Client) -> None:
        """The bus has told that a connection has closed."""
        self.manager.client_left(client)

    def quiet(self) -> None:
        """No call is under way any more."""
        self.idle.touch()


def put_use_cases_together(config: Config, host: Host, up: Upwards) -> UseCases:
    """Make the registry and the use cases."""
    threads, records, store = host.threads, host.records, host.store
    listeners = Listeners(added=up.added, changed=up.changed, removed=up.removed)
    registry = Registry(threads, host.markers, listeners, host.numbers)
    leases = Leases()
    lifetimes = Lifetimes(
        leases,
        registry,
        records,
        store,
        threads,
        host.logind,
        config.limits,
        let_go=up.let_go_all,
    )
    exclusive_for = config.deadlines.exclusive_lock
    locks = Locks(threads, registry.changed, up.record, exclusive_for=exclusive_for)
    spares, uevents, claims, quota = Spares(threads), Uevents(), Claims(), _quota(config)
    ending = Ending(threads, registry, records, lifetimes, locks, spares)
    manager = Manager(config, threads, host.authority, registry, lifetimes, locks, ending, uevents)
    operations = Operations(manager, registry, locks, claims, threads, lifetimes, store, uevents)
    attaching = Attaching(
        config,
        threads,
        host.authority,
        host.markers,
        registry,
        lifetimes,
        locks,
        claims,
        quota,
        store,
        spares,
        uevents,
        let_go=ending.let_go,
    )
    up.records, up.registry, up.lifetimes = records, registry, lifetimes
    up.ending, up.manager = ending, manager
    return UseCases(
        host, registry, leases, lifetimes, locks, claims, quota, spares, ending, manager,
        operations, attaching,
    )  # fmt: skip


def put_together(
    config: Config,
    configuration_error: str,
    host: Host,
    up: Upwards,
    bus_socket: socket,
    asking: transport.Connection,
    end: Callable[[int, str], None],
) -> Daemon:
    """Make all parts. `end` ends the daemon with a status and a reason."""
    cases = put_use_cases_together(config, host, up)
    announcer = Announcer(cases.registry, config.limits, configuration_error, emit=up.emit)
    service = Service(cases.registry, announcer)
    bus = Bus(
        partial(transport.Connection, bus_socket),
        config.limits,
        host.threads,
        who_is=asking.user_of,
        find=service.find,
        before_reply=announcer.flush,
        client_left=up.client_left,
        on_quiet=up.quiet,
        on_lost=partial(end, 1),
    )
    idle = Idle(
        config.idle_timeout,
        is_busy=lambda: bus.busy or cases.registry.managed > 0,
        leave=partial(end, 0, "leaving, with nothing to do"),
    )
    up.announcer, up.bus, up.idle = announcer, bus, idle
    service.serve(cases.manager, cases.operations, cases.attaching)
    return Daemon(cases, announcer, bus, idle, _restoring(cases, bus))


def _quota(config: Config) -> Quota:
    return Quota(
        "loop devices",
        per_user=config.limits.devices_per_user,
        in_all=config.limits.devices,
        hint="detach one first (a device counts until the kernel has let go of it)",
    )


def _restoring(cases: UseCases, bus: Bus) -> Restoring:
    return Restoring(
        cases.host.threads,
        cases.registry,
        cases.host.records,
        cases.host.store,
        cases.lifetimes,
        cases.locks,
        cases.quota,
        claim=cases.attaching.take_back,
        rejoin=bus.rejoin,
        let_go=cases.ending.let_go,
    )
