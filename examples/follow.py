#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attach an image, tell its partitions, and tell what becomes of it until Ctrl-C.

With Gio and nothing else: python3-gi.
"""

import os
import signal
import sys
from typing import Any

from gi.repository import Gio, GLib

LOOPD = "org.example.Loop1"
MANAGER = "/org/example/Loop1"
DEVICE = "org.example.Loop1.Device"


class Loopd:
    """Calls to loopd, each with the fds that it passes and those that it gets."""

    def __init__(self, bus: Gio.DBusConnection) -> None:
        self.bus = bus

    def call(
        self, path: str, interface: str, method: str, arguments: GLib.Variant, *fds: int
    ) -> tuple[tuple[Any, ...], list[int]]:
        passed = Gio.UnixFDList()
        for fd in fds:
            passed.append(fd)  # a copy
        reply, received = self.bus.call_with_unix_fd_list_sync(
            LOOPD,
            path,
            interface,
            method,
            arguments,
            None,
            # polkit may ask the user for a password, which takes as long as the user does.
            Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION,
            GLib.MAXINT,
            passed,
            None,
        )
        return reply.unpack(), list(received.steal_fds()) if received else []

    def attach(self, fd: int, **options: GLib.Variant) -> tuple[str, str]:
        """The object and the node of a new device over an open file."""
        given = {name.replace("_", "-"): value for name, value in options.items()}
        arguments = GLib.Variant("(ha{sv})", (0, given))
        (path, node, _diskseq), _ = self.call(MANAGER, LOOPD, "Attach", arguments, fd)
        return path, node

    def hold(self, path: str) -> int:
        """An fd that keeps the device while it is open, and reads as ended when that is gone."""
        _, (fd,) = self.call(path, DEVICE, "Hold", GLib.Variant("(a{sv})", ({},)))
        return fd

    def detach(self, path: str) -> bool:
        """Whether the device is gone; if not, the kernel lets it go at its last close."""
        (gone,), _ = self.call(path, DEVICE, "Detach", GLib.Variant("(a{sv})", ({},)))
        return bool(gone)


def follow(loopd: Loopd, image: str) -> None:
    # By now whoever runs this has shown that he may write to the image: loopd opens nothing.
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        path, node = loopd.attach(fd, partition_scan=GLib.Variant("b", True))
    finally:
        os.close(fd)  # loopd has one of its own
    loop = GLib.MainLoop()

    def on_changed(*signal: Any) -> None:
        (_interface, changed, _invalidated) = signal[5].unpack()
        for name, value in changed.items():
            print(f"{node}: {name} is {value!r}", flush=True)

    def on_gone(_fd: int, _condition: GLib.IOCondition) -> bool:
        print(f"{node} is gone", flush=True)
        loop.quit()
        return GLib.SOURCE_REMOVE

    # Subscribe, and only then read: what changes in between is told twice, and not lost.
    flags = Gio.DBusSignalFlags.NONE
    loopd.bus.signal_subscribe(
        LOOPD,
        "org.freedesktop.DBus.Properties",
        "PropertiesChanged",
        path,
        None,
        flags,
        on_changed,
    )
    arguments = GLib.Variant("(ss)", (DEVICE, "Partitions"))
    (partitions,), _ = loopd.call(path, "org.freedesktop.DBus.Properties", "Get", arguments)
    print(f"{node} is {image}", flush=True)
    for number, partition, start, size in partitions:
        print(f"{partition}: partition {number} at {start}, {size} bytes", flush=True)

    hold = loopd.hold(path)
    GLib.unix_fd_add_full(GLib.PRIORITY_DEFAULT, hold, GLib.IOCondition.HUP, on_gone)
    for number in (signal.SIGINT, signal.SIGTERM):
        GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, number, loop.quit)
    try:
        loop.run()
        os.set_blocking(hold, False)
        if still_there(hold) and not loopd.detach(path):
            print(f"{node} is in use, and goes when it is not any more")
    finally:
        os.close(hold)


def still_there(hold: int) -> bool:
    try:
        os.read(hold, 1)
    except BlockingIOError:
        return True
    return False


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: follow.py IMAGE", file=sys.stderr)
        return 2
    try:
        follow(Loopd(Gio.bus_get_sync(Gio.BusType.SYSTEM)), sys.argv[1])
    except OSError as error:
        print(f"follow.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except GLib.Error as error:
        # loopd's messages are sentences for people; the name of the error is for programs:
        # org.example.Loop1.Error.DeviceBusy, org.freedesktop.DBus.Error.AccessDenied, …
        name = Gio.DBusError.get_remote_error(error)
        text = error.message.removeprefix(f"GDBus.Error:{name}: ")
        print(f"follow.py: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
