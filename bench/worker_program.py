# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ordinary program that uses Gio, in a process of its own; its text is all it is started with.

Arguments: the bus address and a file. Each line on standard input is a JSON list, the name of a
function below and its arguments; what it returns is printed as one line of JSON.
"""

import json
import os
import sys
import time

from gi.repository import Gio, GLib

LOOPD, LOOPD_PATH = "org.example.Loop1", "/org/example/Loop1"
UDISKS, UDISKS_PATH = "org.freedesktop.UDisks2", "/org/freedesktop/UDisks2/Manager"
WAYS = {
    "loopd": ((LOOPD, LOOPD_PATH, LOOPD, "Attach", "(ost)"), (f"{LOOPD}.Device", "Detach", "(b)")),
    "udisks2": (
        (UDISKS, UDISKS_PATH, f"{UDISKS}.Manager", "LoopSetup", "(o)"),
        (f"{UDISKS}.Loop", "Delete", "()"),
    ),
}


class Worker:
    """One connection."""

    def __init__(self, address, image):
        flags = Gio.DBusConnectionFlags
        self.bus = Gio.DBusConnection.new_for_address_sync(
            address, flags.AUTHENTICATION_CLIENT | flags.MESSAGE_BUS_CONNECTION, None, None
        )
        self.image = image

    def pairs(self, way, count):
        """Attach and detach so often; the seconds that each took."""
        times = []
        while len(times) < count:
            try:
                times.append(self.pair(*WAYS[way]))
            except GLib.Error as exc:
                # udisks2 does not try again when somebody else was faster. loopd does.
                if way == "loopd" or "resource busy" not in exc.message:
                    raise
        return times

    def pair(self, attach, detach):
        name, path, interface, member, answer = attach
        fd = os.open(self.image, os.O_RDWR | os.O_CLOEXEC)
        begun = time.perf_counter()
        reply, _ = self.bus.call_with_unix_fd_list_sync(
            name,
            path,
            interface,
            member,
            GLib.Variant("(ha{sv})", (0, {})),
            GLib.VariantType(answer),
            Gio.DBusCallFlags.NONE,
            -1,
            Gio.UnixFDList.new_from_array([fd]),
            None,
        )
        attached = time.perf_counter()
        interface, member, answer = detach
        self.bus.call_sync(
            name,
            reply.unpack()[0],
            interface,
            member,
            GLib.Variant("(a{sv})", ({},)),
            GLib.VariantType(answer),
            Gio.DBusCallFlags.NONE,
            -1,
            None,
        )
        return attached - begun, time.perf_counter() - attached

    def calls(self, interface, member, count):
        """Call a method of the manager so often; the seconds, and the bytes of the answer."""
        times = []
        for _ in range(count):
            call = Gio.DBusMessage.new_method_call(LOOPD, LOOPD_PATH, interface, member)
            begun = time.perf_counter()
            reply, _ = self.bus.send_message_with_reply_sync(
                call, Gio.DBusSendMessageFlags.NONE, -1, None
            )
            times.append(time.perf_counter() - begun)
            if reply.get_message_type() == Gio.DBusMessageType.ERROR:
                raise RuntimeError(reply.get_error_name())
        return times, len(reply.to_blob(Gio.DBusCapabilityFlags.NONE))


def main(address, image):
    """Serve standard input."""
    worker = Worker(address, image)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


main(*sys.argv[1:])
