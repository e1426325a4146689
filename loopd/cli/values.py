# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is given to loopctl as a value: sizes, numbers, and the nodes of devices."""

import argparse
import os
import re
from typing import NamedTuple

_SIZE = re.compile(
    r"(0x[0-9a-f]+|[0-9]+)(?:(?:\.([0-9]{1,18}))?([kmgtpe])(b|ib)?)?",
    re.ASCII | re.IGNORECASE,
)
_NUMBER = re.compile(r"[0-9]{1,7}", re.ASCII)
_NODE = re.compile(r"((?:/dev/)?loop[0-9]{1,7})(?:p([0-9]{1,7}))?", re.ASCII)


def parse_size(text: str) -> int:
    """A number of bytes; K, KiB and so on up to E are powers of 1024, KB and so on of 1000."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (4096, 64K, 1.5MiB and 5GB are)")
    digits, fraction, unit, suffix = match.groups()
    if fraction and digits[:2].lower() == "0x":
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (a fraction is decimal)")
    number = int(digits, 16 if digits[:2].lower() == "0x" else 10)
    if unit:
        base = 1000 if (suffix or "").lower() == "b" else 1024
        power = base ** ("kmgtpe".index(unit.lower()) + 1)
        number *= power
        if fraction:  # whole bytes, as losetup rounds
            number += int(fraction) * power // 10 ** len(fraction)
    if number >= 1 << 64:
        raise argparse.ArgumentTypeError(f"too large: {text!r}")
    return number


def parse_number(text: str) -> int:
    """The number of a loop device."""
    if not _NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"not a number: {text!r} (3 is that of /dev/loop3)")
    return int(text)


class Node(NamedTuple):
    """A node that was named."""

    disk: str
    """That of the loop device, as /dev/loop3 or loop3."""
    partition: int | None
    """The number of the partition that was meant; None if all of it was."""


def node_of(target: str) -> Node | None:
    """The node that a DEVICE-OR-FILE means, through symbolic links, too; None if it is a file."""
    match = _NODE.fullmatch(target)
    if match is None:
        resolved = os.path.realpath(target)
        match = _NODE.fullmatch(resolved) if resolved.startswith("/dev/") else None
    return Node(match[1], int(match[2]) if match[2] else None) if match else None
