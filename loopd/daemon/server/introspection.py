# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Introspect shows, cut from the description of the interfaces in dbus/.

The installed package has the XML in its directory, a checkout in its dbus/ directory.
"""

import re
from collections.abc import Iterable
from pathlib import Path

_NAME = "org.example.Loop1.xml"
_PACKAGE = Path(__file__).parents[2]
_PLACES = (_PACKAGE / _NAME, _PACKAGE.parent / "dbus" / _NAME)
_INTERFACE = re.compile(
    r'^  <interface name="([^"]+)">.*?^  </interface>$', re.DOTALL | re.MULTILINE
)
_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


class Introspection:
    """The interfaces by name, read when first asked for, and the texts of those of an object."""

    def __init__(self) -> None:
        self._interfaces: dict[str, str] = {}
        self._texts: dict[tuple[str, ...], str] = {}

    def node(self, interfaces: tuple[str, ...], children: Iterable[str]) -> str:
        """The XML of an object with these interfaces and these child nodes."""
        nodes = "".join([f'  <node name="{child}"/>\n' for child in children])
        return f"{self._text(interfaces)}{nodes}</node>\n"

    def _text(self, interfaces: tuple[str, ...]) -> str:
        if not self._interfaces:
            self._interfaces = {found[1]: found[0] for found in _INTERFACE.finditer(description())}
        if interfaces not in self._texts:
            text = "".join(f"{self._interfaces[name]}\n" for name in interfaces)
            self._texts[interfaces] = f"{_DOCTYPE}<node>\n{text}"
        return self._texts[interfaces]


def description() -> str:
    """The whole XML file."""
    for place in _PLACES:
        if place.exists():
            return place.read_text(encoding="utf-8")
    raise FileNotFoundError(f"{_NAME} is missing from the installation")
