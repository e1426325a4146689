# SPDX-License-Identifier: LGPL-2.1-or-later
"""One device of loopd, for asyncio programs: what can be done to it, and what is told of it.

It stands for one attachment and never for a later one; how that came about is not its business.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Literal

from loopd import errors
from loopd.fd import OwnedFd
from loopd.loop import kernel

from . import settling
from .absence import Unavailable
from .link import Link, Options, Unanswered, checked, is_a, make_options
from .properties import NO_NUMBER, Properties
from .watch import DEVICE, PROPERTIES, Ended

# Seconds that a loopd may take to follow another, and between looks at a device meanwhile.
_SUCCESSION = 10.0
_LOOK = 0.05

SETTLING = 30.0
"""Seconds that udev may take: at boot it has much to do."""

Lock = Literal["none", "shared", "exclusive"]
"""A BSD lock on a device; udev and other programs keep off while it is taken."""


Lifetime = Literal["connection", "user", "system"]
"""How long a device is kept: by its client's connection, its user's being there, or for ever."""


class Device:
    """A device object of loopd. It stands for one attachment and never for a later one.

    Each method raises UnknownObject or NoSuchDevice once the device is gone, and errors.BusError
    where loopd is out of reach.
    """

    def __init__(self, link: Link, path: str, node: str, diskseq: int) -> None:
        self._link = link
        self.path = path
        """The object path."""
        self.node = node
        """Such as /dev/loop3."""
        self.diskseq = diskseq
        """The kernel's number of this attachment."""
        self.gone = False
        """Whether this object has been told that there is no such device any more."""

    def __repr__(self) -> str:
        return f"<Device {self.node} diskseq={self.diskseq}>"

    async def detach(self, *, lazy: bool = False) -> bool:
        """Detach it; true when it is gone, false when the kernel will finish at the last close.

        `lazy` is for devices that are mounted or exclusively open, which otherwise raise
        DeviceBusy. Raises AccessDenied.
        """
        options = make_options(("lazy", "b", lazy or None))
        try:
            gone = await self._detach(options)
        except (errors.NoSuchDevice, errors.UnknownObject):
            self.gone = True
            raise
        self.gone = gone
        return gone

    async def _detach(self, options: Options) -> bool:
        call = (self.path, DEVICE, "Detach", "a{sv}", [options])
        try:
            (gone,) = await self._link.call(*call, returns=[is_a(bool)], again=False)
        except Unanswered:
            try:
                (gone,) = await self._link.call(*call, returns=[is_a(bool)], again=False)
            except (errors.NoSuchDevice, errors.UnknownObject):
                gone = True  # the first call has done it
        return bool(gone)

    async def ensure_detached(self) -> bool:
        """Detach it whatever uses it; true when it is gone, however that came.

        Raises AccessDenied.
        """
        # What is out of reach goes with the connection, or has gone with loopd.
        with contextlib.suppress(errors.NoSuchDevice, errors.UnknownObject, errors.BusError):
            return await self.detach(lazy=True)
        return True

    async def resize(
        self,
        *,
        offset: int | None = None,
        size_limit: int | None = None,
        force: bool = False,
        allow_overlap: bool = False,
    ) -> int:
        """Take up the file's size, or set offset and limit; returns the size now. All in bytes.

        A `size_limit` of 0 is none. `force` shrinks a device that is in use, which otherwise
        raises DeviceBusy; `allow_overlap` maps bytes that another device maps, which otherwise
        raises Overlap. Raises InvalidArgs, AccessDenied.
        """
        options = resize_options(offset, size_limit, force, allow_overlap)
        return int(await self._answer(int, "Resize", "a{sv}", options))

    async def open(
        self, mode: Literal["r", "rw"] = "r", *, partition: int | None = None
    ) -> OwnedFd:
        """Open the device itself, which needs no right to its node; the fd is the caller's.

        It never allows more than the backing file's did. The device stays, in state detaching,
        until the fd is closed. `partition` is the number of a partition to open instead of the
        whole. A read-only device takes an administrator's yes by default, since its holder can put
        another file behind it. Raises InvalidArgs, AccessDenied, NotSupported, DeviceBusy if the
        device became read-only meanwhile, and NoSuchDevice also where there is no such partition.
        """
        options = make_options(("partition", "u", partition))
        return await self._fd("Open", "sa{sv}", [checked("mode", "s", mode), options])

    async def hold(self) -> OwnedFd:
        """Keep the device beside its lifetime, while the fd, which is the caller's, is open.

        It is a socket that cannot send. Any copy of it keeps the device, also in other processes,
        to which it can be passed on; shutdown(2) on one copy ends the Hold for all of them. Reading
        it gives its end when the device is gone. For the device's owner. Raises AccessDenied,
        LimitsExceeded, and NotSupported on a device that loopd did not attach.
        """
        return await self._fd("Hold", "a{sv}", [{}])

    async def set_lifetime(self, lifetime: Lifetime) -> None:
        """Keep the device for as long as this says from now on.

        "connection" means this client's, and is for the owner's own. "user" ends when logind
        forgets the owner, with its last session, and raises NotSupported where it does not know it.
        Raises InvalidArgs, AccessDenied.
        """
        await self._call("SetLifetime", "sa{sv}", [checked("lifetime", "s", lifetime), {}])

    async def lock(self, kind: Lock) -> None:
        """Take, change or, by "none", drop the BSD lock on the device. Never waits.

        A device has one, of the connection that took it, and it ends with that; an exclusive one
        of others than root ends after two minutes. Raises DeviceBusy where somebody else's is in
        the way, InvalidArgs, AccessDenied, NotSupported on a device that loopd did not attach.
        """
        await self._call("Lock", "sa{sv}", [checked("lock", "s", kind), {}])

    async def set_autoclear(self, enable: bool) -> None:
        """Have the kernel detach the device at its last close, or not.

        Raises NotSupported for a device of loopd's, which goes with its lease, and AccessDenied.
        """
        await self._call("SetAutoclear", "ba{sv}", [enable, {}])

    async def set_direct_io(self, enable: bool) -> bool:
        """Go past the page cache of the file, or not; returns which of them is in effect now.

        That the file does not allow it is no error. Raises AccessDenied, NotSupported.
        """
        return bool(await self._answer(bool, "SetDirectIO", "ba{sv}", enable, {}))

    async def set_reference(self, reference: str) -> None:
        """Give it another free name of at most 62 bytes, without control characters; "" for none.

        Raises InvalidArgs, AccessDenied, NotSupported.
        """
        await self._call("SetReference", "sa{sv}", [checked("reference", "s", reference), {}])

    async def set_sector_size(self, size: int) -> None:
        """Change the logical sector size, in bytes: a power of two from 512.

        0 means as the partition table says, 512 without one. Partitions that were made are brought
        in step with the table. Raises DeviceBusy for a device in use, InvalidArgs, AccessDenied,
        NotSupported.
        """
        await self._call("SetSectorSize", "ua{sv}", [checked("sector-size", "u", size), {}])

    async def rescan_partitions(self) -> int:
        """Bring the partitions' devices in step with the partition table; returns how many.

        One that is larger there grows, also while it is in use; Properties.missing_partitions has
        the numbers of those that cannot be. Raises DeviceBusy if one in use would have to go, move
        or shrink, and leaves all as they are then, AccessDenied, NotSupported, TimedOut.
        """
        return int(await self._answer(int, "RescanPartitions", "a{sv}", {}))

    async def sync(self) -> None:
        """Write to the disk what the device has taken.

        Raises ErrnoError where that fails, AccessDenied.
        """
        await self._call("Sync", "a{sv}", [{}])

    async def properties(self) -> Properties:
        """What the device is now."""
        return await properties(self._link, self.path)

    async def settled(self, timeout: float = SETTLING) -> bool:
        """Wait until udev is done with the device and its partitions, links and all.

        Then also udisks2, where that runs, knows them, and can mount them. False if udev is not
        done within `timeout` seconds. True at once where no udev runs, for a device that is locked
        exclusively, which udev leaves alone, and for a block device that needed no loop device;
        and after 3 seconds in which udev has no work at all.

        Attach itself has no option for this. udev is done 12 ms after it in the median, and after
        200 to 430 ms each tenth time, when udev has met the lock that a device has until it is
        complete. A call that long would have one of the client's places, only for what every user
        can read. Other languages have "udevadm wait /dev/disk/by-diskseq/N", by the diskseq that
        Attach returns.
        """
        now = await self.properties()
        if now.locked == "exclusive" or now.number == NO_NUMBER:
            return True
        return await settling.settled(self._link, now.number, self.diskseq, timeout)

    async def wait_ended(self) -> Ended:
        """Wait until the device is detached or out of reach, by whatever cause.

        That loopd leaves is no end where another one takes the device over, as after a restart.
        """
        managed = None
        while True:
            with self._link.watch.watched(self.path) as ended:
                try:
                    await self._link.subscribe()
                    # Whatever came before the subscription shows in the properties.
                    now = await self.properties()
                except (errors.UnknownObject, errors.NoSuchDevice):
                    return Ended.DETACHED if managed is None else Ended.DAEMON_LEFT
                except Unavailable:
                    return Ended.DAEMON_LEFT
                except errors.BusError:
                    return Ended.BUS_LOST
                if managed not in (None, now.managed):
                    return Ended.DAEMON_LEFT  # to whoever is next, it is no device of loopd's
                if now.state != "attached":
                    return Ended.DETACHED
                managed, binding = now.managed, kernel.loop_binding(now.number)
                how: Ended | None = await ended
            if how is Ended.DAEMON_LEFT:
                how = await self._without_loopd(now.number, binding)
            if how is not None:
                return how

    async def _without_loopd(self, number: int, binding: int | None) -> Ended | None:
        """How the device ends while there is no loopd; None if there is one again before that."""
        deadline = time.monotonic() + _SUCCESSION
        with self._link.watch.watched(self.path) as ended:
            while not self._link.watch.present:
                # Nobody tells a client that the kernel has let go of a device.
                if kernel.loop_binding(number) != binding or time.monotonic() > deadline:
                    return Ended.DAEMON_LEFT
                await asyncio.wait({ended}, timeout=_LOOK)
                if ended.done():
                    return ended.result()
        return None

    async def _fd(self, member: str, signature: str, body: Sequence[Any]) -> OwnedFd:
        """Call a method that returns an fd."""
        answer, fds = await self._link.call_with_fds(self.path, DEVICE, member, signature, body)
        if answer != [0] or len(fds) != 1:
            for fd in fds:
                fd.close()
            raise errors.Failed("loopd did not send the file descriptor that it announced")
        return fds[0]

    async def _call(self, member: str, signature: str, body: Sequence[Any]) -> None:
        """Call a method that returns nothing."""
        await self._link.call(self.path, DEVICE, member, signature, body)

    async def _answer(self, kind: type, member: str, signature: str, *body: Any) -> Any:
        """Call a method that returns one value, of this type."""
        (answer,) = await self._link.call(
            self.path, DEVICE, member, signature, body, returns=[is_a(kind)]
        )
        return answer


def resize_options(
    offset: int | None, size_limit: int | None, force: bool, allow_overlap: bool
) -> Options:
    """The options of both Resize methods; None and false leave one out."""
    return make_options(
        ("offset", "t", offset),
        ("size-limit", "t", size_limit),
        ("force", "b", force or None),
        ("allow-overlap", "b", allow_overlap or None),
    )


async def properties(link: Link, path: str) -> Properties:
    """What a device is now, by its object path."""
    (found,) = await link.call(path, PROPERTIES, "GetAll", "s", [DEVICE], returns=[is_a(dict)])
    return Properties.decode(found)
