# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Introspect shows, cut from the description of the interfaces in dbus/.

The installed package has the XML beside its modules, a checkout in its dbus/ directory.
"""

import re
from collections.abc import Iterable
from pathlib import Path

_NAME = "org.example.Loop1.xml"
_PLACES = (Path(__file__).parent / _NAME, Path(__file__).parent.parent / "dbus" / _NAME)
_INTERFACE = re.compile(
    r'^  <interface name="([^"]+)">.*?^  </interface>$', re.DOTALL | re.MULTILINE
)
_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


class Introspection:
    """The interfaces by name, read when first asked for."""

    def __init__(self) -> None:
        self._interfaces: dict[str, str] = {}

    def node(self, interfaces: Iterable[str], children: Iterable[str]) -> str:
        """The XML of an object with these interfaces and these child nodes."""
        if not self._interfaces:
            self._interfaces = {found[1]: found[0] for found in _INTERFACE.finditer(description())}
        lines = [self._interfaces[name] for name in interfaces]
        lines += [f'  <node name="{child}"/>' for child in children]
        return _DOCTYPE + "<node>\n" + "\n".join(lines) + "\n</node>\n"


def description() -> str:
    """The whole XML file."""
    for place in _PLACES:
        if place.exists():
            return place.read_text(encoding="utf-8")
    raise FileNotFoundError(f"{_NAME} is missing from the installation")
