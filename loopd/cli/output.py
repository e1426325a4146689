# SPDX-License-Identifier: LGPL-2.1-or-later
"""How loopctl shows things: sizes, tables, properties, JSON, and names of any bytes at all.

Pure: it turns values into text. Whatever others may have chosen, such as the name of a file, goes
through `printable` first, since a terminal obeys what is written to it.
"""

import json
import os
import pwd
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..client.properties import FOREIGN, Properties

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


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> list[str]:
    """Lines of aligned columns; those whose names are in `right` are aligned there."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [">" if name in right.split() else "<" for name in header]
    return [
        " ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


LIST_HEADER = ("NAME", "SIZE", "OFFSET", "RO", "OWNER", "LIFETIME", "STATE", "BACK-FILE")


def device_list(devices: Sequence[Properties], *, for_terminal: bool) -> list[str]:
    """Lines that list devices: aligned for a terminal, else separated by tabs and in bytes."""
    amount = short_size if for_terminal else str
    rows = [
        (
            device.node,
            amount(device.size),
            amount(device.offset),
            "1" if device.read_only else "0",
            owner(device.owner),
            device.lifetime or "-",
            device.state,
            printable(device.backing_file),
        )
        for device in devices
    ]
    if for_terminal:
        return table(LIST_HEADER, rows, right="SIZE OFFSET")
    return ["\t".join(row) for row in (LIST_HEADER, *rows)]


def properties(device: Properties) -> list[str]:
    """Lines that tell all of a device."""
    of_owner = f"{owner(device.owner)} (uid {device.owner})" if device.managed else "not loopd's"
    rows = {
        "Node": device.node,
        "Backing file": printable(device.backing_file),
        "Backing inode": f"{device.backing_inode} on {_device_number(device.backing_device)}",
        "Size": exact_size(device.size),
        "Offset": exact_size(device.offset),
        "Size limit": exact_size(device.size_limit) if device.size_limit else "none",
        "Sector size": f"{device.sector_size} bytes",
        "Read-only": _yes(device.read_only),
        "Direct I/O": _yes(device.direct_io),
        "Autoclear": _yes(device.autoclear),
        "Partition scan": _yes(device.partition_scan),
        "Partitions": ", ".join(part.node for part in device.partitions) or "none",
        "Reference": printable(device.reference) or "none",
        "Owner": of_owner,
        "Lifetime": device.lifetime or "until somebody detaches it",
        "Holder": device.holder or "none",
        "Holds": str(device.holds),
        "Lock": device.locked,
        "State": device.state,
        "Attached at": _time(device.attached_at) if device.attached_at else "unknown",
        "Device number": _device_number(device.device_number),
        "Disk sequence": str(device.diskseq),
    }
    width = max(map(len, rows)) + 1
    return [f"{name + ':':{width}} {value}" for name, value in rows.items()]


def farewell(node: str, *, gone: bool) -> str:
    """What to say when a device has been detached; `gone` as Device.detach returns it."""
    if gone:
        return f"detached {node}"
    return f"{node} is still in use, and goes when its last user closes it"


def exact_size(number: int) -> str:
    """As `size`, and the bytes to the last one."""
    return f"{number} bytes" if number < 1024 else f"{size(number)} ({number} bytes)"


def _time(microseconds: int) -> str:
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
        "partitions": partitions_for_json(device),
    }


def partitions_for_json(device: Properties) -> list[dict[str, Any]]:
    """The partitions, each with its number, node, start and size."""
    return [part._asdict() for part in device.partitions]
