# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface as it is promised: members, types, values, signals and their order, unknown things.

Gio reads the introspection, and what that says is held against what can be called.
"""

import fcntl
import itertools
import os
import re
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loopd import __version__
from tests.harness import loops, wire
from tests.harness.bus import LOOPD
from tests.harness.caller import (
    DEVICE,
    MANAGER,
    MANAGER_PATH,
    OBJECT_MANAGER,
    PROPERTIES,
    Attached,
    Caller,
    Variant,
)
from tests.harness.images import make_plain, make_sparse, pattern
from tests.harness.polkit import Answer
from tests.harness.raw import BUS, RawClient
from tests.harness.wire import CallError, plain
from tests.harness.world import OTHER, USER, World

SIZE = 64 * 1024
NOBODY = 0xFFFFFFFF
INTROSPECTABLE = f"{BUS}.Introspectable"
PEER = f"{BUS}.Peer"

DEVICE_METHODS = {
    "Detach": ("a{sv}", "b"),
    "Resize": ("a{sv}", "t"),
    "Open": ("sa{sv}", "h"),
    "Hold": ("a{sv}", "h"),
    "SetLifetime": ("sa{sv}", ""),
    "SetAutoclear": ("ba{sv}", ""),
    "SetDirectIO": ("ba{sv}", "b"),
    "SetReference": ("sa{sv}", ""),
    "SetSectorSize": ("ua{sv}", ""),
    "Lock": ("sa{sv}", ""),
    "Sync": ("a{sv}", ""),
    "RescanPartitions": ("a{sv}", "u"),
}
MANAGER_METHODS = {
    "Attach": ("ha{sv}", "ost"),
    "Detach": ("ha{sv}", "b"),
    "Resize": ("ha{sv}", "t"),
    "GetDevice": ("h", "o"),
    "GetDeviceByNode": ("s", "o"),
    "ListDevices": ("", "a(ostayus)"),
}
READERS = {"GetDevice", "GetDeviceByNode", "ListDevices"}
STANDARD_METHODS = {
    PROPERTIES: {"Get": ("ss", "v"), "GetAll": ("s", "a{sv}"), "Set": ("ssv", "")},
    INTROSPECTABLE: {"Introspect": ("", "s")},
    PEER: {"Ping": ("", ""), "GetMachineId": ("", "s")},
}
MANAGER_PROPERTIES = {"Version": "s", "DeviceCount": "u", "MaxDevices": "u"}
MANAGER_PROPERTIES |= {"MaxDevicesPerUser": "u", "ConfigurationError": "s"}
DEVICE_PROPERTIES = {
    "Node": "s",
    "Number": "u",
    "DeviceNumber": "t",
    "Diskseq": "t",
    "BackingFile": "ay",
    "BackingDevice": "t",
    "BackingInode": "t",
    "Offset": "t",
    "SizeLimit": "t",
    "Size": "t",
    "SectorSize": "u",
    "ReadOnly": "b",
    "DirectIO": "b",
    "Autoclear": "b",
    "PartitionScan": "b",
    "Partitions": "a(ustt)",
    "MissingPartitions": "au",
    "Reference": "s",
    "Owner": "u",
    "Holder": "s",
    "Lifetime": "s",
    "Holds": "u",
    "Locked": "s",
    "Managed": "b",
    "State": "s",
    "AttachedAt": "t",
}

OBJECTS = ["/", "/org", "/org/example", MANAGER_PATH, f"{MANAGER_PATH}/device"]
"""Those that are always there; each is the parent of the next."""


def attach(world: World, caller: Caller, **options: Any) -> Attached:
    return caller.attach(world.image(SIZE), **options)


def error_of(caller: Caller, path: str, interface: str | None, member: str, *how: Any) -> str:
    """Return the name of the error that a call gives, without the bus's prefix."""
    with pytest.raises(CallError) as caught:
        caller.call(path, interface, member, *how)
    assert caught.value.message
    return caught.value.name.removeprefix(f"{BUS}.Error.")


# Methods


def test_every_method_of_the_manager_answers_in_its_types(world: World) -> None:
    caller = world.caller()
    image = world.image(SIZE)
    answers = {}

    def call(member: str, *args: Any, fds: Any = ()) -> tuple[Any, ...]:
        signature = MANAGER_METHODS[member][0]
        reply = caller.call_begin(MANAGER_PATH, MANAGER, member, signature, *args, fds=fds).reply()
        answers[member] = reply.signature
        return tuple(plain(reply.body))

    attached = Attached(*call("Attach", 0, {}, fds=[image]))
    loops.used_numbers.add(attached.number)
    loop = loops.look_at(attached.number)
    assert loop
    assert (loop.node, loop.diskseq) == (attached.node, attached.diskseq)
    assert loop.backing_file == str(image)
    assert call("GetDevice", 0, fds=[image]) == (attached.path,)
    assert call("GetDeviceByNode", attached.node) == (attached.path,)
    assert call("GetDeviceByNode", Path(attached.node).name) == (attached.path,)
    (rows,) = call("ListDevices")
    assert [row for row in rows if row[0] == attached.path] == [
        (
            attached.path,
            attached.node,
            attached.diskseq,
            os.fsencode(image) + b"\0",
            caller.evaluate("os.getuid()"),
            "connection",
        )
    ]
    os.truncate(image, 2 * SIZE)
    assert call("Resize", 0, {}, fds=[image]) == (2 * SIZE,)
    assert call("Detach", 0, {}, fds=[image]) == (True,)
    assert not loops.loop_is_bound(attached.number, attached.diskseq)
    assert answers == {name: out for name, (_, out) in MANAGER_METHODS.items()}


def test_every_method_of_a_device_answers_in_its_types(world: World) -> None:
    caller = world.caller()
    image = world.image(SIZE)
    attached = caller.attach(image)
    answers, methods = {}, dict(DEVICE_METHODS)

    def call(member: str, *args: Any) -> tuple[Any, ...]:
        signature = methods[member][0]
        reply = caller.call_begin(attached.path, DEVICE, member, signature, *args).reply()
        answers[member] = reply.signature
        return reply.body

    (fd,) = call("Open", "r", {})
    assert fd.read(SIZE) == pattern(0, SIZE)
    fd.close()
    os.truncate(image, 2 * SIZE)
    assert call("Resize", {}) == (2 * SIZE,)
    assert call("Sync", {}) == ()
    assert call("SetDirectIO", False, {}) == (False,)
    assert call("SetReference", "name", {}) == ()
    assert call("SetSectorSize", 4096, {}) == ()
    assert call("Lock", "shared", {}) == ()
    assert call("SetLifetime", "connection", {}) == ()
    assert call("RescanPartitions", {}) == (0,)
    (hold,) = call("Hold", {})
    told = caller.get_all(attached.path)
    assert (told["Reference"], told["SectorSize"], told["Locked"]) == ("name", 4096, "shared")
    assert (told["Lifetime"], told["Holds"]) == ("connection", 1)
    assert call("Detach", {}) == (True,)
    assert hold.at_end()
    del methods["SetAutoclear"]  # not for devices of loopd's
    assert answers == {name: out for name, (_, out) in methods.items()}


def test_the_path_of_a_device_has_its_number_and_diskseq(world: World) -> None:
    caller = world.caller()
    image = world.image(SIZE)
    paths = set()
    for _ in range(3):
        attached = caller.attach(image)
        name = f"loop{attached.number}_{attached.diskseq}"
        assert attached.path == f"{MANAGER_PATH}/device/{name}"
        diskseq = Path(f"/sys/block/loop{attached.number}/diskseq").read_text()
        assert int(diskseq) == attached.diskseq
        assert caller.detach(attached.path) is True
        assert error_of(caller, attached.path, DEVICE, "Sync", "a{sv}", {}) == "UnknownObject"
        paths.add(attached.path)
    assert len(paths) == 3


def test_a_name_of_no_node_is_an_invalid_argument(world: World) -> None:
    caller = world.caller()
    for name in (
        *("", "loop", "/dev/", "/dev/sda", "loop-1", "loop+1", "loop1p1", "loop1 ", "loop1\n"),
        *("loop01", "/dev//loop1", "dev/loop1", "../dev/loop1", "loop\N{ARABIC-INDIC DIGIT ONE}"),
    ):
        error = error_of(caller, MANAGER_PATH, MANAGER, "GetDeviceByNode", "s", name)
        assert error == "InvalidArgs", name


@pytest.mark.alone  # nobody else may bind the number meanwhile
def test_a_node_without_a_file_is_no_device(world: World) -> None:
    caller = world.caller()
    attached = attach(world, caller)
    caller.detach(attached.path)
    for name in (attached.node, "loop1048575"):
        error = error_of(caller, MANAGER_PATH, MANAGER, "GetDeviceByNode", "s", name)
        assert error == f"{MANAGER}.Error.NoSuchDevice"


# Properties


def test_the_properties_of_a_device_have_their_types(world: World) -> None:
    caller = world.caller()
    attached = attach(world, caller)
    reply = caller.call_begin(attached.path, PROPERTIES, "GetAll", "s", DEVICE).reply()
    assert reply.signature == "a{sv}"
    (properties,) = reply.body
    assert {name: value.signature for name, value in properties.items()} == DEVICE_PROPERTIES
    for name, value in properties.items():
        reply = caller.call_begin(attached.path, PROPERTIES, "Get", "ss", DEVICE, name).reply()
        assert reply.signature == "v"
        assert reply.body == (value,)
    assert caller.get_all(attached.path, "") == plain(properties)
    for interface in (PROPERTIES, INTROSPECTABLE, PEER):
        assert caller.get_all(attached.path, interface) == {}


def test_the_properties_of_a_device_are_as_the_kernel_has_them(world: World) -> None:
    caller = world.caller()
    image = world.image(SIZE)
    before = time.time_ns() // 1000
    attached = caller.attach(image, offset=4096, size_limit=8192, reference="värde")
    after = time.time_ns() // 1000
    directory = Path(f"/sys/block/loop{attached.number}")

    def attribute(name: str) -> str:
        return (directory / name).read_text().removesuffix("\n")

    properties = caller.get_all(attached.path)
    assert before <= properties.pop("AttachedAt") <= after
    major, minor = attribute("dev").split(":")
    assert properties == {
        "Node": f"/dev/{directory.name}",
        "Number": attached.number,
        "DeviceNumber": os.makedev(int(major), int(minor)),
        "Diskseq": int(attribute("diskseq")),
        "BackingFile": attribute("loop/backing_file").encode() + b"\0",
        "BackingDevice": image.stat().st_dev,
        "BackingInode": image.stat().st_ino,
        "Offset": int(attribute("loop/offset")),
        "SizeLimit": int(attribute("loop/sizelimit")),
        "Size": int(attribute("size")) * 512,
        "SectorSize": int(attribute("queue/logical_block_size")),
        "ReadOnly": attribute("ro") == "1",
        "DirectIO": attribute("loop/dio") == "1",
        "Autoclear": attribute("loop/autoclear") == "1",
        "PartitionScan": attribute("loop/partscan") == "1",
        "Partitions": [],
        "MissingPartitions": [],
        "Reference": "värde",
        "Owner": caller.evaluate("os.getuid()"),
        "Holder": caller.unique_name,
        "Lifetime": "connection",
        "Holds": 0,
        "Locked": "none",
        "Managed": True,
        "State": "attached",
    }
    assert properties["DeviceNumber"] == os.stat(attached.node).st_rdev
    assert (properties["Offset"], properties["SizeLimit"], properties["Size"]) == (4096, 8192, 8192)
    assert properties["Autoclear"] is True


def test_the_properties_of_the_manager(world: World) -> None:
    caller = world.caller()
    reply = caller.call_begin(MANAGER_PATH, PROPERTIES, "GetAll", "s", MANAGER).reply()
    (properties,) = reply.body
    assert {name: value.signature for name, value in properties.items()} == MANAGER_PROPERTIES
    assert plain(properties) == {
        "Version": __version__,
        "DeviceCount": 0,
        "MaxDevices": 1024,
        "MaxDevicesPerUser": 32,
        "ConfigurationError": "",
    }
    attach(world, caller)
    attach(world, world.caller(OTHER), mode="r")
    assert caller.get(MANAGER_PATH, "DeviceCount", MANAGER) == 2


@pytest.mark.parametrize(
    "name",
    [b"new\nline", b"ends\n", b"ends\n\n", b" \xff\xfe\x80", b"x (deleted)", b"tab\t", b"\\012"],
)
def test_a_backing_file_may_have_any_name(world: World, name: bytes) -> None:
    """CVE-2014-0004."""
    directory = world.new_path()
    directory.mkdir()
    path = os.fsencode(directory) + b"/" + name
    make_plain(Path(os.fsdecode(path)), 512)
    caller = world.caller()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        attached = caller.attach(fd)
    finally:
        os.close(fd)
    assert caller.get(attached.path, "BackingFile") == path + b"\0"
    (rows,) = caller.manager("ListDevices")
    assert [row[3] for row in rows if row[0] == attached.path] == [path + b"\0"]
    told = caller.managed_objects()[attached.path][DEVICE]
    assert told["BackingFile"] == path + b"\0"
    assert told["BackingInode"] == os.stat(path).st_ino


# Signals


class Told(NamedTuple):
    """A signal as it came, with its types."""

    path: str | None
    interface: str | None
    member: str | None
    signature: str
    body: Any


class Listener:
    """A raw connection that hears from now on, and knows what came before a reply."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        client.add_match(f"type='signal',sender='{LOOPD}'")

    def call(
        self, path: str, interface: str, member: str, signature: str, args: list[Any], **how: Any
    ) -> tuple[tuple[Any, ...], list[Told]]:
        """Return the values of the reply, and the signals that came before it."""
        reply = self._client.call(path, interface, member, signature, args, **how)
        before, self._client.received = self._client.received, []
        return reply.body, [
            Told(each.path, each.interface, each.member, each.signature, plain(each.body))
            for each in before
            if each.type == wire.SIGNAL and each.interface != BUS
        ]


def about(told: list[Told], path: str) -> list[Told]:
    """Return the signals from an object, or of the manager about it; others have devices, too."""
    return [each for each in told if each.path == path or each.body[0] == path]


def test_a_device_is_announced_before_attach_returns(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    listener = Listener(world.raw())
    fd = os.open(world.image(SIZE), os.O_RDWR | os.O_CLOEXEC)
    try:
        args = [0, {"reference": Variant("s", "announced")}]
        reply, told = listener.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", args, fds=[fd])
    finally:
        os.close(fd)
    attached = Attached(*reply)
    loops.used_numbers.add(attached.number)
    (properties,), _ = listener.call(attached.path, PROPERTIES, "GetAll", "s", [DEVICE])
    assert about(told, attached.path) == [
        Told(
            MANAGER_PATH,
            OBJECT_MANAGER,
            "InterfacesAdded",
            "oa{sa{sv}}",
            (attached.path, {DEVICE: plain(properties)}),
        )
    ]
    assert properties["Reference"].value == "announced"


def test_the_number_of_devices_is_told_once_for_those_that_come_together(world: World) -> None:
    caller = world.caller()
    paths = [attach(world, caller).path for _ in range(2)]
    counts = [0]
    for wanted in (2, 0):
        while counts[-1] != wanted:
            told = caller.wait_signal("PropertiesChanged", lambda it: it.path == MANAGER_PATH)
            assert told.args[0] == MANAGER
            assert told.args[1].keys() == {"DeviceCount"}
            counts.append(told.args[1]["DeviceCount"])
        while paths:
            assert caller.detach(paths.pop()) is True
    assert all(count != before for before, count in itertools.pairwise(counts))


def test_a_devices_end_is_told_before_detach_returns(world: World) -> None:
    attached = attach(world, world.caller())
    listener = Listener(world.raw())
    reply, told = listener.call(attached.path, DEVICE, "Detach", "a{sv}", [{}])
    assert reply == (True,)
    *changes, removed = about(told, attached.path)
    assert removed == Told(
        MANAGER_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas", (attached.path, [DEVICE])
    )
    assert {each.member for each in changes} <= {"PropertiesChanged"}


def test_the_new_size_is_told_before_resize_returns(world: World) -> None:
    image = world.image(SIZE)
    attached = world.caller().attach(image)
    listener = Listener(world.raw())

    def changes_by(options: dict[str, Any]) -> list[Any]:
        _, told = listener.call(attached.path, DEVICE, "Resize", "a{sv}", [options])
        found = about(told, attached.path)
        for each in found:
            assert (each.path, each.interface) == (attached.path, PROPERTIES)
            assert (each.member, each.signature) == ("PropertiesChanged", "sa{sv}as")
        return [each.body for each in found]

    os.truncate(image, 2 * SIZE)
    assert changes_by({}) == [(DEVICE, {"Size": 2 * SIZE}, [])]
    assert changes_by({}) == []
    assert changes_by({"size-limit": Variant("t", 2 * SIZE)}) == [
        (DEVICE, {"SizeLimit": 2 * SIZE}, [])
    ]
    assert changes_by({"size-limit": Variant("t", 4096)}) == [
        (DEVICE, {"Size": 4096, "SizeLimit": 4096}, [])
    ]
    assert changes_by({"offset": Variant("t", 512), "size-limit": Variant("t", 0)}) == [
        (DEVICE, {"Size": 2 * SIZE - 512, "SizeLimit": 0, "Offset": 512}, [])
    ]


def test_the_state_is_told_before_a_lazy_detach_returns(world: World) -> None:
    caller = world.caller()
    attached = attach(world, caller)
    fd = caller.open_device(attached.path, "r")
    listener = Listener(world.raw())
    reply, told = listener.call(
        attached.path, DEVICE, "Detach", "a{sv}", [{"lazy": Variant("b", True)}]
    )
    assert reply == (False,)
    changed: dict[str, Any] = {}
    for each in about(told, attached.path):
        assert each.member == "PropertiesChanged"
        changed |= each.body[1]
    assert changed == {"State": "detaching", "Holder": "", "Lifetime": ""}
    fd.close()
    removed = caller.wait_signal("InterfacesRemoved", lambda it: it.args[0] == attached.path)
    assert (removed.path, removed.args[1]) == (MANAGER_PATH, [DEVICE])


def test_a_second_listener_hears_the_same(world: World) -> None:
    caller, other = world.caller(), world.caller(OTHER)
    attached = attach(world, caller)
    caller.detach(attached.path)
    for member in ("InterfacesAdded", "InterfacesRemoved"):
        mine = caller.wait_signal(member, lambda it: it.args[0] == attached.path)
        theirs = other.wait_signal(member, lambda it: it.args[0] == attached.path)
        assert (mine.args, mine.path) == (theirs.args, theirs.path)


# Introspection


class Description(NamedTuple):
    """What Gio reads in the XML of an object."""

    children: set[str]
    methods: dict[str, dict[str, tuple[str, str]]]
    properties: dict[str, dict[str, str]]
    signals: dict[str, dict[str, str]]


READ_XML = """(lambda node: [
    [child.path for child in node.nodes],
    [[each.name,
      [[it.name, "".join(arg.signature for arg in it.in_args),
        "".join(arg.signature for arg in it.out_args)] for it in each.methods],
      [[it.name, it.signature, int(it.flags)] for it in each.properties],
      [[it.name, "".join(arg.signature for arg in it.args)] for it in each.signals]]
     for each in node.interfaces]
])(__import__("gi.repository", fromlist=["Gio"]).Gio.DBusNodeInfo.new_for_xml(xml))""".replace(
    "\n", " "
)
READABLE = 1


def introspect(caller: Caller, path: str) -> Description:
    (xml,) = caller.call(path, INTROSPECTABLE, "Introspect")
    children, interfaces = caller.evaluate(READ_XML, xml=xml)
    assert all(flags == READABLE for each in interfaces for _, _, flags in each[2])
    return Description(
        children=set(children),
        methods={
            each[0]: {name: (ins, outs) for name, ins, outs in each[1]} for each in interfaces
        },
        properties={each[0]: {name: kind for name, kind, _ in each[2]} for each in interfaces},
        signals={each[0]: dict(each[3]) for each in interfaces},
    )


def test_the_manager_is_described_as_it_is(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    described = introspect(world.caller(), MANAGER_PATH)
    assert described.methods == {
        MANAGER: MANAGER_METHODS,
        OBJECT_MANAGER: {"GetManagedObjects": ("", "a{oa{sa{sv}}}")},
        **STANDARD_METHODS,
    }
    assert described.properties[MANAGER] == MANAGER_PROPERTIES
    assert described.signals[OBJECT_MANAGER] == {
        "InterfacesAdded": "oa{sa{sv}}",
        "InterfacesRemoved": "oas",
    }
    assert described.signals[PROPERTIES] == {"PropertiesChanged": "sa{sv}as"}


def test_a_device_is_described_as_it_is(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    attached = attach(world, caller)
    described = introspect(caller, attached.path)
    assert described.methods == {DEVICE: DEVICE_METHODS, **STANDARD_METHODS}
    assert described.properties[DEVICE] == DEVICE_PROPERTIES
    assert described.signals[PROPERTIES] == {"PropertiesChanged": "sa{sv}as"}
    assert described.children == set()


def test_every_object_is_found_from_the_root(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    attached = attach(world, caller)
    for path, child in itertools.pairwise(OBJECTS):
        assert introspect(caller, path).children == {child.rpartition("/")[2]}
    parent, _, name = attached.path.rpartition("/")
    assert parent == OBJECTS[-1]
    children = introspect(caller, parent).children
    assert name in children
    assert all(re.fullmatch(r"loop\d+_\d+", child) for child in children)
    caller.detach(attached.path)
    assert name not in introspect(caller, parent).children


def test_what_is_described_can_be_called(world: World) -> None:
    """Transport rule 9 (standard interfaces): with a signature that no method has: a method that is
    not there would say so instead.
    """
    caller = world.caller()
    attached = attach(world, caller)
    for path in [*OBJECTS, attached.path]:
        described = introspect(caller, path)
        assert INTROSPECTABLE in described.methods
        for interface, methods in described.methods.items():
            for name, (wanted, _) in methods.items():
                with pytest.raises(CallError) as caught:
                    caller.call(path, interface, name, "yy", 1, 2)
                assert caught.value.name == f"{BUS}.Error.InvalidArgs", (path, name)
                assert f"'{wanted}'" in caught.value.message
    assert caller.get(attached.path, "State") == "attached"


def test_an_argument_too_few_or_too_many_is_invalid(world: World) -> None:
    caller = world.caller()
    attached = attach(world, caller)
    for path, interface, member, signature, *args in [
        (attached.path, DEVICE, "Detach", ""),
        (attached.path, DEVICE, "Detach", "a{ss}", {}),
        (attached.path, DEVICE, "Detach", "a{sv}a{sv}", {}, {}),
        (attached.path, DEVICE, "Open", "s", "r"),
        (attached.path, DEVICE, "Open", "a{sv}s", {}, "r"),
        (MANAGER_PATH, MANAGER, "GetDeviceByNode", "o", "/dev/loop0"),
        (MANAGER_PATH, MANAGER, "ListDevices", "s", ""),
        (MANAGER_PATH, PROPERTIES, "Get", "s", MANAGER),
        (MANAGER_PATH, PROPERTIES, "GetAll", ""),
        (MANAGER_PATH, PEER, "Ping", "s", "hello"),
    ]:
        assert error_of(caller, path, interface, member, signature, *args) == "InvalidArgs"
    assert caller.get(attached.path, "State") == "attached"


def test_an_ordinary_user_without_polkits_yes_can_change_nothing(world: World) -> None:
    """CVE-2026-26103, CVE-2026-26104, Transport rule 10 (deny by default)."""
    owner, root, other = world.caller(), world.caller(None), world.caller(OTHER)
    image = world.image(SIZE, mode=0o666)
    # A file names the device of root's.
    attached = [attach(world, owner), root.attach(image)]
    world.polkit.reset(Answer.DENY)
    before = {each: other.get_all(each.path) for each in attached}
    samples = {"h": 0, "a{sv}": {}, "s": "r", "b": True, "u": 512}
    tried = set()
    for path in [MANAGER_PATH, *(each.path for each in attached)]:
        described = introspect(other, path)
        for interface in {MANAGER, DEVICE} & described.methods.keys():
            for name, (signature, _) in described.methods[interface].items():
                if name in READERS:
                    continue
                texts = {"Lock": "shared", "SetLifetime": "connection"}
                given = samples | {"s": texts.get(name, "r")}
                args = [given[kind] for kind in wire.split(signature)]
                fds = [image] if "h" in signature else []
                with pytest.raises(CallError) as caught:
                    other.call(path, interface, name, signature, *args, fds=fds)
                assert caught.value.name == f"{BUS}.Error.AccessDenied", (path, name)
                tried.add(f"{interface}.{name}")
    assert {each: other.get_all(each.path) for each in attached} == before
    for each in attached:
        loop = loops.look_at(each.number)
        assert loop
        assert loop.diskseq == each.diskseq
    assert other.get(MANAGER_PATH, "DeviceCount", MANAGER) == 2
    assert tried == {f"{MANAGER}.{each}" for each in ("Attach", "Detach", "Resize")} | {
        f"{DEVICE}.{each}" for each in DEVICE_METHODS
    }


# The object manager


def test_the_managed_objects_are_the_devices_with_their_properties(world: World) -> None:
    caller = world.caller()
    devices = [attach(world, caller) for _ in range(2)]
    reply = caller.call_begin(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects").reply()
    assert reply.signature == "a{oa{sa{sv}}}"
    (objects,) = reply.body
    for attached in devices:
        ((interface, properties),) = objects[attached.path].items()
        assert interface == DEVICE
        assert {name: value.signature for name, value in properties.items()} == DEVICE_PROPERTIES
        assert plain(properties) == caller.get_all(attached.path)
    caller.detach(devices[0].path)
    objects = caller.managed_objects()
    assert devices[0].path not in objects
    assert devices[1].path in objects


def test_only_the_manager_has_managed_objects(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    attached = attach(world, caller)
    for path in [*OBJECTS, attached.path]:
        if path == MANAGER_PATH:
            continue
        error = error_of(caller, path, OBJECT_MANAGER, "GetManagedObjects")
        assert error == "UnknownInterface"


# What is not there


@pytest.mark.parametrize(
    "path",
    [
        "/org/example/Loop2",
        "/org/example/Loop1/nothing",
        "/org/example/Loop1/device/loop0",
        "/org/example/Loop1/device/loop1048575_1",
        "/org/example/Loop1/device/loop0_0/partition",
        "/com",
    ],
)
def test_an_unknown_path_is_an_unknown_object(world: World, path: str) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    for interface, member, *args in [
        (DEVICE, "Detach", "a{sv}", {}),
        (MANAGER, "ListDevices"),
        (PROPERTIES, "GetAll", "s", DEVICE),
        (INTROSPECTABLE, "Introspect"),
        (PEER, "Ping"),
        ("no.such.Interface", "Member"),
        (None, "Ping"),
    ]:
        assert error_of(caller, path, interface, member, *args) == "UnknownObject"


def test_an_unknown_interface_is_told_as_such(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    attached = attach(world, caller)
    for path, interface, member, *args in [
        (MANAGER_PATH, "no.such.Interface", "ListDevices"),
        (MANAGER_PATH, DEVICE, "Detach", "a{sv}", {}),
        (attached.path, MANAGER, "ListDevices"),
        (attached.path, OBJECT_MANAGER, "GetManagedObjects"),
        ("/", PROPERTIES, "GetAll", "s", ""),
        ("/", MANAGER, "ListDevices"),
        (attached.path, PROPERTIES, "GetAll", "s", MANAGER),
        (attached.path, PROPERTIES, "Get", "ss", MANAGER, "Version"),
        (MANAGER_PATH, PROPERTIES, "GetAll", "s", DEVICE),
        (MANAGER_PATH, PROPERTIES, "Get", "ss", "no.such.Interface", "Version"),
        (MANAGER_PATH, PROPERTIES, "Set", "ssv", "no.such.Interface", "X", Variant("s", "")),
    ]:
        assert error_of(caller, path, interface, member, *args) == "UnknownInterface"


def test_an_unknown_member_is_an_unknown_method(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    attached = attach(world, caller)
    for path in [*OBJECTS, attached.path]:
        assert error_of(caller, path, None, "NoSuchMethod") == "UnknownMethod"
        assert error_of(caller, path, PEER, "ping") == "UnknownMethod"
        for interface in introspect(caller, path).methods:
            assert error_of(caller, path, interface, "NoSuchMethod") == "UnknownMethod"
    assert error_of(caller, attached.path, DEVICE, "Attach") == "UnknownMethod"
    assert error_of(caller, attached.path, PEER, "Detach", "a{sv}", {}) == "UnknownMethod"


def test_an_unknown_property_is_told_as_such(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    caller = world.caller()
    attached = attach(world, caller)
    value = Variant("s", "")
    for path, interface in (
        (MANAGER_PATH, MANAGER),
        (attached.path, DEVICE),
        (MANAGER_PATH, PEER),
        (attached.path, ""),
    ):
        for name in ("NoSuchProperty", "node", ""):
            assert error_of(caller, path, PROPERTIES, "Get", "ss", interface, name) == (
                "UnknownProperty"
            )
            assert error_of(caller, path, PROPERTIES, "Set", "ssv", interface, name, value) == (
                "UnknownProperty"
            )


def test_no_property_can_be_set(world: World) -> None:
    """Transport rule 9 (standard interfaces)."""
    for caller in (world.caller(), world.caller(None)):
        attached = attach(world, caller)
        for path, interface in ((MANAGER_PATH, MANAGER), (attached.path, DEVICE)):
            before = caller.get_all(path, interface)
            kinds = introspect(caller, path).properties[interface]
            for name, value in before.items():
                args = (interface, name, Variant(kinds[name], value))
                assert error_of(caller, path, PROPERTIES, "Set", "ssv", *args) == (
                    "PropertyReadOnly"
                )
            assert caller.get_all(path, interface) == before


# The rest of the protocol


def test_every_object_answers_a_ping_and_knows_the_machine(world: World) -> None:
    caller = world.caller()
    attached = attach(world, caller)
    machine = Path("/etc/machine-id").read_text().strip()
    for path in [*OBJECTS, attached.path]:
        assert caller.call(path, PEER, "Ping") == ()
        assert caller.call(path, PEER, "GetMachineId") == (machine,)


def test_a_call_that_wants_no_reply_gets_none(world: World) -> None:
    client, monitor = world.raw(), world.raw(None)
    # The bus keeps replies that nobody wants from their receiver, but not from a monitor.
    monitor.call(
        "/org/freedesktop/DBus",
        f"{BUS}.Monitoring",
        "BecomeMonitor",
        "asu",
        [[], 0],
        destination=BUS,
    )

    def send(
        path: str, interface: str, member: str, signature: str = "", *args: Any, **how: Any
    ) -> int:
        flags = wire.NO_REPLY_EXPECTED
        return client.send(path, interface, member, signature, args, flags=flags, **how)

    unanswered = {
        send(MANAGER_PATH, MANAGER, "ListDevices"),
        send(MANAGER_PATH, MANAGER, "NoSuchMethod"),
        send(MANAGER_PATH, MANAGER, "ListDevices", "s", ""),
        send(MANAGER_PATH, MANAGER, "GetDeviceByNode", "s", "wrong"),
        send("/none", MANAGER, "ListDevices"),
        send(MANAGER_PATH, PEER, "Ping"),
    }
    fd = os.open(world.image(SIZE), os.O_RDWR | os.O_CLOEXEC)
    try:
        unanswered.add(send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", 0, {}, fds=[fd]))
    finally:
        os.close(fd)
    # It is done all the same.
    world.wait_devices(1)
    (objects,) = client.call(MANAGER_PATH, OBJECT_MANAGER, "GetManagedObjects").body
    (path,) = (path for path, it in objects.items() if plain(it)[DEVICE]["Managed"])
    unanswered.add(send(path, DEVICE, "Open", "sa{sv}", "r", {}))
    unanswered.add(send(path, DEVICE, "Detach", "a{sv}", {}))
    world.wait_devices(0)
    last = client.send(MANAGER_PATH, PEER, "Ping")

    def is_for_client(message: wire.Message) -> bool:
        return message.fields.get(wire.DESTINATION) == client.unique_name

    monitor.receive_where(
        lambda message: is_for_client(message) and message.reply_serial == last, "the last reply"
    )
    answered = {each.reply_serial for each in monitor.received if is_for_client(each)}
    assert len(answered - {None}) >= 1  # of GetManagedObjects, so the monitor does see replies
    assert answered & unanswered == set()


def test_a_call_may_leave_its_interface_out(world: World) -> None:
    caller = world.caller()
    attached = attach(world, caller)
    node = attached.node
    assert caller.call(MANAGER_PATH, None, "GetDeviceByNode", "s", node) == (attached.path,)
    assert caller.call(MANAGER_PATH, None, "Ping") == ()
    assert attached.path in caller.call(MANAGER_PATH, None, "GetManagedObjects")[0]
    assert caller.call(attached.path, None, "Get", "ss", "", "Node") == (node,)
    assert "<node>" in caller.call("/", None, "Introspect")[0]
    assert caller.call(attached.path, None, "Sync", "a{sv}", {}) == ()
    assert caller.call(attached.path, None, "Resize", "a{sv}", {}) == (SIZE,)
    assert caller.call(attached.path, None, "Detach", "a{sv}", {}) == (True,)


# Devices that others made

LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A


@contextmanager
def configured(file: Path, reference: bytes) -> Iterator[loops.BoundLoop]:
    """Bind a file as root with this lo_file_name, which no tool would write."""
    # struct loop_config: fd, block size, struct loop_info64 (the name at 56 of its 232 bytes).
    info = bytes(56) + reference.ljust(64, b"\0") + bytes(112)
    file_fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(64):
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            try:
                node = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue  # removed since
            try:
                fcntl.ioctl(
                    node, LOOP_CONFIGURE, struct.pack("II", file_fd, 512) + info + bytes(64)
                )
            except OSError:
                continue  # taken since
            finally:
                os.close(node)
            break
    finally:
        os.close(control)
        os.close(file_fd)
    loop = loops.look_at(number)
    assert loop
    assert loop.backing_file == str(file)
    try:
        yield loop
    finally:
        loops.detach_leaked(loop)
        loops.wait_unbound(loop.number, loop.diskseq)


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        (b"ab\xff\xfecd", "ab\ufffd\ufffdcd"),
        (b"x" * 62 + "é".encode()[:1], "x" * 62 + "\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"two\nlines\x1b", "two\nlines\x1b"),
        ("prêt".encode(), "prêt"),
    ],
)
def test_a_strangers_reference_may_be_any_bytes(world: World, reference: bytes, shown: str) -> None:
    """Invalid UTF-8."""
    caller = world.caller()
    with configured(make_sparse(world.new_path(), SIZE), reference) as loop:
        path = f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"
        if path not in caller.managed_objects():
            caller.wait_signal("InterfacesAdded", lambda it: it.args[0] == path)
        properties = caller.get_all(path)
        assert properties["Reference"] == shown
        assert (properties["Managed"], properties["Owner"]) == (False, NOBODY)
        assert caller.managed_objects()[path][DEVICE]["Reference"] == shown
    caller.wait_signal("InterfacesRemoved", lambda it: it.args[0] == path)
    # The bus drops who sends it bytes that are no text.
    assert world.daemon.process.status is None
    assert world.raw(USER).owner_of(LOOPD) is not None
