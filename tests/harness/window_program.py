# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs examples/window.py and does to its widgets what lines on standard input say.

Each line is answered by one of JSON. `wait TEXT` and `wait-not TEXT` answer when a visible label
has the text, or none has; `click LABEL` presses the first button of that label; `labels` tells all
labels that can be seen; `drawn` answers with width and height once all of it is on the screen. The
window closes with standard input.
"""

import itertools
import json
import os
import runpy
import sys
from collections.abc import Iterator
from typing import Any

import gi

gi.require_version("Gtk", "4.0")
from gi.repository import GLib, Gtk  # noqa: E402

FRAMES = 30
"""After so many, what moves has come to rest."""


def widgets(widget: Gtk.Widget) -> Iterator[Gtk.Widget]:
    """All that can be seen below a widget, in order."""
    child = widget.get_first_child()
    while child:
        if child.get_mapped():
            yield child
            yield from widgets(child)
        child = child.get_next_sibling()


class Driver:
    """One window and the lines about it."""

    def __init__(self, window: Gtk.ApplicationWindow) -> None:
        self.window = window
        GLib.unix_fd_add_full(
            GLib.PRIORITY_DEFAULT, 0, GLib.IOCondition.IN | GLib.IOCondition.HUP, self.on_line
        )

    def on_line(self, *_: Any) -> bool:
        line = sys.stdin.readline()
        if not line:
            self.window.close()
            return GLib.SOURCE_REMOVE
        command, _, argument = line.rstrip("\n").partition(" ")
        getattr(self, "do_" + command.replace("-", "_"))(argument)
        return GLib.SOURCE_CONTINUE

    def answer(self, value: Any) -> None:
        print(json.dumps(value), flush=True)

    def labels(self) -> list[str]:
        return [each.get_label() for each in widgets(self.window) if isinstance(each, Gtk.Label)]

    def when(self, condition: Any) -> None:
        # Looked at with each frame that is drawn.
        def on_frame(*_: Any) -> bool:
            if not condition():
                return GLib.SOURCE_CONTINUE
            self.answer(self.labels())
            return GLib.SOURCE_REMOVE

        self.window.add_tick_callback(on_frame)

    def do_labels(self, _: str) -> None:
        self.answer(self.labels())

    def do_wait(self, text: str) -> None:
        self.when(lambda: any(text in label for label in self.labels()))

    def do_wait_not(self, text: str) -> None:
        self.when(lambda: not any(text in label for label in self.labels()))

    def do_click(self, label: str) -> None:
        buttons = (each for each in widgets(self.window) if isinstance(each, Gtk.Button))
        next(each for each in buttons if each.get_label() == label).emit("clicked")
        self.answer(True)

    def do_drawn(self, _: str) -> None:
        frames = itertools.count()

        def on_frame(*_: Any) -> bool:
            # The first of them draws what has changed before now, and buttons that grow lit.
            if next(frames) < FRAMES:
                self.window.queue_draw()
                return GLib.SOURCE_CONTINUE
            self.window.get_display().sync()
            surface = self.window.get_surface()
            self.answer([surface.get_width(), surface.get_height()])
            return GLib.SOURCE_REMOVE

        self.window.add_tick_callback(on_frame)


def fail(*exception: Any) -> None:
    """End at an exception in a callback, which GLib would go on from."""
    sys.__excepthook__(*exception)
    os._exit(1)


sys.excepthook = fail
program = runpy.run_path(sys.argv[1], run_name="window")
sys.exit(program["main"](["window.py", *sys.argv[2:]], Driver))
