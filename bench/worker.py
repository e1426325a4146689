# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ordinary program that attaches and detaches by Gio, in a process of its own.

Arguments: the bus address and a file. For each number on standard input it does as many pairs and
prints their times, [attach, detach] in seconds, as one line of JSON.
"""

import json
import os
import sys
import time

from gi.repository import Gio, GLib

NAME, PATH = "org.example.Loop1", "/org/example/Loop1"


def main(address: str, image: str) -> None:
    """Serve standard input."""
    bus = Gio.DBusConnection.new_for_address_sync(
        address,
        Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT
        | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION,
        None,
        None,
    )
    for line in sys.stdin:
        print(json.dumps([pair(bus, image) for _ in range(int(line))]), flush=True)


def pair(bus: Gio.DBusConnection, image: str) -> tuple[float, float]:
    """Attach and detach once."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    begun = time.perf_counter()
    reply, _ = bus.call_with_unix_fd_list_sync(
        NAME,
        PATH,
        NAME,
        "Attach",
        GLib.Variant("(ha{sv})", (0, {})),
        GLib.VariantType("(ost)"),
        Gio.DBusCallFlags.NONE,
        -1,
        Gio.UnixFDList.new_from_array([fd]),
        None,
    )
    attached = time.perf_counter()
    device = reply.unpack()[0]
    bus.call_sync(
        NAME,
        device,
        f"{NAME}.Device",
        "Detach",
        GLib.Variant("(a{sv})", ({},)),
        GLib.VariantType("(b)"),
        Gio.DBusCallFlags.NONE,
        -1,
        None,
    )
    return attached - begun, time.perf_counter() - attached


if __name__ == "__main__":
    main(*sys.argv[1:])
