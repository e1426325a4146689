# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach of a block device that needs no loop device: it is recorded as what it is.

Nothing is bound, and nothing will be cleared. Its object is its owner's alone.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from loopd.daemon.access import Caller
from loopd.daemon.devices.device import Device
from loopd.daemon.devices.lifetimes import Lifetimes
from loopd.daemon.devices.registry import Registry
from loopd.daemon.host.fd_store import FdStore
from loopd.daemon.quota import Quota
from loopd.daemon.tasks import Tasks
from loopd.daemon.threads import Threads, Work
from loopd.fd import OwnedFd
from loopd.loop import kernel

from .examine import Block, Proposal


class Passthrough:
    """The use case, with what it needs."""

    def __init__(
        self,
        threads: Threads,
        registry: Registry,
        lifetimes: Lifetimes,
        quota: Quota,
        store: FdStore,
    ) -> None:
        self._threads = threads
        self._registry = registry
        self._lifetimes = lifetimes
        self._quota = quota
        self._store = store
        # From a number on that no former loopd has reached: a path names one attachment for ever.
        self._counter = itertools.count(_now())
        self._tasks = Tasks()

    async def hold(
        self,
        caller: Caller,
        fd: OwnedFd,
        proposal: Proposal,
        block: Block,
        admit: Callable[[], None],
    ) -> Device:
        """Record a block device for a caller. Takes the fd over.

        `admit` is called just before, and may raise. Raises LimitsExceeded, AccessDenied, OSError.
        """
        status = block.status
        with self._quota.take(caller.uid) as place, ExitStack() as failed:
            device = Device(
                number=None,
                name=status.backing_file.removeprefix(b"/dev/").decode().replace("/", "!"),
                diskseq=status.diskseq,
                which=next(self._counter),
                status=status,
                file=proposal.file.identity,
                sector_size=block.sector_size,
                owner=caller.uid,
                attached_at=_now(),
            )
            # Closed as what it is: no filesystem has a say in it.
            held = OwnedFd(fd.release(), kernel.close)
            failed.enter_context(held)
            kept = await self._threads.run_in_turn(
                caller.uid,
                Work.OPERATION,
                partial(self._store.keep, device.label, held),
                late=OwnedFd.close,
            )
            failed.callback(self._close, caller.uid, kept)
            caller.client.require_present()
            admit()
            self._lifetimes.grant(device, caller.client, proposal.options.lifetime)
            failed.pop_all()
            device.held, device.place = kept, place.keep()
        self._registry.record(device)
        return device

    def _close(self, uid: int, fd: OwnedFd) -> None:
        self._tasks.start(self._threads.run_in_turn(uid, Work.ENDING, fd.close))


def _now() -> int:
    return time.time_ns() // 1000
