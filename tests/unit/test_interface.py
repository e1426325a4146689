# SPDX-License-Identifier: LGPL-2.1-or-later
"""The XML in dbus/ and the tables of the service say the same, and nothing is open by default."""

import asyncio
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from loopd.daemon.server import announcer, introspection
from loopd.daemon.server import interface as server_interface
from loopd.daemon.server.call import Authorization, Method

TREE = ElementTree.fromstring(introspection.description())
INTERFACES = {each.get("name"): each for each in TREE.iter("interface")}


def make_service() -> server_interface.Service:
    async def make() -> server_interface.Service:
        return server_interface.Service(registry=None, announcer=None)  # type: ignore[arg-type]

    return asyncio.run(make())


METHODS = make_service().methods


def signature(method: ElementTree.Element, direction: str) -> str:
    return "".join(
        arg.get("type", "") for arg in method.iter("arg") if arg.get("direction") == direction
    )


def test_the_xml_has_the_interfaces_that_are_served() -> None:
    assert set(INTERFACES) == set(METHODS)


@pytest.mark.parametrize("interface", METHODS)
def test_the_xml_has_the_methods_that_are_served(interface: str) -> None:
    """Transport rule 9 (standard interfaces)."""
    described = {
        each.get("name"): (signature(each, "in"), signature(each, "out"))
        for each in INTERFACES[interface].iter("method")
    }
    served = {
        name: (method.in_signature, method.out_signature)
        for name, method in METHODS[interface].items()
    }
    assert described == served


def test_the_xml_has_the_properties_of_a_device() -> None:
    described = {
        each.get("name"): each.get("type") for each in INTERFACES[announcer.DEVICE].iter("property")
    }
    served = {name: kind for name, (kind, _) in announcer.DEVICE_PROPERTIES.items()}
    assert described == served


def test_everything_in_the_xml_is_documented_and_every_argument_has_a_name() -> None:
    """Transport rule 9 (standard interfaces)."""
    for kind in ("interface", "method", "signal", "property"):
        for each in TREE.iter(kind):
            doc = each.find("annotation[@name='org.gtk.GDBus.DocString']")
            assert doc is not None, each.get("name")
            assert doc.get("value")
    for arg in TREE.iter("arg"):
        assert arg.get("name")


def test_a_method_without_a_declared_authorization_cannot_be_made() -> None:
    """CVE-2026-26103, CVE-2026-26104, Transport rule 10 (deny by default)."""
    made: dict[str, Any] = {
        "name": "X",
        "in_signature": "",
        "out_signature": "",
        "handler": None,
    }
    with pytest.raises(TypeError, match="authorization"):
        Method(**made)


def test_what_changes_something_is_for_the_manager_to_allow() -> None:
    """CVE-2026-26103, CVE-2026-26104, Transport rule 10 (deny by default)."""
    free = {
        f"{interface}.{name}"
        for interface, methods in METHODS.items()
        for name, method in methods.items()
        if method.authorization is Authorization.FREE
    }
    loop1 = {name.removeprefix("org.example.") for name in free if name.startswith("org.example.")}
    assert loop1 == {"Loop1.GetDevice", "Loop1.GetDeviceByNode", "Loop1.ListDevices"}


def test_introspection_of_a_node_is_cut_whole() -> None:
    text = introspection.Introspection().node((announcer.DEVICE, announcer.PEER), ["loop3_4"])
    tree = ElementTree.fromstring(text)
    assert [each.get("name") for each in tree.iter("interface")] == [
        announcer.DEVICE,
        announcer.PEER,
    ]
    assert [each.get("name") for each in tree.findall("node")] == ["loop3_4"]


def test_generated_code_can_pass_the_fds() -> None:
    """gdbus-codegen leaves out the list of fds of a method without this annotation."""
    wanted, annotated = set(), set()
    for name, interface in INTERFACES.items():
        for method in interface.iter("method"):
            which = name, method.get("name")
            if "h" in signature(method, "in") + signature(method, "out"):
                wanted.add(which)
            for note in method.findall("annotation"):
                if note.get("name") == "org.gtk.GDBus.C.UnixFD":
                    annotated.add(which)
    assert annotated == wanted
    assert len(wanted) > 3
