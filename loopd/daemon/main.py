# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd: wiring, start and end of the daemon.

The order matters: everything that a call needs is there before the name is asked for, because an
activating call is delivered before that has an answer.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import resource
import signal
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from loopd import __version__, notify
from loopd.bus import codec, dial, transport
from loopd.bus.frame import Frame
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
from loopd.daemon.devices.records import Records, are_left
from loopd.daemon.devices.registry import Listeners, Registry
from loopd.daemon.devices.spare_numbers import Spares
from loopd.daemon.host import instance_lock, journal, questions, systemd
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.host.logind import HINTS, Logind
from loopd.daemon.host.polkit import Authority
from loopd.daemon.host.udev_marks import Markers
from loopd.daemon.host.uevent_budget import Uevents
from loopd.daemon.host.uevents import Monitor, listen
from loopd.daemon.server.announcer import NAME, Announcer
from loopd.daemon.server.dispatcher import Bus
from loopd.daemon.server.interface import Service
from loopd.errors import BusError, LoopError
from loopd.loop import kernel, loop_device, mounts

from .config import DEFAULT_PATH, Config, limited, load
from .idle import Idle
from .quota import Quota
from .threads import Threads

log = logging.getLogger(__name__)

# The device, its file and its lock; what calls under way carry, and what is being closed.
_FDS_PER_DEVICE = 3
_STORED_FDS_PER_DEVICE = 2
_OTHER_FDS = 512
# How long a stop waits for the kernel and for calls under way; autoclear does the rest.
_STOP_TIMEOUT = 5.0
# How long another loopd may take to its end, which is three of the above at worst.
_OTHERS_END = 20.0
# How many mistakes in the settings the manager's property tells; the log has all.
_TOLD = 3


def main() -> None:
    """The command `loopd`; returns only by ending the process."""
    arguments = _parser().parse_args()
    config, mistakes = load(arguments.config)
    error = "; ".join(mistakes[:_TOLD])
    if arguments.check_config:
        sys.exit(_told(mistakes))
    if mistakes and not _has_left(arguments.runtime_directory):
        # What systemd knows of a unit that has failed it tells to everybody, as loopctl does.
        notify.tell(f"STATUS={error}")
        # The unit says that starting anew is of no use then.
        sys.exit(_told(mistakes))
    journal.start(debug=arguments.debug)
    for mistake in mistakes:
        log.error("%s: the default holds, so that no device is lost", mistake)
    try:
        config = _fit(config)
        threads = Threads()
        # Not closed: what is in it is ours to the very end, also of threads that detach.
        ours = ExitStack()
        status = asyncio.run(_run(config, error, arguments.runtime_directory, threads, ours))
    except (BusError, LoopError) as exc:
        notify.tell(f"STATUS={exc}")
        sys.exit(f"loopd: {exc}")
    except OSError as exc:
        notify.tell(f"STATUS={exc}")
        sys.exit(f"loopd: cannot start: {exc}")
    if hanging := threads.stop(_STOP_TIMEOUT):
        # A thread that a hanging file holds would keep the interpreter from ending, too.
        log.warning(
            "leaving with %d calls under way on files or devices that hang: the kernel may keep "
            "this process until their servers answer or are aborted",
            hanging,
        )
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _told(mistakes: list[str]) -> int:
    """Tell the mistakes in the settings; returns the exit status."""
    for mistake in mistakes:
        print(f"loopd: {mistake}", file=sys.stderr)
    return os.EX_CONFIG if mistakes else os.EX_OK


def _has_left(runtime_directory: Path) -> bool:
    """Whether there are devices of a former loopd, which would be lost without another one."""
    return systemd.passes_fds() or are_left(runtime_directory)


def _fit(config: Config) -> Config:
    """Take as many open files as the system gives, and what they are enough for."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    return limited(config, files - _OTHER_FDS, _FDS_PER_DEVICE, f"{files} open files are")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loopd", description="Give programs loop devices, over D-Bus, as org.example.Loop1."
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--runtime-directory",
        type=Path,
        default=Path("/run/loopd"),
        metavar="DIR",
        help="where udev's rules look for the marks (default: %(default)s)",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="tell the mistakes in the settings, and end"
    )
    parser.add_argument("--debug", action="store_true", help="log every step")
    parser.add_argument("--version", action="version", version=f"loopd {__version__}")
    return parser


async def _run(
    config: Config,
    configuration_error: str,
    runtime_directory: Path,
    threads: Threads,
    ours: ExitStack,
) -> int:
    """Serve until SIGTERM, SIGINT or the loss of the bus; returns the exit status.

    `ours` gets what is not to be given back before the process has ended.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(status: int, why: str) -> None:
        if not ended.done():
            log.log(logging.ERROR if status else logging.INFO, "%s", why)
            ended.set_result(status)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, 0, f"stopping on {number.name}")

    markers, records, store = Markers(runtime_directory), Records(runtime_directory), FdStore()
    lifetimes: Lifetimes | None = None

    def heard(_: Frame) -> None:
        # Whatever it is, see logind.HINTS.
        if lifetimes:
            lifetimes.users_may_have_left()

    address = dial.system_bus_address()
    asking = await questions.connect(threads, address, on_signal=heard, on_lost=partial(end, 1))
    try:
        if await asking.call_bus("NameHasOwner", "s", [NAME]) != [False]:
            raise BusError(f"another process owns {NAME} already")
        # Another one may be letting go yet, though it has given up the name.
        claim = partial(instance_lock.claim, runtime_directory, _OTHERS_END)
        ours.enter_context(await threads.run(claim))
        await questions.protect(asking)
        await threads.run(markers.prepare)
        await threads.run(mounts.prepare)
        socket = await threads.run(partial(dial.connect, address))
    except BaseException:
        asking.close()
        raise
    unit = systemd.Unit(asking.call)
    store.room = await unit.fds_at_most()
    if store.room:
        config = limited(
            config, store.room, _STORED_FDS_PER_DEVICE, f"a store of {store.room} fds is"
        )

    # Each part gets the calls it may make of the ones above it, which are made further down.
    announcer: Announcer
    bus: Bus
    idle: Idle
    ending: Ending
    manager: Manager

    def added(device: Device) -> None:
        ending.device_came(device)
        records.note(device)
        announcer.added(device)

    def changed(device: Device) -> None:
        if registry.knows(device):
            records.note(device)
            announcer.changed(device)
            ending.device_changed(device)

    def record(device: Device) -> None:
        # One that is being attached is recorded when it has its lease.
        if registry.knows(device):
            records.save(device)

    def removed(device: Device) -> None:
        ending.device_gone(device)
        announcer.removed(device)
        if device.managed:
            records.remove(device.label)
            idle.touch()

    listeners = Listeners(added=added, changed=changed, removed=removed)
    registry = Registry(threads, markers, listeners, kernel.loop_numbers)
    mounts.ask_for_loops(registry.file_behind)
    announcer = Announcer(
        registry,
        config.limits,
        configuration_error,
        emit=lambda *signal, **whose: bus.emit(*signal, **whose),
    )
    service = Service(registry, announcer)
    bus = Bus(
        partial(transport.Connection, socket),
        config.limits,
        threads,
        who_is=asking.user_of,
        find=service.find,
        before_reply=announcer.flush,
        client_left=lambda client: manager.client_left(client),
        on_quiet=lambda: idle.touch(),
        on_lost=partial(end, 1),
    )
    idle = Idle(
        config.idle_timeout,
        is_busy=lambda: bus.busy or registry.managed > 0,
        leave=partial(end, 0, "leaving, with nothing to do"),
    )
    authority = Authority(
        asking.call,
        timeout=config.deadlines.authorization,
        interactive_timeout=config.deadlines.interactive_authorization,
        max_questions=config.limits.questions_per_user,
    )
    lifetimes = Lifetimes(
        Leases(),
        registry,
        records,
        store,
        threads,
        Logind(asking.call),
        config.limits,
        let_go=lambda devices: ending.let_go_all(devices),
    )
    ours.callback(lifetimes.close)
    locks = Locks(threads, registry.changed, record, exclusive_for=config.deadlines.exclusive_lock)
    spares = Spares(threads)
    ending = Ending(threads, registry, records, lifetimes, locks, spares)
    uevents = Uevents()
    manager = Manager(config, threads, authority, registry, lifetimes, locks, ending, uevents)
    claims = Claims()
    operations = Operations(manager, registry, locks, claims, threads, lifetimes, store, uevents)
    quota = Quota(
        "loop devices",
        per_user=config.limits.devices_per_user,
        in_all=config.limits.devices,
        hint="detach one first (a device counts until the kernel has let go of it)",
    )
    attaching = Attaching(
        config,
        threads,
        authority,
        markers,
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
    restoring = Restoring(
        threads,
        registry,
        records,
        store,
        lifetimes,
        locks,
        quota,
        claim=attaching.take_back,
        rejoin=bus.rejoin,
        let_go=ending.let_go,
    )
    service.serve(manager, operations, attaching)
    announcer.start()

    monitor = alive = stopping = None
    try:
        for rule in HINTS:
            await asking.call_bus("AddMatch", "s", [rule])
        await bus.start()
        records.bus = await bus.id()
        await restoring.restore()
        # Listening before looking, so that nothing falls between.
        monitor = Monitor(listen(), registry.heard, registry.look_at_private)
        await registry.look_at_all()
        await threads.run(partial(_clean_up, markers))
        await bus.own(NAME)
        log.info("loopd %s serves %s with %s", __version__, NAME, codec.LIBRARY)
        alive = asyncio.ensure_future(_live(threads, configuration_error, bus, store, unit))
        idle.touch()

        status = await ended
        stopping = asyncio.ensure_future(_tell(threads, "STOPPING=1"))
        idle.stop()
        # The name first: whoever calls from now on starts the next loopd instead of losing a call.
        attaching.refuse()
        authority.stop()
        await bus.release(NAME, _STOP_TIMEOUT)
        # What is in the store is the next loopd's; systemd starts it after a failure, too.
        if not (store.room and (status or await unit.restarts())):
            await ending.stop(_STOP_TIMEOUT)
        await bus.leave(_STOP_TIMEOUT)
        return status
    finally:
        bus.connection.close()
        asking.close()
        if monitor:
            monitor.close()
        for task in (alive, stopping):
            if task:
                task.cancel()


async def _live(
    threads: Threads, configuration_error: str, bus: Bus, store: FdStore, unit: systemd.Unit
) -> None:
    """Tell systemd that we are there, and go on telling; it may not read for a while."""
    tell = partial(_tell, threads)
    # systemd shows it until the next start.
    status = f"defaults hold where settings are wrong: {configuration_error}"
    await tell(f"READY=1\nSTATUS={status}" if configuration_error else "READY=1")
    if interval := systemd.watchdog_interval():
        await systemd.stay_alive(interval, bus.ping, partial(_compare, store, unit), tell)


async def _tell(threads: Threads, state: str) -> None:
    # Where nothing else waits for systemd, or for files.
    await threads.look(partial(notify.tell, state))


async def _compare(store: FdStore, unit: systemd.Unit) -> None:
    if store.room:
        with contextlib.suppress(LoopError, BusError):
            store.compare(await unit.fds_kept())


def _clean_up(markers: Markers) -> None:
    """Take away what a loopd that was killed has left of its devices."""
    for number in markers.prune():
        try:
            loop_device.clean(number)
        except OSError as exc:
            log.warning("cannot remove the partitions of loop%d: %s", number, exc.strerror)
