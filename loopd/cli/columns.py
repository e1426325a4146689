# SPDX-License-Identifier: LGPL-2.1-or-later
"""The columns of `loopctl list`: losetup's, under its names, and those that only loopd can fill.

Each has a text for people and a value for JSON. Pure, as `output` is.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from loopd.client.properties import FOREIGN, Properties

from . import output


class Column(NamedTuple):
    """What one column has to say of a device."""

    value: Callable[[Properties], Any]
    """For JSON; where there is no `text`, a switch, a number or a word, and so for people, too."""
    text: Callable[[Properties], str] | None = None
    right: bool = False
    size: bool = False
    """A number of bytes, shown in larger units to people."""


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _owner(device: Properties) -> str | None:
    return None if device.owner == FOREIGN else output.owner(device.owner)


def _reference(device: Properties) -> str:
    return output.printable(device.reference)


def _file(device: Properties) -> str:
    return device.backing_file.decode(errors="replace")


COLUMNS = {
    "NAME": Column(lambda device: device.node),
    "AUTOCLEAR": Column(lambda device: device.autoclear, right=True),
    "BACK-FILE": Column(_file, lambda device: output.printable(device.backing_file)),
    "BACK-INO": Column(lambda device: device.backing_inode, right=True),
    "BACK-MAJ:MIN": Column(lambda device: _numbers(device.backing_device)),
    "MAJ:MIN": Column(lambda device: _numbers(device.device_number)),
    "OFFSET": Column(lambda device: device.offset, right=True, size=True),
    "PARTSCAN": Column(lambda device: device.partition_scan, right=True),
    "RO": Column(lambda device: device.read_only, right=True),
    "SIZELIMIT": Column(lambda device: device.size_limit, right=True, size=True),
    "DIO": Column(lambda device: device.direct_io, right=True),
    "LOG-SEC": Column(lambda device: device.sector_size, right=True),
    "REF": Column(lambda device: device.reference, _reference),
    "SIZE": Column(lambda device: device.size, right=True, size=True),
    "OWNER": Column(_owner),
    "LIFETIME": Column(lambda device: device.lifetime),
    "STATE": Column(lambda device: device.state),
    "HOLDER": Column(lambda device: device.holder),
    "HOLDS": Column(lambda device: device.holds, right=True),
    "LOCK": Column(lambda device: device.locked),
    "DISKSEQ": Column(lambda device: device.diskseq, right=True),
    "ATTACHED": Column(
        lambda device: device.attached_at,
        lambda device: output.moment(device.attached_at) if device.attached_at else "",
    ),
    "PARTITIONS": Column(
        lambda device: [each.node for each in device.partitions],
        lambda device: ",".join(each.node for each in device.partitions),
    ),
}

DEFAULT = ("NAME", "SIZE", "OFFSET", "RO", "OWNER", "LIFETIME", "STATE", "BACK-FILE")

_LAST_RESORT = 20  # columns of a terminal that a path gets, however narrow that is


def listed(
    devices: Sequence[Properties], names: Sequence[str], *, in_bytes: bool, headings: bool
) -> list[list[str]]:
    """The cells, row by row; a minus sign where there is nothing to say."""
    rows = [[_cell(COLUMNS[name], each, in_bytes) for name in names] for each in devices]
    return [list(names), *rows] if headings else rows


def _cell(column: Column, device: Properties, in_bytes: bool) -> str:
    value: Any = column.text(device) if column.text else column.value(device)
    if column.size and not in_bytes:
        return output.short_size(value)
    return str(int(value) if isinstance(value, bool) else value or (0 if value == 0 else "-"))


def for_json(device: Properties, names: Sequence[str]) -> dict[str, Any]:
    """The columns of one device, in the form that `losetup --json` has."""
    return {name.lower(): COLUMNS[name].value(device) for name in names}


def raw(rows: list[list[str]]) -> list[str]:
    """Lines that split at each space into their cells, as those of `losetup --raw`."""
    return [" ".join(cell.replace(" ", "\\x20") for cell in row) for row in rows]


def aligned(rows: list[list[str]], names: Sequence[str], width: int) -> list[str]:
    """Lines for a terminal that is so wide; a path that has no room loses its beginning."""
    for index, name in enumerate(names):
        if name != "BACK-FILE":
            continue
        taken = sum(max(map(len, column)) + 1 for column in zip(*rows, strict=True))
        longest = max(len(row[index]) for row in rows)
        room = max(longest - max(taken - 1 - width, 0), _LAST_RESORT)
        for row in rows:
            if len(row[index]) > room:
                row[index] = "…" + row[index][1 - room :]
    right = " ".join(name for name in names if COLUMNS[name].right)
    return output.table(rows, names, right=right)
