# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the daemon starts and stops, in named steps.

The order matters: everything that a call needs is there before the name is asked for, because an
activating call is delivered before that has an answer.
"""

import asyncio
import contextlib
import logging
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from socket import socket

from loopd import __version__, notify
from loopd.bus import codec, dial, transport
from loopd.daemon.host import instance_lock, questions, systemd
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.host.logind import HINTS, Logind
from loopd.daemon.host.polkit import Authority
from loopd.daemon.host.udev_marks import Markers
from loopd.daemon.host.uevents import Monitor, listen
from loopd.daemon.server.announcer import NAME
from loopd.daemon.server.dispatcher import Bus
from loopd.errors import BusError, LoopError
from loopd.loop import kernel, loop_device, mounts

from .assembly import Daemon, Host, Upwards, put_together
from .config import Config, limited
from .threads import Threads

log = logging.getLogger(__name__)

STOP_TIMEOUT = 5.0
"""How long a stop waits for the kernel and for calls under way; autoclear does the rest."""
# How long another loopd may take to its end, which is three of the above at worst.
_OTHERS_END = 20.0
_STORED_FDS_PER_DEVICE = 2


async def run(
    config: Config,
    configuration_error: str,
    runtime_directory: Path,
    threads: Threads,
    ours: ExitStack,
) -> int:
    """Serve until SIGTERM, SIGINT or the loss of the bus; returns the exit status.

    `ours` gets what is not to be given back before the process has ended.
    """
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    end = partial(_end, ended)
    _end_on_signals(end)
    up = Upwards()
    with ExitStack() as until_end:
        address = dial.system_bus_address()
        on_lost = partial(end, 1)
        asking = await questions.connect(threads, address, on_signal=up.heard, on_lost=on_lost)
        until_end.callback(asking.close)
        host = _host(config, runtime_directory, threads, asking)
        bus_socket = await _prepare(host, runtime_directory, asking, address, ours)
        unit = systemd.Unit(asking.call)
        host.store.room = await unit.fds_at_most()
        config = _fit_store(config, host.store)
        daemon = put_together(config, configuration_error, host, up, bus_socket, asking, end)
        ours.callback(daemon.use_cases.lifetimes.close)
        until_end.callback(lambda: daemon.bus.connection.close())
        await _start(daemon, asking, until_end)
        alive = _live(threads, configuration_error, daemon.bus, host.store, unit)
        until_end.callback(asyncio.ensure_future(alive).cancel)
        daemon.idle.touch()
        status = await ended
        until_end.callback(asyncio.ensure_future(_tell(threads, "STOPPING=1")).cancel)
        await _stop(daemon, unit, status)
        return status


def _end(ended: asyncio.Future[int], status: int, why: str) -> None:
    if not ended.done():
        log.log(logging.ERROR if status else logging.INFO, "%s", why)
        ended.set_result(status)


def _end_on_signals(end: partial[None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, 0, f"stopping on {number.name}")


def _host(
    config: Config, runtime_directory: Path, threads: Threads, asking: transport.Connection
) -> Host:
    authority = Authority(
        asking.call,
        timeout=config.deadlines.authorization,
        interactive_timeout=config.deadlines.interactive_authorization,
        max_questions=config.limits.questions_per_user,
    )
    logind = Logind(asking.call)
    return Host(
        runtime_directory, threads, authority=authority, logind=logind, numbers=kernel.loop_numbers
    )


async def _prepare(
    host: Host,
    runtime_directory: Path,
    asking: transport.Connection,
    address: str,
    ours: ExitStack,
) -> socket:
    """Become the one loopd, and make what it needs; returns the socket for its calls."""
    threads = host.threads
    if await asking.call_bus("NameHasOwner", "s", [NAME]) != [False]:
        raise BusError(f"another process owns {NAME} already")
    # Another one may be letting go yet, though it has given up the name.
    claim = partial(instance_lock.claim, runtime_directory, _OTHERS_END)
    ours.enter_context(await threads.run(claim))
    await questions.protect(asking)
    await threads.run(host.markers.prepare)
    await threads.run(mounts.prepare)
    return await threads.run(partial(dial.connect, address))


def _fit_store(config: Config, store: FdStore) -> Config:
    """Allow no more devices than the store takes fds of, if there is one."""
    if not store.room:
        return config
    return limited(config, store.room, _STORED_FDS_PER_DEVICE, f"a store of {store.room} fds is")


async def _start(daemon: Daemon, asking: transport.Connection, until_end: ExitStack) -> None:
    """Take up the devices that there are, then own the name."""
    host, registry, bus = daemon.use_cases.host, daemon.use_cases.registry, daemon.bus
    mounts.ask_for_loops(registry.file_behind)
    daemon.announcer.start()
    for rule in HINTS:
        await asking.call_bus("AddMatch", "s", [rule])
    await bus.start()
    host.records.bus = await bus.id()
    await daemon.restoring.restore()
    # Listening before looking, so that nothing falls between.
    monitor = Monitor(listen(), registry.heard, registry.look_at_private)
    until_end.callback(monitor.close)
    await registry.look_at_all()
    await host.threads.run(partial(_clean_up, host.markers))
    await bus.own(NAME)
    log.info("loopd %s serves %s with %s", __version__, NAME, codec.LIBRARY)


async def _stop(daemon: Daemon, unit: systemd.Unit, status: int) -> None:
    """Give up the name, then the devices unless the next loopd takes them up, then the bus."""
    cases = daemon.use_cases
    daemon.idle.stop()
    # The name first: whoever calls from now on starts the next loopd instead of losing a call.
    cases.attaching.refuse()
    cases.host.authority.stop()
    await daemon.bus.release(NAME, STOP_TIMEOUT)
    # What is in the store is the next loopd's; systemd starts it after a failure, too.
    if not (cases.host.store.room and (status or await unit.restarts())):
        await cases.ending.stop(STOP_TIMEOUT)
    await daemon.bus.leave(STOP_TIMEOUT)


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
