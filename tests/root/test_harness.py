# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real polkitd, udev and loop devices of the harness, and the watch for leaked devices."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import images, leaks, loops
from tests.harness.area import TOKEN
from tests.harness.bus import POLKIT, PrivateBus
from tests.harness.caller import Caller
from tests.harness.daemon import Daemon
from tests.harness.polkit import (
    RULES_ALLOW_ALL,
    RULES_DENY_ALL,
    RULES_NONE,
    RealPolkit,
    rules_allowing,
)
from tests.harness.udev import RULES, Udev
from tests.harness.wire import Variant

ATTACH = "org.example.loop1.attach"
KEEP = "org.example.loop1.keep"


def losetup(*arguments: str | Path) -> str:
    """Run losetup; return what it printed."""
    run = subprocess.run(["losetup", *arguments], check=True, capture_output=True, text=True)
    return run.stdout.strip()


@contextmanager
def bound(image: Path) -> Iterator[loops.BoundLoop]:
    """Have a file attached by losetup, without autoclear."""
    node = loops.losetup(image)
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop is not None
    try:
        yield loop
    finally:
        loops.detach_leaked(loop)
        loops.wait_unbound(loop.number, loop.diskseq)


def is_allowed(bus: PrivateBus, user: str, action: str) -> tuple[bool, bool]:
    """Ask polkit whether `user` may; return whether it may, and whether it could be asked."""
    with bus.connect(user) as subject, bus.connect() as asker:
        name = {"name": Variant("s", subject.unique_name)}
        reply = asker.call(
            "/org/freedesktop/PolicyKit1/Authority",
            f"{POLKIT}.Authority",
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
            [("system-bus-name", name), action, {"size": "512"}, 0, ""],
            destination=POLKIT,
        )
    ((allowed, challenge, _),) = reply.body
    return allowed, challenge


@pytest.mark.parametrize(
    ("rules", "nobody_attach", "games_attach", "nobody_keep"),
    [
        (RULES_NONE, (False, True), (False, True), (False, True)),
        (RULES_ALLOW_ALL, (True, False), (True, False), (True, False)),
        (RULES_DENY_ALL, (False, False), (False, False), (False, False)),
        (
            rules_allowing(ATTACH, users=("nobody",)),
            *((True, False), (False, True), (False, True)),
        ),
    ],
    ids=["none", "allow all", "deny all", "allow one"],
)
def test_polkitd_goes_by_our_actions_and_the_given_rules(
    bus: PrivateBus,
    make_polkit: Callable[[str], RealPolkit],
    rules: str,
    nobody_attach: tuple[bool, bool],
    games_attach: tuple[bool, bool],
    nobody_keep: tuple[bool, bool],
) -> None:
    make_polkit(rules)
    assert is_allowed(bus, "nobody", ATTACH) == nobody_attach
    assert is_allowed(bus, "games", ATTACH) == games_attach
    assert is_allowed(bus, "nobody", KEEP) == nobody_keep


@pytest.mark.alone  # others mount, too
def test_polkitd_runs_as_its_own_user_and_leaves_the_host_alone(
    bus: PrivateBus, make_polkit: Callable[[str], RealPolkit]
) -> None:
    rules = Path("/etc/polkit-1/rules.d")
    before, mounts = sorted(rules.iterdir()), Path("/proc/self/mountinfo").read_text()
    polkitd = make_polkit(RULES_ALLOW_ALL)
    assert Path(f"/proc/{polkitd.pid}").owner() == "polkitd"
    assert sorted(rules.iterdir()) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts
    polkitd.stop()
    bus.wait_released(POLKIT)


def test_udev_obeys_a_rule_for_as_long_as_it_is_there(area: Path) -> None:
    image = images.make_ext4(area / "image", label="harness-label")
    rule = 'SUBSYSTEM=="block", KERNEL=="loop*", ENV{LOOPD_HARNESS}="seen"\n'
    with Udev({"98-loopd-harness.rules": rule}) as udev, bound(image) as loop:
        udev.settle()
        properties = udev.properties(loop.node)
        assert properties["LOOPD_HARNESS"] == "seen"
        assert properties["ID_FS_LABEL"] == "harness-label"
        assert f"/dev/disk/by-diskseq/{loop.diskseq}" in udev.links(loop.node)
    assert not list(RULES.glob(f"98-loopd-harness-{TOKEN}*"))


def test_udevd_is_shared_and_ends_with_its_last_user() -> None:
    with Udev() as first, Udev() as second:
        first.settle()
        second.settle()


def test_a_bound_device_is_seen_until_it_is_unbound(area: Path) -> None:
    image = images.make_plain(area / "im\nage", 1 << 20)
    with bound(image) as loop:
        assert loop.backing_file == str(image)
        assert loops.bound_loops()[loop.number] == loop
        assert loops.loop_is_bound(loop.number)
        assert loops.loop_is_bound(loop.number, loop.diskseq)
        assert not loops.loop_is_bound(loop.number, loop.diskseq + 1)
        with pytest.raises(TimeoutError):
            loops.wait_unbound(loop.number, timeout=0)
        with open(loop.node, "rb") as device:
            assert device.read(4096) == images.pattern(0, 4096)
    assert not loops.loop_is_bound(loop.number, loop.diskseq)


def test_unbinding_is_waited_for_by_uevent(area: Path) -> None:
    image = images.make_sparse(area / "image", 1 << 20)
    with bound(image) as loop:
        holder = os.open(loop.node, os.O_RDONLY)
        losetup("--detach", loop.node)  # lazy, since we are an opener
        with loops.Uevents() as events:
            assert loops.loop_is_bound(loop.number, loop.diskseq)
            os.close(holder)
            events.wait_until(
                lambda: not loops.loop_is_bound(loop.number, loop.diskseq), "the last close"
            )


def test_a_leaked_device_is_found_and_taken_away(area: Path) -> None:
    before = leaks.Snapshot.take()
    image = images.make_sparse(area / "image", 1 << 20)
    with bound(image) as loop:
        found = before.leaks(grace=0)
        assert found == [f"loop device {loop.node} ({loop.diskseq}) on {image}"]
        loops.wait_unbound(loop.number, loop.diskseq)
    assert before.leaks(grace=0) == []


def test_a_leaked_memfd_device_is_known_for_ours() -> None:
    before = leaks.Snapshot.take()
    with images.memfd() as fd:
        with bound(Path(f"/proc/{os.getpid()}/fd/{fd}")) as loop:
            (found,) = [each for each in before.leaks(grace=0) if "loop device" in each]
            assert found.startswith(f"loop device {loop.node} ({loop.diskseq}) on /memfd:")


def test_the_devices_of_others_are_left_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    # /var/tmp is where no test of ours puts files.
    image = images.make_sparse(Path(f"/var/tmp/loopd-not-a-test-{os.getpid()}"), 1 << 20)
    try:
        before = leaks.Snapshot.take([tmp_path_factory.getbasetemp().resolve()])
        with bound(image) as loop:
            assert before.leaks(grace=0) == []
            assert loops.loop_is_bound(loop.number, loop.diskseq)
    finally:
        image.unlink()


@pytest.mark.both_libraries
def test_the_parts_fit_together(daemon: Daemon, caller: Caller, area: Path) -> None:
    image = images.make_ext4(area / "image", label="together", owner="nobody")
    with daemon.same_fds():
        attached = caller.attach(image, read_only=True)
        assert loops.loop_is_bound(attached.number, attached.diskseq)
        assert caller.get_all(attached.path)["Owner"] == 65534
        caller.wait_signal("InterfacesAdded", lambda signal: signal.args[0] == attached.path)
        device = caller.open_device(attached.path, "r")
        assert images.ext4_label(device.read(2048)) == "together"
        caller.kill()
        loops.wait_unbound(attached.number, attached.diskseq)
