#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A window with one's loop devices: attach an image, watch, detach.

With GTK 4: python3-gi and gir1.2-gtk-4.0. Images can be given as arguments, too. What is attached
here goes with the window.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import gi

gi.require_version("Gtk", "4.0")
from gi.repository import Gio, GLib, GObject, Gtk, Pango  # noqa: E402

LOOPD = "org.example.Loop1"
MANAGER = "/org/example/Loop1"
DEVICE = "org.example.Loop1.Device"


class Row(Gtk.ListBoxRow):
    """A device, and the button that detaches it."""

    def __init__(self, device: Gio.DBusProxy) -> None:
        super().__init__(activatable=False)
        self.device = device
        middle = Pango.EllipsizeMode.MIDDLE
        self.file = Gtk.Label(xalign=0, ellipsize=middle, css_classes=["heading"])
        self.details = Gtk.Label(xalign=0, ellipsize=middle, css_classes=["dim-label"])
        text = Gtk.Box(orientation=Gtk.Orientation.VERTICAL, spacing=4, hexpand=True)
        text.append(self.file)
        text.append(self.details)
        button = Gtk.Button(label="Detach", valign=Gtk.Align.CENTER)
        button.set_action_name("win.detach")
        button.set_action_target_value(GLib.Variant("s", device.get_object_path()))
        box = Gtk.Box(spacing=12)
        for name in ("top", "bottom", "start", "end"):
            box.set_property(f"margin-{name}", 12)
        box.append(text)
        box.append(button)
        self.set_child(box)
        self.update()

    def update(self) -> None:
        """Show what the device has become."""
        # Bytes, with a NUL at the end; a file name need not be text.
        path = bytes(self.get("BackingFile") or b"").rstrip(b"\0").decode(errors="replace")
        self.file.set_label(os.path.basename(path))
        self.file.set_tooltip_text(path)
        size = GLib.format_size_full(self.get("Size") or 0, GLib.FormatSizeFlags.IEC_UNITS)
        details = [self.get("Node"), size]
        partitions = len(self.get("Partitions") or ())
        if partitions:
            details.append(f"{partitions} partition{'s' if partitions > 1 else ''}")
        if self.get("ReadOnly"):
            details.append("read-only")
        if self.get("State") == "detaching":
            details.append("in use, and goes when it is not any more")
        self.details.set_label(" · ".join(details))

    def get(self, name: str) -> Any:
        value = self.device.get_cached_property(name)
        # Not `if value`: a Variant of 0 is false.
        return None if value is None else value.unpack()


class Window(Gtk.ApplicationWindow):
    """The list, which follows loopd's signals."""

    def __init__(self, application: Gtk.Application) -> None:
        super().__init__(application=application, title="Loop devices")
        self.set_default_size(480, 320)
        self.bus = Gio.bus_get_sync(Gio.BusType.SYSTEM)
        self.rows: dict[str, Row] = {}

        attach = Gtk.Button(label="Attach…", action_name="win.attach")
        header = Gtk.HeaderBar()
        header.pack_start(attach)
        self.set_titlebar(header)

        self.message = Gtk.Label(wrap=True, xalign=0, hexpand=True)
        self.bar = Gtk.InfoBar(
            message_type=Gtk.MessageType.ERROR, show_close_button=True, revealed=False
        )
        self.bar.add_child(self.message)
        self.bar.connect("response", lambda bar, _response: bar.set_revealed(False))

        self.list = Gtk.ListBox(selection_mode=Gtk.SelectionMode.NONE, show_separators=True)
        self.list.set_sort_func(lambda one, other: one.get("Number") - other.get("Number"))
        self.list.set_placeholder(
            Gtk.Label(
                label="Nothing is attached.", css_classes=["dim-label"], margin_top=48, vexpand=True
            )
        )
        box = Gtk.Box(orientation=Gtk.Orientation.VERTICAL)
        box.append(self.bar)
        box.append(Gtk.ScrolledWindow(child=self.list, vexpand=True))
        self.set_child(box)

        self.add_action_entries(
            [
                ("attach", lambda *_: self.choose()),
                ("detach", lambda _action, path, *_: self.detach(path.get_string()), "s"),
            ]
        )
        Gio.DBusObjectManagerClient.new(
            self.bus,
            Gio.DBusObjectManagerClientFlags.NONE,
            LOOPD,
            MANAGER,
            None,
            None,
            None,
            self.on_devices,
        )

    # What loopd says

    def on_devices(self, _source: GObject.Object | None, result: Gio.AsyncResult) -> None:
        try:
            self.devices = Gio.DBusObjectManagerClient.new_finish(result)
        except GLib.Error as error:
            self.show_error(error)
            return
        self.devices.connect("object-added", lambda _, each: self.add(each))
        self.devices.connect("object-removed", lambda _, each: self.remove(each))
        self.devices.connect("interface-proxy-properties-changed", self.on_changed)
        for each in self.devices.get_objects():
            self.add(each)

    def add(self, found: Gio.DBusObject) -> None:
        device = found.get_interface(DEVICE)
        # The devices of others, and those that losetup made, are shown to everybody.
        if device and device.get_cached_property("Owner").get_uint32() == os.getuid():
            row = self.rows[found.get_object_path()] = Row(device)
            self.list.append(row)

    def remove(self, found: Gio.DBusObject) -> None:
        if row := self.rows.pop(found.get_object_path(), None):
            self.list.remove(row)

    def on_changed(
        self, _devices: Gio.DBusObjectManagerClient, found: Gio.DBusObject, *_: Any
    ) -> None:
        if row := self.rows.get(found.get_object_path()):
            row.update()

    # What the user says

    def choose(self) -> None:
        chooser = Gtk.FileChooserNative(
            title="Attach an Image",
            transient_for=self,
            action=Gtk.FileChooserAction.OPEN,
            accept_label="_Attach",
        )

        def on_response(_chooser: Gtk.FileChooserNative, response: int) -> None:
            if response == Gtk.ResponseType.ACCEPT:
                self.attach(chooser.get_file())
            chooser.destroy()

        chooser.connect("response", on_response)
        chooser.show()

    def attach(self, file: Gio.File) -> None:
        path = file.get_path()
        if path is None:
            self.show_message(f"{file.get_uri()} is not on this computer")
            return
        try:
            fd = self.open(path)
        except OSError as error:
            self.show_message(f"{path}: {error.strerror}")
            return
        fds = Gio.UnixFDList()
        fds.append(fd)  # a copy
        os.close(fd)
        options = {"partition-scan": GLib.Variant("b", True)}
        # The list hears of the device by a signal, as of any other.
        self.call(MANAGER, LOOPD, "Attach", GLib.Variant("(ha{sv})", (0, options)), fds)

    @staticmethod
    def open(path: str) -> int:
        """Open for writing if the user may write: loopd makes the device as the fd is."""
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def detach(self, path: str) -> None:
        self.call(path, DEVICE, "Detach", GLib.Variant("(a{sv})", ({},)), None)

    def call(
        self,
        path: str,
        interface: str,
        method: str,
        arguments: GLib.Variant,
        fds: Gio.UnixFDList | None,
    ) -> None:
        """Call loopd, and show what it has against it. The window stays alive meanwhile."""
        self.bar.set_revealed(False)
        self.bus.call_with_unix_fd_list(
            LOOPD,
            path,
            interface,
            method,
            arguments,
            None,
            Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION,
            GLib.MAXINT,  # as long as the user needs for a password
            fds,
            None,
            self.on_reply,
        )

    def on_reply(self, bus: Gio.DBusConnection, result: Gio.AsyncResult) -> None:
        try:
            bus.call_with_unix_fd_list_finish(result)
        except GLib.Error as error:
            self.show_error(error)

    def show_error(self, error: GLib.Error) -> None:
        # loopd's messages are sentences for people; Gio puts the error's name before them.
        name = Gio.DBusError.get_remote_error(error)
        self.show_message(error.message.removeprefix(f"GDBus.Error:{name}: "))

    def show_message(self, text: str) -> None:
        self.message.set_label(text)
        self.bar.set_revealed(True)


def main(arguments: list[str], on_window: Callable[[Window], None] = lambda _: None) -> int:
    """Run until the window is closed; `on_window` is told of it."""
    application = Gtk.Application(
        application_id="org.example.LoopWindow", flags=Gio.ApplicationFlags.HANDLES_OPEN
    )

    def on_activate(_: Gtk.Application, files: list[Gio.File] | None = None, *_more: Any) -> None:
        window = application.get_active_window()
        if window is None:
            window = Window(application)
            on_window(window)
        window.present()
        for each in files or ():
            window.attach(each)

    application.connect("activate", on_activate)
    application.connect("open", on_activate)
    return int(application.run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
