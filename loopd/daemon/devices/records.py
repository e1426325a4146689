# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the next loopd is to know of our devices: a small file for each in the runtime directory.

A file is there before its client has an answer, and is replaced as a whole whenever something in it
changes. That a device is being detached stands in the file's name: a rename needs no room on a disk
that is full. All of it is written where everything else is decided, on the event loop: a runtime
directory is memory, and waits for nobody.
"""

import dataclasses
import errno
import json
import logging
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import Any, Self, get_origin

from loopd.daemon.access import NOBODY
from loopd.loop.block_device import Lock
from loopd.loop.uapi import DISK_MAX_PARTS, LO_NAME_SIZE

from .device import Device, label
from .leases import LIFETIMES, Lease

log = logging.getLogger(__name__)

_FORMAT = 1
_DIRECTORY = "leases"
_NEW = ".new"
_ENDING = ".ending"
_MAX_NUMBER = (1 << 64) - 1
# A unique name on the bus, or none.
_HOLDER = re.compile(r"(?::[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A device as it was recorded. What is added later needs a default, for upgrades."""

    name: str
    diskseq: int
    which: int | None
    number: int | None
    binding: int
    file_device: int
    file_inode: int
    file_block: int
    """0 if the file is no block device."""
    reference: str
    owner: int
    attached_at: int
    detaching: bool
    lifetime: str
    holder: str
    over: bool
    autoclear: bool
    holds: dict[str, int]
    lock: str
    lock_holder: str
    lock_expires: float | None
    may_hang: bool
    bus: str
    """The id of the bus that holder and lock_holder are names of."""
    is_new: bool = False
    """Whether the loop device was made for this, and not only bound."""
    table: list[int] = field(default_factory=list)
    cut_limit: int = 0
    cut_asked: int = 0
    format: int = _FORMAT

    @classmethod
    def of(cls, device: Device, lease: Lease | None, bus: str) -> Self:
        """The record of a device of ours."""
        file = device.file
        return cls(
            name=device.name,
            diskseq=device.diskseq,
            which=device.which,
            number=device.number,
            binding=device.status.binding,
            file_device=file.device if file else 0,
            file_inode=file.inode if file else 0,
            file_block=file.block.number if file and file.block else 0,
            reference=device.reference.decode(errors="surrogateescape"),
            owner=device.owner,
            attached_at=device.attached_at,
            detaching=device.ending,
            lifetime=lease.lifetime if lease else "",
            holder=lease.holder if lease else "",
            over=lease.over if lease else True,
            autoclear=lease.autoclear if lease else True,
            holds=dict(device.holds),
            lock=str(device.lock),
            lock_holder=device.lock_holder,
            lock_expires=device.lock_expires,
            may_hang=device.may_hang,
            bus=bus,
            is_new=bool(device.loop and device.loop.is_new),
            table=list(device.table),
            cut_limit=device.loop.cut.limit if device.loop else 0,
            cut_asked=device.loop.cut.asked if device.loop else 0,
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one. Raises ValueError, TypeError."""
        told = json.loads(text)
        if not isinstance(told, dict) or told.get("format") != _FORMAT:
            raise ValueError("it has another format")
        kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        # What a later version has added is passed over, whatever it is.
        told = {key: value for key, value in told.items() if key in kinds}
        for key, value in told.items():
            kind = kinds[key]
            if not isinstance(value, get_origin(kind) if isinstance(kind, GenericAlias) else kind):
                raise TypeError(f"{key} has another type")
            if isinstance(value, dict) and not all(type(each) is int for each in value.values()):
                raise TypeError(f"{key} has values of another type")
        record = cls(**told)
        record._check()
        return record

    @property
    def label(self) -> str:
        """What its device is called, and its file."""
        return label(self.name, self.diskseq, self.which)

    def _check(self) -> None:
        """Raise ValueError for what no device of ours is like."""
        if self.lock not in tuple(Lock) or self.lifetime not in (*LIFETIMES, ""):
            raise ValueError("it has another lock or lifetime")
        numbers = [value for value in vars(self).values() if isinstance(value, int)]
        if not all(0 <= number <= _MAX_NUMBER for number in (*numbers, *self.holds.values())):
            raise ValueError("it has a number that none of ours is")
        if not all(0 <= uid < NOBODY for uid in (self.owner, *self.holds.values())):
            raise ValueError("it has an owner that is no user")
        if not all(type(each) is int and 0 < each < DISK_MAX_PARTS for each in self.table):
            raise ValueError("it has a partition that no table has")
        if self.lock_expires is not None and not math.isfinite(self.lock_expires):
            raise ValueError("it has a lock that ends at no time")
        if not all(_HOLDER.fullmatch(name) for name in (self.holder, self.lock_holder)):
            raise ValueError("it has a holder that is no connection")
        # Or UnicodeEncodeError, which is a ValueError.
        if len(self.reference.encode(errors="surrogateescape")) >= LO_NAME_SIZE:
            raise ValueError("it has too long a reference")
        if self.name != f"loop{self.number}" and (self.number is not None or self.which is None):
            raise ValueError("it has another device's name")


def are_left(runtime_directory: Path) -> bool:
    """Whether a former loopd has left any."""
    try:
        return bool(os.listdir(runtime_directory / _DIRECTORY))
    except OSError:
        return False


class Records:
    """The directory `leases` in the runtime directory."""

    def __init__(self, runtime_directory: Path) -> None:
        self.bus = ""
        """The id of the bus, once it is known."""
        self._directory = runtime_directory / _DIRECTORY
        self._saved: dict[str, Record] = {}

    def load(self) -> list[Record]:
        """Read what a former loopd has left, and take away what cannot be read. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found: dict[str, Record] = {}
        for path in sorted(self._directory.iterdir()):
            try:
                if path.name.endswith(_NEW):
                    raise ValueError("it was not finished")
                record = Record.parse(path.read_text())
                if path.name == record.label + _ENDING:
                    record = dataclasses.replace(record, detaching=True)
                elif path.name != record.label:
                    raise ValueError("it is of another device")
                found[record.label] = record
            except (ValueError, TypeError, RecursionError) as exc:
                log.warning("dropping the record %s: %s", path.name, exc)
                self._unlink(path.name)
            except OSError as exc:
                log.warning("cannot read the record %s: %s", path.name, exc.strerror)
        return [*found.values()]

    def save(self, device: Device, lease: Lease | None = None) -> None:
        """Record a device of ours as it is now, or with another lease. Raises OSError."""
        record = Record.of(device, lease or device.lease, self.bus)
        if self._saved.get(device.label) == record:
            return
        # By os, and without dataclasses' deep copy: half the time that an attach spends here.
        path = f"{self._directory}/{device.label}"
        new = path + _NEW
        data = json.dumps(vars(record)).encode()
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._unlink(device.label + _NEW)
            raise
        finally:
            os.close(fd)
        os.replace(new, path)
        self._saved[device.label] = record

    def note(self, device: Device) -> None:
        """Record what has changed about a device, if it is ours; a failure is logged."""
        if not device.managed:
            return
        try:
            if device.ending:
                self._end(device.label)
            else:
                self.save(device)
        except OSError as exc:
            log.warning("cannot record %s: %s", device.node, exc.strerror, extra=device.fields)

    def _end(self, label: str) -> None:
        path = f"{self._directory}/{label}"
        with suppress(FileNotFoundError):  # it was done before
            os.rename(path, path + _ENDING)

    def remove(self, label: str) -> None:
        """Forget a device that is gone."""
        self._saved.pop(label, None)
        self._unlink(label)
        self._unlink(label + _ENDING)

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(f"{self._directory}/{name}")
        except FileNotFoundError:
            pass
        except OSError as exc:
            log.warning("cannot remove the record %s: %s", name, exc.strerror)
