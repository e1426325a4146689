# SPDX-License-Identifier: LGPL-2.1-or-later
"""What udev is told of a device, to make the links that go by the backing file and the reference.

From version 255 on udev finds that out by itself. The names and their spelling are the same here.
Pure: the text is for a file that `systemd/61-loopd-links.rules` imports.
"""

import os
import string

from loopd.loop.backing_file import FileIdentity

# Keys that are set for the sake of the rules, or as udev itself does.
_MADE_BY_US = "LOOPD_LINKS"
_DEVICE = "ID_LOOP_BACKING_DEVICE"
_INODE = "ID_LOOP_BACKING_INODE"
_NAME = "ID_LOOP_BACKING_FILENAME"
_NAME_ENCODED = "ID_LOOP_BACKING_FILENAME_ENC"

_PLAIN = frozenset(string.ascii_letters + string.digits + "#+-.:=@_")


def describe(identity: FileIdentity, reference: bytes) -> str:
    """The properties of a device with this backing file and name."""
    major, minor = os.major(identity.device), os.minor(identity.device)
    lines = (f"{_MADE_BY_US}=1", f"{_DEVICE}={major}:{minor}", f"{_INODE}={identity.inode}")
    return "".join(f"{line}\n" for line in lines) + _describe_name(reference)


def renamed(description: str, reference: bytes) -> str:
    """The same device under another name."""
    lines = description.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(_NAME)) + _describe_name(reference)


def encode(name: str) -> str:
    r"""A name as part of a link's, after blkid_encode_string: \x20 for a space, and so on."""
    return "".join(
        char if char in _PLAIN or char >= "\x80" else f"\\x{ord(char):02x}" for char in name
    )


def _describe_name(reference: bytes) -> str:
    """The properties of a name; none of one that udev would change, or that is no name for a link.

    A value in quotes is what stands between the first and the last of them.
    """
    try:
        name = reference.decode()
    except UnicodeDecodeError:
        return ""
    if name in ("", ".", "..") or not name.isprintable():
        return ""
    return f'{_NAME}="{name}"\n{_NAME_ENCODED}={encode(name)}\n'
