# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device lasts as long as the connection that asked for it, whatever ends which of the two."""

import os
import pwd
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.harness import loops, wire
from tests.harness.area import area
from tests.harness.bus import LOOPD
from tests.harness.caller import (
    DEVICE,
    MANAGER,
    MANAGER_PATH,
    Attached,
    Call,
    Caller,
)
from tests.harness.daemon import Daemon
from tests.harness.deadline import Deadline
from tests.harness.images import memfd
from tests.harness.polkit import Answer
from tests.harness.raw import BUS
from tests.harness.wire import CallError
from tests.harness.world import OTHER, USER, World

# Leases are above the reading and writing of messages.
pytestmark = pytest.mark.one_library

ATTACH = "org.example.loop1.attach"

Leave = Callable[[Caller], None]
LEAVE = pytest.mark.parametrize(
    "leave", [Caller.kill, Caller.disconnect, Caller.close], ids=["kill", "disconnect", "exit"]
)


@pytest.fixture(scope="module")
def world_options() -> dict[str, Any]:
    """A question ends with its asker here, and not by itself: no test waits for that long."""
    return {"config": "[deadlines]\nauthorization = 60\n"}


def is_bound(attached: Attached) -> bool:
    return loops.loop_is_bound(attached.number, attached.diskseq)


def bound_files(files: Path) -> list[str]:
    """What is bound of the files in a directory."""
    found = [loop.backing_file for loop in loops.bound_loops().values()]
    return [each for each in found if each.startswith(f"{files}/")]


def wait_noticed(world: World, caller: Caller) -> None:
    """Return when loopd has heard that a caller left: it answers what came after the news."""
    world.bus.wait_released(caller.unique_name)
    world.device_count()


def fails(call: Call) -> str:
    """Return the name of the error that a call ends with."""
    with pytest.raises(CallError) as failure:
        call.end()
    return failure.value.name


# The client ends


@LEAVE
def test_a_device_goes_when_its_client_does(world: World, leave: Leave) -> None:
    """Transport rule 7 (disconnects)."""
    caller, watcher = world.caller(), world.caller(OTHER)
    devices = [caller.attach(world.image()) for _ in range(3)]
    assert all(map(is_bound, devices))
    leave(caller)
    for attached in devices:
        loops.wait_unbound(attached.number, attached.diskseq)
        watcher.wait_signal("InterfacesRemoved", lambda it, path=attached.path: it.args[0] == path)
    world.wait_devices(0)


@LEAVE
def test_one_clients_end_leaves_the_devices_of_others(world: World, leave: Leave) -> None:
    leaving, same_user, other = world.caller(), world.caller(), world.caller(OTHER)
    gone = leaving.attach(world.image())
    kept = [same_user.attach(world.image()), other.attach(world.image(owner=OTHER))]
    leave(leaving)
    loops.wait_unbound(gone.number, gone.diskseq)
    world.wait_devices(2)
    assert all(map(is_bound, kept))
    for caller, attached in zip((same_user, other), kept, strict=True):
        assert caller.get(attached.path, "State") == "attached"
        assert caller.get(attached.path, "Holder") == caller.unique_name


@LEAVE
def test_a_client_that_leaves_while_polkit_thinks_gets_nothing(world: World, leave: Leave) -> None:
    """CVE-2021-3560, Transport rule 7 (disconnects)."""
    world.polkit.on(ATTACH, Answer.HANG)
    caller = world.caller()
    caller.attach_begin(world.image())
    question = world.polkit.wait_question(ATTACH)
    leave(caller)
    world.polkit.wait_cancelled(question)
    wait_noticed(world, caller)
    assert (world.device_count(), bound_files(world.files)) == (0, [])


def test_a_yes_that_comes_after_the_client_left_attaches_nothing(world: World) -> None:
    """CVE-2021-3560: polkit answers in the very moment in which the caller goes; the news of it
    come later.
    """
    for _ in range(20):
        world.polkit.on(ATTACH, Answer.HANG)
        world.polkit.questions.clear()
        with world.bus.connect(USER) as client, memfd() as fd:
            client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
            world.polkit.wait_question(ATTACH)
            os.kill(world.daemon.pid, signal.SIGSTOP)
            try:
                client.close()
                world.polkit.release(Answer.ALLOW)
            finally:
                os.kill(world.daemon.pid, signal.SIGCONT)
        world.wait_devices(0)


def test_a_client_killed_right_after_asking_gets_nothing_that_stays(world: World) -> None:
    """CVE-2021-3560."""
    scheduling = random.Random(20)
    with memfd() as fd, world.bus.connect() as bystander:
        for _ in range(100):
            with world.bus.connect(USER) as client:
                for _ in range(scheduling.randint(1, 4)):
                    options = {"allow-overlap": wire.Variant("b", True)}
                    args = [0, options]
                    client.send(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", args, fds=[fd])
                # The time of some answers to somebody else, from none to that of a whole Attach.
                for _ in range(scheduling.choice((0, 0, 1, 2, 4, 8, 16))):
                    bystander.call(MANAGER_PATH, f"{BUS}.Peer", "Ping")
        world.wait_devices(0)
        world.wait_idle_fds()
    assert "Attach of /dev/loop" in world.daemon.log


def test_a_process_killed_right_after_asking_gets_nothing_that_stays(world: World) -> None:
    path = world.image()
    for _ in range(10):
        caller = world.caller()
        for _ in range(3):
            caller.attach_begin(path, allow_overlap=True)
        caller.kill()
    world.wait_devices(0)
    world.wait_idle_fds()  # what was being bound counts from when it is
    assert bound_files(world.files) == []


def test_a_client_killed_right_after_asking_for_its_device_leaves_nothing(world: World) -> None:
    """CVE-2021-3560."""
    scheduling = random.Random(21)
    with memfd() as fd, world.bus.connect() as bystander:
        for _ in range(30):
            with world.bus.connect(USER) as client:
                reply = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=[fd])
                path = reply.body[0]
                asked = [("Open", "sa{sv}", ["rw", {}]), ("Sync", "a{sv}", [{}])]
                asked += [("Resize", "a{sv}", [{}]), ("Detach", "a{sv}", [{}])]
                for member, signature, args in scheduling.sample(asked, 3):
                    client.send(path, DEVICE, member, signature, args)
                for _ in range(scheduling.randint(0, 4)):
                    bystander.call(MANAGER_PATH, f"{BUS}.Peer", "Ping")
            world.wait_devices(0)


def test_a_device_in_use_when_its_client_dies_goes_at_the_last_close(world: World) -> None:
    owner, user = world.caller(), world.caller()
    attached = owner.attach(world.image())
    fd = user.open_device(attached.path, "r")
    owner.kill()
    user.wait_signal(
        "PropertiesChanged",
        lambda it: it.path == attached.path and it.args[1].get("State") == "detaching",
    )
    assert is_bound(attached)
    properties = user.get_all(attached.path)
    assert properties["State"] == "detaching"
    assert (properties["Holder"], properties["Lifetime"]) == ("", "")
    assert (properties["Owner"], properties["Managed"]) == (fd.evaluate("os.getuid()"), True)
    assert world.device_count() == 1
    assert attached.path in user.managed_objects()
    assert len(fd.read(512)) == 512
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)
    user.wait_signal("InterfacesRemoved", lambda it: it.args == (attached.path, [DEVICE]))
    world.wait_devices(0)


def test_a_forged_report_of_a_clients_end_is_not_believed(
    new_world: Callable[..., World],
) -> None:
    """Transport rule 7 (disconnects): a bus without our policy lets anyone send us signals."""
    world = new_world(policies=[])
    caller, liar = world.caller(), world.raw(OTHER)
    attached = caller.attach(world.image())
    for destination in (LOOPD, liar.owner_of(LOOPD)):
        for path, interface in (("/org/freedesktop/DBus", BUS), (MANAGER_PATH, MANAGER)):
            liar.send(
                path,
                interface,
                "NameOwnerChanged",
                "sss",
                [caller.unique_name, caller.unique_name, ""],
                destination=destination,
                type=wire.SIGNAL,
            )
    liar.call(MANAGER_PATH, f"{BUS}.Peer", "Ping")
    assert caller.get(attached.path, "State") == "attached"
    assert is_bound(attached)


# The client ends in the midst of the binding

PAUSE_AFTER_CONFIGURE = """
import os
from loopd.loop import kernel
configure = kernel.loop_configure
def paused(loop_fd, config):
    configure(loop_fd, config)
    with open({here!r}, "w") as file:
        print(os.readlink("/proc/self/fd/%d" % loop_fd), file=file)
    with open({on!r}) as file:
        file.readline()
kernel.loop_configure = paused
"""


class Pause:
    """Stops loopd right after it has bound a device."""

    def __init__(self, directory: Path) -> None:
        here, on = directory / "here", directory / "on"
        for path in (here, on):
            os.mkfifo(path)
        # Open for both, so that neither side waits for the other's open.
        self._here = os.open(here, os.O_RDWR | os.O_CLOEXEC)
        self._on = os.open(on, os.O_RDWR | os.O_CLOEXEC)
        self.prelude = PAUSE_AFTER_CONFIGURE.format(here=str(here), on=str(on))

    def wait(self) -> loops.BoundLoop:
        """Wait until a device is bound; return it."""
        Deadline().wait_readable([self._here], "loopd to bind a device")
        number = int(os.read(self._here, 100).removeprefix(b"/dev/loop"))
        loops.used_numbers.add(number)
        loop = loops.look_at(number)
        assert loop
        return loop

    def end(self) -> None:
        """Let loopd go on."""
        os.write(self._on, b"\n")

    def close(self) -> None:
        """Let go of the two pipes."""
        os.close(self._here)
        os.close(self._on)


@pytest.fixture
def pause() -> Iterator[Pause]:
    with area("pause") as directory:
        with closing(Pause(directory)) as pause:
            yield pause


def test_a_client_that_leaves_during_the_binding_gets_nothing(
    new_world: Callable[..., World], pause: Pause
) -> None:
    """CVE-2021-3560."""
    world = new_world(prelude=pause.prelude)
    caller, watcher = world.caller(), world.caller(OTHER)
    caller.attach_begin(world.image())
    loop = pause.wait()
    caller.kill()
    wait_noticed(world, caller)
    pause.end()
    loops.wait_unbound(loop.number, loop.diskseq)
    world.wait_devices(0)
    # Whoever hears of it at all hears of a device that is on its way out and nobody's to use.
    for added in watcher.sync_signals():
        if added.member == "InterfacesAdded":
            properties = added.args[1][DEVICE]
            if properties["BackingFile"].startswith(bytes(world.files)):
                assert (properties["State"], properties["Holder"]) == ("detaching", "")


def test_what_is_undone_stays_marked_and_counted_until_the_kernel_lets_go(
    new_world: Callable[..., World], pause: Pause
) -> None:
    """Quota dodges: udev opens what it has heard of, and may do so while the client dies."""
    world = new_world(prelude=pause.prelude)
    caller, watcher = world.caller(), world.caller(OTHER)
    caller.attach_begin(world.image())
    loop = pause.wait()
    mark = world.daemon.runtime_directory / "unprivileged" / f"loop{loop.number}"
    opener = os.open(loop.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        caller.kill()
        wait_noticed(world, caller)
        pause.end()
        path = f"{MANAGER_PATH}/device/loop{loop.number}_{loop.diskseq}"
        watcher.wait_signal("InterfacesAdded", lambda it: it.args[0] == path)
        # What comes after that has time to happen.
        for _ in range(20):
            (devices,) = watcher.manager("ListDevices")
        assert loops.loop_is_bound(loop.number, loop.diskseq)
        assert mark.exists()
        assert world.device_count() == 1
        ((owner, lifetime),) = [row[4:] for row in devices if row[0] == path]
        assert (owner, lifetime) == (pwd.getpwnam(USER).pw_uid, "")
    finally:
        os.close(opener)
    loops.wait_unbound(loop.number, loop.diskseq)
    world.wait_devices(0)
    world.wait_idle_fds()
    assert not mark.exists()


# The daemon ends


def test_kill_9_of_the_daemon_leaves_nothing_bound(new_world: Callable[..., World]) -> None:
    """Killed at any point."""
    world = new_world()
    caller, other = world.caller(), world.caller(OTHER)
    devices = [caller.attach(world.image()) for _ in range(3)]
    devices.append(other.attach(world.image(owner=OTHER)))
    world.daemon.kill()
    for attached in devices:
        loops.wait_unbound(attached.number, attached.diskseq)


def test_kill_9_during_the_binding_leaves_nothing_bound(
    new_world: Callable[..., World], pause: Pause
) -> None:
    """Killed at any point."""
    world = new_world(prelude=pause.prelude)
    world.caller().attach_begin(world.image())
    loop = pause.wait()
    world.daemon.kill()
    loops.wait_unbound(loop.number, loop.diskseq)


def test_kill_9_of_the_daemon_leaves_a_device_in_use_to_its_last_close(
    new_world: Callable[..., World],
) -> None:
    """Killed at any point."""
    world = new_world()
    caller = world.caller()
    attached = caller.attach(world.image())
    fd = caller.open_device(attached.path, "rw")
    world.daemon.kill()
    assert is_bound(attached)
    assert fd.write(b"x" * 512) == 512
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_client_that_turned_autoclear_off_cannot_keep_its_device(
    new_world: Callable[..., World],
) -> None:
    """Killed at any point: an fd of the device is enough to do that, so loopd turns it on again and
    clears itself.
    """
    world = new_world()
    caller = world.caller()
    attached = caller.attach(world.image())
    fd = caller.open_device(attached.path, "rw")
    set_status = (
        "fcntl.ioctl(fd, 0x4c04, (lambda status: status[:52] + bytes(4) + status[56:])"
        "(fcntl.ioctl(fd, 0x4c05, bytes(232))))"
    )
    fd.evaluate(set_status)
    assert Path(f"/sys/block/loop{attached.number}/loop/autoclear").read_text() == "0\n"
    fd.close()
    caller.kill()
    loops.wait_unbound(attached.number, attached.diskseq)
    world.wait_devices(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_detaches_all_and_succeeds(
    new_world: Callable[..., World], number: signal.Signals
) -> None:
    world = new_world()
    caller = world.caller()
    devices = [caller.attach(world.image()) for _ in range(3)]
    world.daemon.process.signal(number)
    assert world.daemon.wait() == 0
    assert not any(map(is_bound, devices))
    assert "hanging" not in world.daemon.log
    with world.bus.connect() as client:
        assert client.owner_of(LOOPD) is None
    assert [*(world.daemon.runtime_directory / "unprivileged").iterdir()] == []


def test_a_stop_while_polkit_thinks_attaches_nothing(new_world: Callable[..., World]) -> None:
    world = new_world(authority=Answer.HANG)
    caller = world.caller()
    call = caller.attach_begin(world.image())
    world.polkit.wait_question(ATTACH)
    assert world.daemon.terminate() == 0
    fails(call)
    assert bound_files(world.files) == []


IMPATIENT = "from loopd.daemon import lifecycle; lifecycle.STOP_TIMEOUT = 0.5"


def test_a_stop_leaves_a_device_in_use_to_its_last_close(new_world: Callable[..., World]) -> None:
    world = new_world(prelude=IMPATIENT)
    caller = world.caller()
    attached = caller.attach(world.image())
    fd = caller.open_device(attached.path, "r")
    assert world.daemon.terminate() == 0
    assert is_bound(attached)
    # Whose it is has to be known for as long as it is there.
    mark = world.daemon.runtime_directory / "unprivileged" / f"loop{attached.number}"
    assert mark.exists()
    fd.close()
    loops.wait_unbound(attached.number, attached.diskseq)


def test_a_second_daemon_gives_up_and_leaves_the_devices_of_the_first(
    world: World, library: str
) -> None:
    caller = world.caller()
    attached = caller.attach(world.image())
    directory = world.daemon.runtime_directory
    with Daemon(
        world.bus, library=library, runtime_directory=directory, wait_ready=False
    ) as second:
        assert second.wait() > 0
        assert LOOPD in second.log
    assert is_bound(attached)
    assert (directory / "unprivileged" / f"loop{attached.number}").exists()
    assert caller.get(attached.path, "State") == "attached"


def test_a_stop_during_the_binding_leaves_nothing_bound(
    new_world: Callable[..., World], pause: Pause
) -> None:
    world = new_world(prelude=pause.prelude)
    caller = world.caller()
    call = caller.attach_begin(world.image())
    loop = pause.wait()
    world.daemon.process.signal(signal.SIGTERM)
    world.bus.wait_released(LOOPD)
    pause.end()
    assert world.daemon.wait() == 0
    loops.wait_unbound(loop.number, loop.diskseq)
    fails(call)
