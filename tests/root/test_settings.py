# SPDX-License-Identifier: LGPL-2.1-or-later
"""SetReference, SetDirectIO, SetSectorSize and SetAutoclear: what the kernel has, and what is told.

A setter that succeeds has changed the kernel, the property, and nothing else; one that fails has
changed nothing at all.
"""

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopd.loop import uapi
from tests.harness import loops
from tests.harness.caller import DEVICE, MANAGER, MANAGER_PATH, Attached, Call, Caller, Variant
from tests.harness.images import MIB, make_gpt, memfd, pattern
from tests.harness.polkit import rules_allowing
from tests.harness.raw import BUS
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

ERROR = f"{MANAGER}.Error."
INVALID_ARGS = f"{BUS}.Error.InvalidArgs"
REQUIRED = f"{BUS}.Error.InteractiveAuthorizationRequired"
MANAGING = "mail"
"""A user who may manage what is others'."""

SETTERS: list[tuple[str, str, Any]] = [
    ("SetReference", "s", "name"),
    ("SetDirectIO", "b", False),
    ("SetSectorSize", "u", 4096),
    ("SetAutoclear", "b", False),
]


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    rules = rules_allowing("org.example.loop1.attach", "org.example.loop1.open-device")
    rules += rules_allowing("org.example.loop1.manage-others", users=(MANAGING,))
    return {"authority": rules}


@pytest.fixture
def foreign(world: World) -> Iterator[loops.BoundLoop]:
    """A device made by losetup, and what it is."""
    node = loops.losetup(world.image())
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    yield loop
    loops.detach_leaked(loop)


def path_of(loop: loops.BoundLoop) -> str:
    return f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"


def wait_known(caller: Caller, loop: loops.BoundLoop) -> None:
    if path_of(loop) not in caller.managed_objects():
        caller.wait_signal("InterfacesAdded", lambda it: it.args[0] == path_of(loop))


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file as root."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def status(device: Attached | loops.BoundLoop) -> uapi.loop_info64:
    info = uapi.loop_info64()
    with opened(device.node) as fd:
        fcntl.ioctl(fd, uapi.LOOP_GET_STATUS64, info)
    return info


def reference(device: Attached | loops.BoundLoop) -> bytes:
    """Return the name that the kernel has."""
    return bytes(status(device).lo_file_name)


def sysfs(device: Attached | loops.BoundLoop, name: str) -> int:
    return int(Path(f"/sys/block/loop{device.number}/{name}").read_text())


def sector_size(device: Attached) -> int:
    return sysfs(device, "queue/logical_block_size")


def setter(caller: Caller, path: str, member: str, kind: str, value: Any, **options: Any) -> Any:
    return caller.device(path, member, f"{kind}a{{sv}}", value, options)


def set_reference(caller: Caller, path: str, text: str) -> None:
    assert setter(caller, path, "SetReference", "s", text) == ()


def set_direct_io(caller: Caller, path: str, enable: bool) -> bool:
    (in_effect,) = setter(caller, path, "SetDirectIO", "b", enable)
    return bool(in_effect)


def set_sector_size(caller: Caller, path: str, size: int) -> None:
    assert setter(caller, path, "SetSectorSize", "u", size) == ()


def set_autoclear(caller: Caller, path: str, enable: bool) -> None:
    assert setter(caller, path, "SetAutoclear", "b", enable) == ()


def told(caller: Caller, path: str) -> list[dict[str, Any]]:
    """Return the changes that a caller has heard of since the last time."""
    found = [it for it in caller.sync_signals() if it.path == path]
    for signal in found:
        caller.signals.remove(signal)
    return [signal.args[1] for signal in found]


def error_of(call: Callable[..., Any], *args: Any, **how: Any) -> CallError:
    """Return the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call(*args, **how)
    return failure.value


def key_of(error: CallError) -> tuple[str, str]:
    """Return the name of an error and the key that its text begins with."""
    return error.name, error.message.partition(":")[0]


def answer_of(call: Call) -> tuple[str, str]:
    """Wait for a call; return what key_of() says of its error, nothing if it has none."""
    try:
        call.end()
    except CallError as exc:
        return key_of(exc)
    return "", ""


# Whoever sets what


@pytest.mark.parametrize(("member", "kind", "value"), SETTERS)
def test_another_user_sets_nothing(
    world: World, owner: Caller, member: str, kind: str, value: Any
) -> None:
    attached = owner.attach(world.image(), reference="mine")
    before = owner.get_all(attached.path)
    error = error_of(setter, world.caller(OTHER), attached.path, member, kind, value)
    assert error.name == REQUIRED
    assert "manage-others" in error.message
    assert owner.get_all(attached.path) == before
    assert reference(attached) == b"mine"


@pytest.mark.parametrize(("member", "kind", "value"), SETTERS)
def test_an_option_is_told_with_its_key_and_nothing_is_set(
    world: World, owner: Caller, member: str, kind: str, value: Any
) -> None:
    attached = owner.attach(world.image())
    before = owner.get_all(attached.path)
    wrong = Variant("b", True)
    error = error_of(setter, owner, attached.path, member, kind, value, force=wrong)
    assert key_of(error) == (INVALID_ARGS, "'force'")
    assert owner.get_all(attached.path) == before


def test_a_device_that_is_going_is_not_changed(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    fd = owner.open_device(attached.path, "r")
    assert owner.detach(attached.path) is False
    before = owner.get_all(attached.path)
    for member, kind, value in SETTERS:
        expected = "NotSupported" if member == "SetAutoclear" else "NoSuchDevice"
        assert error_of(setter, owner, attached.path, member, kind, value).name == ERROR + expected
    assert owner.get_all(attached.path) == before
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)


@pytest.mark.parametrize(("member", "kind", "value"), SETTERS)
def test_an_ordinary_user_changes_nothing_of_somebody_elses(
    world: World, owner: Caller, foreign: loops.BoundLoop, member: str, kind: str, value: Any
) -> None:
    wait_known(owner, foreign)
    before = owner.get_all(path_of(foreign))
    assert error_of(setter, owner, path_of(foreign), member, kind, value).name == REQUIRED
    assert owner.get_all(path_of(foreign)) == before


def test_who_may_manage_others_changes_somebody_elses(
    world: World, foreign: loops.BoundLoop
) -> None:
    manager, watcher = world.caller(MANAGING), world.caller(OTHER)
    path = path_of(foreign)
    for caller in (manager, watcher):
        wait_known(caller, foreign)
    set_reference(manager, path, "theirs")
    assert (reference(foreign), watcher.get(path, "Reference")) == (b"theirs", "theirs")
    set_sector_size(manager, path, 4096)
    assert watcher.get(path, "SectorSize") == sysfs(foreign, "queue/logical_block_size") == 4096
    for enable in (True, False):
        assert set_direct_io(manager, path, enable) is enable
        assert watcher.get(path, "DirectIO") is bool(sysfs(foreign, "loop/dio")) is enable
    changed: dict[str, Any] = {}
    for change in told(watcher, path):
        changed |= change
    assert changed == {"Reference": "theirs", "SectorSize": 4096, "DirectIO": False}
    # Nothing of that made it go with its last user.
    assert loops.loop_is_bound(foreign.number, foreign.diskseq)
    assert sysfs(foreign, "loop/autoclear") == 0


def test_who_may_manage_others_and_root_change_what_is_a_users(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    for caller in (world.caller(MANAGING), world.caller(None), world.caller(USER)):
        set_reference(caller, attached.path, caller.unique_name)
        assert owner.get(attached.path, "Reference") == caller.unique_name
        set_sector_size(caller, attached.path, 4096)
        set_sector_size(caller, attached.path, 512)
    assert sysfs(attached, "loop/autoclear") == 1


# The reference


@pytest.mark.parametrize(
    "text", ["name", "", "n" * 62, "ä" * 31, "日本" * 10 + "ab", "a/b c\\d\"'%n$", " ", "😀"]
)
def test_a_reference_is_what_the_kernel_has(world: World, owner: Caller, text: str) -> None:
    """Proves A28."""
    attached = owner.attach(world.image(), reference="former")
    set_reference(owner, attached.path, text)
    assert reference(attached) == text.encode()
    assert owner.get(attached.path, "Reference") == text
    assert told(owner, attached.path) == [{"Reference": text}]
    # As it is already: nothing is told.
    set_reference(owner, attached.path, text)
    assert told(owner, attached.path) == []
    set_reference(owner, attached.path, "")
    assert (reference(attached), owner.get(attached.path, "Reference")) == (b"", "")


HARMFUL = ["n" * 63, "n" * 64, "n" * 10000, "ä" * 32]
HARMFUL += ["\n", "a\tb", "\x1b[0m", "a\x7f", "\x85", "\x9f"]


def test_a_reference_that_would_do_harm_is_refused(world: World, owner: Caller) -> None:
    attached, image = owner.attach(world.image(), reference="former"), world.image()
    for text in HARMFUL:
        error = error_of(set_reference, owner, attached.path, text)
        assert key_of(error) == (INVALID_ARGS, "reference"), text
        assert (reference(attached), owner.get(attached.path, "Reference")) == (b"former", "former")
        assert told(owner, attached.path) == []
        # The same at Attach, with nothing bound.
        error = error_of(owner.attach, image, reference=text)
        assert key_of(error) == (INVALID_ARGS, "reference"), text
        assert world.device_count() == 1


def test_a_reference_can_be_changed_while_the_device_is_in_use(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(), offset=4096, size_limit=8192, sector_size=1024)
    before = owner.get_all(attached.path)
    with opened(attached.node, os.O_RDONLY | os.O_EXCL):
        set_reference(owner, attached.path, "in use")
    assert reference(attached) == b"in use"
    assert owner.get_all(attached.path) == before | {"Reference": "in use"}


def test_a_name_that_is_not_ours_to_choose_is_told_readably(
    world: World, foreign: loops.BoundLoop
) -> None:
    """Invalid UTF-8."""
    manager = world.caller(MANAGING)
    wait_known(manager, foreign)
    # losetup cuts a long path where it likes; so is this one cut.
    info = status(foreign)
    info.lo_file_name = b"cut \xc3"
    with opened(foreign.node, os.O_RDWR) as fd:
        fcntl.ioctl(fd, uapi.LOOP_SET_STATUS64, info)
    set_reference(manager, path_of(foreign), "whole")
    assert reference(foreign) == b"whole"


# Direct I/O


def test_direct_io_is_turned_off_and_on(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    assert owner.get(attached.path, "DirectIO") is True
    for enable in (False, True, False):
        assert set_direct_io(owner, attached.path, enable) is enable
        assert sysfs(attached, "loop/dio") == enable
        assert owner.get(attached.path, "DirectIO") is enable
        assert told(owner, attached.path) == [{"DirectIO": enable}]
        assert set_direct_io(owner, attached.path, enable) is enable
        assert told(owner, attached.path) == []
        with opened(attached.node) as fd:
            assert os.pread(fd, 4096, 8192) == pattern(8192, 4096)


def test_what_is_in_effect_is_told_where_direct_io_cannot_be(world: World, owner: Caller) -> None:
    with memfd() as file:
        attached = owner.attach(file)
        assert owner.get(attached.path, "DirectIO") is False
        assert set_direct_io(owner, attached.path, True) is False
        assert owner.get(attached.path, "DirectIO") is False
        assert sysfs(attached, "loop/dio") == 0
        assert told(owner, attached.path) == []
        assert owner.detach(attached.path) is True


def test_direct_io_is_turned_while_the_device_is_in_use(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    with opened(attached.node, os.O_RDWR | os.O_EXCL) as fd:
        for enable in (False, True):
            os.pwrite(fd, b"x" * 4096, 4096)
            assert set_direct_io(owner, attached.path, enable) is enable
            assert os.pread(fd, 4096, 4096) == b"x" * 4096


# The sector size


@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_a_sector_size_is_changed_and_changed_back(world: World, owner: Caller, size: int) -> None:
    attached = owner.attach(world.image())
    before = owner.get_all(attached.path)
    for wanted in (size, 512):
        set_sector_size(owner, attached.path, wanted)
        assert sector_size(attached) == wanted
        assert told(owner, attached.path) == [{"SectorSize": wanted}]
        assert owner.get_all(attached.path) == before | {"SectorSize": wanted}
        set_sector_size(owner, attached.path, wanted)
        assert told(owner, attached.path) == []
        with opened(attached.node) as fd:
            assert os.pread(fd, 4096, 8192) == pattern(8192, 4096)


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_zero_takes_the_sector_size_of_the_table(world: World, owner: Caller, size: int) -> None:
    """Proves A16."""
    image = make_gpt(world.new_path(), ((64, 64),), MIB, sector_size=size, owner=USER)
    attached = owner.attach(image, sector_size=1024)
    set_sector_size(owner, attached.path, 0)
    assert sector_size(attached) == owner.get(attached.path, "SectorSize") == size


def test_zero_without_a_table_means_512(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(), sector_size=4096)
    set_sector_size(owner, attached.path, 0)
    assert sector_size(attached) == owner.get(attached.path, "SectorSize") == 512


def test_a_sector_size_that_cannot_be_is_refused(world: World, owner: Caller) -> None:
    attached, image = owner.attach(world.image(), sector_size=1024), world.image()
    for size in (1, 256, 511, 513, 1536, 4097, 2**17, 2**32 - 1):
        error = error_of(set_sector_size, owner, attached.path, size)
        assert key_of(error) == (INVALID_ARGS, "sector-size"), size
        assert sector_size(attached) == owner.get(attached.path, "SectorSize") == 1024
        error = error_of(owner.attach, image, sector_size=size)
        assert key_of(error) == (INVALID_ARGS, "sector-size"), size
        assert world.device_count() == 1


@pytest.mark.parametrize("size", [8192, 65536])
def test_a_sector_larger_than_a_page_is_taken_or_refused_whole(
    world: World, owner: Caller, size: int
) -> None:
    attached = owner.attach(world.image())
    calls = [
        owner.call_begin(attached.path, DEVICE, "SetSectorSize", "ua{sv}", size, {}),
        owner.attach_begin(world.image(), sector_size=size),
    ]
    answers = [answer_of(call) for call in calls]
    if "" in answers[0]:  # newer kernels take it
        assert answers[0] == answers[1] == ("", "")
    else:
        assert answers[0] == answers[1] == (INVALID_ARGS, "sector-size")
        size = 512
    assert sector_size(attached) == owner.get(attached.path, "SectorSize") == size


def test_a_sector_is_not_larger_than_the_device(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(2048))
    assert key_of(error_of(set_sector_size, owner, attached.path, 4096)) == (
        *(INVALID_ARGS, "sector-size"),
    )
    assert sector_size(attached) == 512
    set_sector_size(owner, attached.path, 2048)
    assert sector_size(attached) == 2048


def test_a_limit_stays_a_whole_number_of_sectors(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image(), size_limit=3 * 1024)
    error = error_of(set_sector_size, owner, attached.path, 2048)
    assert key_of(error) == (INVALID_ARGS, "sector-size")
    assert sector_size(attached) == 512
    set_sector_size(owner, attached.path, 1024)
    assert owner.resize(attached.path, size_limit=0) == MIB
    set_sector_size(owner, attached.path, 4096)
    assert sector_size(attached) == 4096


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_device_in_use_keeps_its_sector_size(world: World, owner: Caller, flags: int) -> None:
    attached = owner.attach(world.image())
    with opened(attached.node, flags | os.O_EXCL) as fd:
        for size in (4096, 1024):
            assert error_of(set_sector_size, owner, attached.path, size).name == (
                f"{ERROR}DeviceBusy"
            )
        set_sector_size(owner, attached.path, 512)  # as it is
        assert os.pread(fd, 512, 512) == pattern(512, 512)
    assert sector_size(attached) == owner.get(attached.path, "SectorSize") == 512
    with opened(attached.node, flags):
        set_sector_size(owner, attached.path, 4096)
    assert sector_size(attached) == 4096


def test_what_was_written_before_a_change_of_the_sector_size_is_kept(
    world: World, owner: Caller
) -> None:
    image = world.image()
    attached = owner.attach(image, direct_io=False)
    fd = owner.open_device(attached.path, "rw")
    fd.write(b"dirty".ljust(4096, b"."), 4096)
    set_sector_size(owner, attached.path, 4096)
    assert fd.read(4096, 4096) == b"dirty".ljust(4096, b".")
    fd.write(b"again".ljust(4096, b"."), 8192)
    set_sector_size(owner, attached.path, 512)
    owner.device(attached.path, "Sync", "a{sv}", {})
    fd.close()
    assert image.read_bytes()[4096:12288] == b"dirty".ljust(4096, b".") + b"again".ljust(4096, b".")


def test_partitions_follow_the_table_of_the_new_sector_size(world: World, owner: Caller) -> None:
    image = make_gpt(world.new_path(), ((128, 64), (256, 64)), 2 * MIB, owner=USER)
    attached = owner.attach(image, partition_scan=True)
    assert len(loops.partitions(attached.number)) == 2
    with opened(attached.node) as fd:
        # A udevd that has one of them open for a probe would be in the way.
        subprocess.run(
            ["flock", "--exclusive", "--timeout", "20", str(fd)], check=True, pass_fds=[fd]
        )
        set_sector_size(owner, attached.path, 4096)
    assert loops.partitions(attached.number) == ()
    properties = owner.get_all(attached.path)
    assert (properties["SectorSize"], properties["Partitions"]) == (4096, [])
    assert properties["PartitionScan"] is True
    # They come again with the sector size that the table was made for.
    set_sector_size(owner, attached.path, 0)
    properties = owner.get_all(attached.path)
    assert properties["SectorSize"] == 512
    assert [tuple(row) for row in properties["Partitions"]] == [
        (1, f"{attached.node}p1", 128 * 512, 64 * 512),
        (2, f"{attached.node}p2", 256 * 512, 64 * 512),
    ]


def test_partitions_that_were_not_asked_for_do_not_come_with_the_sector_size(
    world: World, owner: Caller
) -> None:
    image = make_gpt(world.new_path(), ((128, 64),), MIB, owner=USER)
    attached = owner.attach(image, sector_size=4096)
    set_sector_size(owner, attached.path, 0)
    properties = owner.get_all(attached.path)
    assert (properties["SectorSize"], properties["Partitions"]) == (512, [])
    assert loops.partitions(attached.number) == ()


def test_a_sector_size_that_a_partition_in_use_forbids_changes_nothing(
    world: World, owner: Caller
) -> None:
    image = make_gpt(world.new_path(), ((128, 64), (256, 64)), 2 * MIB, owner=USER)
    attached = owner.attach(image, partition_scan=True)
    before = owner.get_all(attached.path)
    with opened(f"{attached.node}p2"):
        error = error_of(set_sector_size, owner, attached.path, 4096)
        assert error.name == f"{ERROR}DeviceBusy"
        assert sector_size(attached) == 512
        assert owner.get_all(attached.path) == before


@pytest.mark.parametrize("size", [2 * MIB, 2**31])
def test_a_sector_that_is_larger_than_the_file_is_told_with_its_key(
    world: World, owner: Caller, size: int
) -> None:
    error = error_of(owner.attach, world.image(), sector_size=size)
    assert key_of(error) == (INVALID_ARGS, "sector-size")


# Autoclear


def test_autoclear_of_somebody_elses_is_turned_on_and_off(
    world: World, foreign: loops.BoundLoop
) -> None:
    """Proves A27."""
    manager, watcher = world.caller(MANAGING), world.caller(OTHER)
    path = path_of(foreign)
    for caller in (manager, watcher):
        wait_known(caller, foreign)
    # Somebody has to have it open, else it would go at once.
    with opened(foreign.node):
        for enable in (True, False):
            set_autoclear(manager, path, enable)
            assert sysfs(foreign, "loop/autoclear") == enable
            assert manager.get(path, "Autoclear") is enable
            set_autoclear(manager, path, enable)
        assert told(watcher, path) == [{"Autoclear": True}, {"Autoclear": False}]
        set_reference(manager, path, "as before")
        assert sysfs(foreign, "loop/autoclear") == 0
    assert loops.loop_is_bound(foreign.number, foreign.diskseq)


def test_what_nobody_has_open_goes_when_it_is_to_clear_itself(
    world: World, foreign: loops.BoundLoop
) -> None:
    manager = world.caller(MANAGING)
    wait_known(manager, foreign)
    set_autoclear(manager, path_of(foreign), True)
    manager.wait_signal("InterfacesRemoved", lambda it: it.args[0] == path_of(foreign))
    assert not loops.loop_is_bound(foreign.number, foreign.diskseq)


def test_what_is_to_clear_itself_goes_with_its_last_user(
    world: World, foreign: loops.BoundLoop
) -> None:
    manager = world.caller(MANAGING)
    wait_known(manager, foreign)
    with opened(foreign.node):
        set_autoclear(manager, path_of(foreign), True)
        assert loops.loop_is_bound(foreign.number, foreign.diskseq)
    loops.wait_unbound(foreign.number, foreign.diskseq)


def test_autoclear_of_a_leased_device_is_not_to_be_chosen(world: World, owner: Caller) -> None:
    attached = owner.attach(world.image())
    for caller in (owner, world.caller(USER), world.caller(MANAGING), world.caller(None)):
        for enable in (True, False):
            error = error_of(set_autoclear, caller, attached.path, enable)
            assert error.name == f"{ERROR}NotSupported"
            assert "SetLifetime" in error.message
    assert sysfs(attached, "loop/autoclear") == 1
    assert owner.get(attached.path, "Autoclear") is True


# At once


def test_setters_and_resizes_at_once_never_undo_each_other(world: World, owner: Caller) -> None:
    second, third = world.caller(USER), world.caller(USER)
    attached = owner.attach(world.image())
    for turn in range(30):
        limit, enable = 4096 * (1 + turn % 7), turn % 2 == 0
        calls = [
            owner.call_begin(
                attached.path, DEVICE, "Resize", "a{sv}", {"size-limit": Variant("t", limit)}
            ),
            second.call_begin(attached.path, DEVICE, "SetReference", "sa{sv}", f"turn{turn}", {}),
            third.call_begin(attached.path, DEVICE, "SetDirectIO", "ba{sv}", enable, {}),
        ]
        assert [call.end() for call in calls] == [(limit,), (), (enable,)]
        info = status(attached)
        assert (info.lo_sizelimit, info.lo_file_name) == (limit, f"turn{turn}".encode())
        assert sysfs(attached, "loop/dio") == enable
        properties = owner.get_all(attached.path)
        assert (properties["SizeLimit"], properties["Size"]) == (limit, limit)
        assert (properties["Reference"], properties["DirectIO"]) == (f"turn{turn}", enable)
        assert properties["Autoclear"] is True


def test_settings_of_somebody_elses_at_once_never_undo_each_other(
    world: World, foreign: loops.BoundLoop
) -> None:
    first, second = world.caller(MANAGING), world.caller(None)
    path = path_of(foreign)
    for caller in (first, second):
        wait_known(caller, foreign)
    for turn in range(15):
        limit = 4096 * (1 + turn % 7)
        calls = [
            first.call_begin(path, DEVICE, "Resize", "a{sv}", {"size-limit": Variant("t", limit)}),
            second.call_begin(path, DEVICE, "SetReference", "sa{sv}", f"turn{turn}", {}),
        ]
        assert [call.end() for call in calls] == [(limit,), ()]
        info = status(foreign)
        assert (info.lo_sizelimit, info.lo_file_name) == (limit, f"turn{turn}".encode())
        properties = first.get_all(path)
        assert (properties["Reference"], properties["Size"]) == (f"turn{turn}", limit)


def test_of_references_set_at_once_the_kernels_is_told(world: World, owner: Caller) -> None:
    second = world.caller(USER)
    attached = owner.attach(world.image())
    for turn in range(30):
        calls = [
            caller.call_begin(
                attached.path, DEVICE, "SetReference", "sa{sv}", f"{turn} of {caller.name}", {}
            )
            for caller in (owner, second, owner, second)
        ]
        assert [call.end() for call in calls] == [()] * 4
        assert owner.get(attached.path, "Reference").encode() == reference(attached)
