# SPDX-License-Identifier: LGPL-2.1-or-later
"""How loopctl shows things: sizes, tables, properties, JSON, and names of any bytes at all.

Pure: it turns values into text. Whatever others may have chosen, such as the name of a file, goes
through `printable` first, since a terminal obeys what is written to it.
"""

import json
import os
import pwd
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from loopd.client.properties import FOREIGN, Partition, Properties

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(text: str | bytes) -> str:
    """Text that is safe on a terminal and stays on one line.

    Control and format characters, backslashes and bytes that are not UTF-8 are written as in
    Python's strings, so that no two names look the same.
    """
    if isinstance(text, bytes):
        text = text.decode(errors="surrogateescape")
    return "".join(map(_printable_character, text))


def _printable_character(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    if char.isprintable() and char != "\\":
        return char
    return char.encode("unicode_escape").decode()


def name(argument: str) -> str:
    """A file or device as it was given on the command line, printable."""
    return printable(os.fsencode(argument))


def size(number: int) -> str:
    """Bytes in the largest unit that leaves at least 1, as in 1.5 GiB."""
    unit = max((number.bit_length() - 1) // 10, 0)
    scaled = number / (1 << 10 * unit)
    return f"{scaled:.4g} {_UNITS[unit]}" if scaled < 1000 else f"{scaled:.0f} {_UNITS[unit]}"


def short_size(number: int) -> str:
    """As `size`, in the short form of lsblk: 1.5G."""
    text, unit = size(number).split()
    return text + ("" if unit == "bytes" else unit[0])


def owner(uid: int) -> str:
    """The name of a user; a minus sign for nobody's."""
    if uid == FOREIGN:
        return "-"
    try:
        return printable(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def table(rows: Sequence[Sequence[str]], names: Sequence[str], right: str = "") -> list[str]:
    """Lines of aligned columns; those of the names in `right` are aligned there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if name in right.split() else "<" for name in names]
    return [
        " ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def properties(device: Properties, label: Callable[[str], str] = lambda text: text) -> list[str]:
    """Lines that tell all of a device; `label` makes of what comes before a colon what it likes."""
    return _labelled([*_rows(device).values()], label)


def partition(
    told: Partition, disk: str, label: Callable[[str], str] = lambda text: text
) -> list[str]:
    """Lines that tell all of a partition, as `properties` does of a device."""
    rows = [
        ("Node", told.node),
        ("Partition", f"{told.number} of {disk}"),
        ("Start", exact_size(told.start)),
        ("Size", exact_size(told.size)),
    ]
    return _labelled(rows, label)


def _labelled(rows: Sequence[tuple[str, str]], label: Callable[[str], str]) -> list[str]:
    width = max(len(name) for name, _ in rows) + 1
    return [f"{label(f'{name}:')}{'':{width - len(name)}}{value}" for name, value in rows]


def missing_partitions(device: Properties) -> str:
    """What to say of partitions that the table has and the device has not, of which there are."""
    missing = device.missing_partitions
    one = len(missing) == 1
    return (
        f"{device.node} has no partition{'' if one else 's'} {', '.join(map(str, missing))} of its "
        f"table, which overlap{'s' if one else ''} another or begin{'s' if one else ''} past the "
        "end; --offset and --sizelimit attach such a part of the file by itself"
    )


def news(device: Properties, names: Iterable[str]) -> str:
    """What these properties are now, on one line; those that nobody looks at are left out."""
    rows = _rows(device)
    told = [rows[name] for name in names if name in rows]
    return ", ".join(f"{label[0].lower()}{label[1:]} {value}" for label, value in told)


def _rows(device: Properties) -> dict[str, tuple[str, str]]:
    """What people are told of a device: by the names that Python has, what it is called and is."""
    of_owner = f"{owner(device.owner)} (uid {device.owner})" if device.managed else "not loopd's"
    inode = f"{device.backing_inode} on {_device_number(device.backing_device)}"
    limit = exact_size(device.size_limit) if device.size_limit else "none"
    return {
        "node": ("Node", device.node),
        "backing_file": ("Backing file", printable(device.backing_file)),
        "backing_inode": ("Backing inode", inode),
        "size": ("Size", exact_size(device.size)),
        "offset": ("Offset", exact_size(device.offset)),
        "size_limit": ("Size limit", limit),
        "sector_size": ("Sector size", f"{device.sector_size} bytes"),
        "read_only": ("Read-only", _yes(device.read_only)),
        "direct_io": ("Direct I/O", _yes(device.direct_io)),
        "autoclear": ("Autoclear", _yes(device.autoclear)),
        "partition_scan": ("Partition scan", _yes(device.partition_scan)),
        "partitions": ("Partitions", ", ".join(each.node for each in device.partitions) or "none"),
        "missing_partitions": (
            "Missing ones",
            ", ".join(map(str, device.missing_partitions)) or "none",
        ),
        "reference": ("Reference", printable(device.reference) or "none"),
        "owner": ("Owner", of_owner),
        "lifetime": ("Lifetime", device.lifetime or "until somebody detaches it"),
        "holder": ("Holder", device.holder or "none"),
        "holds": ("Holds", str(device.holds)),
        "locked": ("Lock", device.locked),
        "state": ("State", device.state),
        "attached_at": (
            "Attached at",
            moment(device.attached_at) if device.attached_at else "unknown",
        ),
        "device_number": ("Device number", _device_number(device.device_number)),
        "diskseq": ("Disk sequence", str(device.diskseq)),
    }


def farewell(node: str, *, gone: bool) -> str:
    """What to say when a device has been detached; `gone` as Device.detach returns it."""
    if gone:
        return f"detached {node}"
    return f"{node} is still in use, and goes when its last user closes it"


def exact_size(number: int) -> str:
    """As `size`, and the bytes to the last one."""
    return f"{number} bytes" if number < 1024 else f"{size(number)} ({number} bytes)"


def moment(microseconds: int) -> str:
    """A time in the local zone."""
    return time.strftime("%F %T %z", time.localtime(microseconds / 1e6))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _device_number(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def as_json(value: Any) -> str:
    """One line of JSON, all ASCII, so that nothing in it can harm a terminal."""
    return json.dumps(value)


def properties_for_json(path: str, device: Properties) -> dict[str, Any]:
    """The properties under the names that Python has for them, and the object's path.

    Bytes that are not UTF-8 become U+FFFD, which every reader of JSON takes.
    """
    return {
        "object": path,
        **asdict(device),
        "backing_file": device.backing_file.decode(errors="replace"),
        **partitions_for_json(device),
    }


def partitions_for_json(device: Properties) -> dict[str, Any]:
    """The partitions, each with its number, node, start and size; the numbers that are missing."""
    return {
        "partitions": [part._asdict() for part in device.partitions],
        "missing_partitions": [*device.missing_partitions],
    }
