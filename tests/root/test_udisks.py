# SPDX-License-Identifier: LGPL-2.1-or-later
"""udisks2 beside loopd: who attached an image mounts it without a password, and nobody else does.

The real udisksd, polkitd and udevd, with our rules for the latter two; the sessions are made up.
"""

import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness import loops
from tests.harness import udisks as harness
from tests.harness.area import CHECKOUT, area
from tests.harness.bus import OUR_POLICY, POLKIT, POLKIT_POLICY
from tests.harness.caller import Attached, Caller
from tests.harness.images import MIB, make_ext4, make_gpt
from tests.harness.loopctl import Loopctl, copy_package
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.udev import Udev
from tests.harness.udisks import UDISKSD, Udisks
from tests.harness.wire import CallError, Variant
from tests.harness.world import OTHER, USER, World, make_world

POLKIT_FILES = CHECKOUT / "polkit"
ATTACH = rules_allowing(
    *(f"org.example.loop1.{each}" for each in ("attach", "manage-others", "open-read-only-device"))
)
MOUNT = "org.freedesktop.udisks2.filesystem-mount"
LOOP_CHANGE_FD = 0x4C06
NOT_AUTHORIZED = "org.freedesktop.UDisks2.Error.NotAuthorized"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    """Where loopd keeps its marks, and udev's rules look for them."""
    with area("run") as directory:
        yield directory


@pytest.fixture(scope="module")
def udev(runtime: Path) -> Iterator[Udev]:
    rules = {
        path.name: path.read_text().replace("/run/loopd/", f"{runtime}/")
        for path in (CHECKOUT / "systemd").glob("*.rules")
    }
    with Udev(rules) as running:
        yield running


@pytest.fixture(scope="module")
def shared(runtime: Path, udev: Udev) -> Iterator[World]:
    if not UDISKSD.exists():
        pytest.skip("udisks2 is not installed")
    with ExitStack() as stack:
        package = stack.enter_context(area("package"))
        program = (POLKIT_FILES / "image-owner").read_text()
        (package / "image-owner").write_text(program.replace("/run/loopd/", f"{runtime}/"))
        (package / "image-owner").chmod(0o755)
        rules = (POLKIT_FILES / "org.example.loop1.rules.in").read_text()
        yield stack.enter_context(
            make_world(
                authority=ATTACH + rules.replace("@packagedir@", str(package)),
                policies=[OUR_POLICY, POLKIT_POLICY, harness.POLICY],
                runtime_directory=runtime,
            )
        )


@pytest.fixture(scope="module")
def udisks(shared: World) -> Iterator[Udisks]:
    with Udisks(shared.bus) as running:
        yield running


@pytest.fixture
def world(shared: World, udisks: Udisks) -> Iterator[World]:
    with shared.test() as testing:
        yield testing


def authority(world: World) -> RealPolkit:
    assert isinstance(world.authority, RealPolkit)
    return world.authority


def log_in(world: World, user: str) -> Caller:
    """A caller in a session of its own, in front of which the user sits."""
    caller = world.caller(user)
    authority(world).log_in(caller.process)
    return caller


def attach(world: World, udev: Udev, caller: Caller, image: Path | None = None) -> Attached:
    """Attach a user's image, a filesystem if none is given, and let udev look at it."""
    attached = caller.attach(image or make_ext4(world.new_path(), label="theirs", owner=USER))
    udev.settle()
    return attached


@pytest.fixture(scope="module")
def fstab(shared: World, udisks: Udisks) -> Iterator[Path]:
    """The file that udisksd and polkitd take for /etc/fstab."""
    with area("fstab") as directory:
        path = directory / "fstab"
        path.touch()
        for process in (authority(shared).process, udisks.process):
            harness.cover(process, "/etc/fstab", path)
        yield path


@contextmanager
def losetup(image: Path) -> Iterator[str]:
    """A device that loopd has not made."""
    node = loops.losetup(image)
    try:
        yield node
    finally:
        subprocess.run(["losetup", "-d", node], check=True)


def mounts(udisks: Udisks, caller: Caller, node: str) -> bool:
    """Mount a device as somebody who may; say whether that is so."""
    try:
        udisks.mount(caller, node)
    except CallError as error:
        if not error.name.startswith(NOT_AUTHORIZED):
            raise
        return False
    return True


def refused(udisks: Udisks, caller: Caller, node: str) -> bool:
    """Whether somebody may not mount a device."""
    udisks.wait_filesystem(caller, node)
    if not mounts(udisks, caller, node):
        return True
    udisks.unmount(caller, node)
    return False


def test_who_attached_it_mounts_and_unmounts_it(world: World, udev: Udev, udisks: Udisks) -> None:
    user = log_in(world, USER)
    attached = attach(world, udev, user)
    udisks.wait_filesystem(user, attached.node)
    where = udisks.mount(user, attached.node)
    mounts = udisks.mounts()
    assert mounts[attached.node][0] == where
    assert {"nosuid", "nodev"} <= mounts[attached.node][1]
    with pytest.raises(CallError, match="DeviceBusy"):
        user.detach(attached.path)
    udisks.unmount(user, attached.node)
    assert attached.node not in udisks.mounts()
    user.detach(attached.path)


@pytest.mark.parametrize("partitions", [False, True])
def test_what_loopctl_has_attached_can_be_mounted_at_once(
    world: World, udev: Udev, udisks: Udisks, partitions: bool
) -> None:
    """Three times: udisksd often hears of it only milliseconds after udev is done."""
    user = log_in(world, USER)
    image = partitioned(world) if partitions else make_ext4(world.new_path(), owner=USER)
    with area("package") as directory:
        loopctl = Loopctl(world.bus, copy_package(directory), world.files)
        for _ in range(3):
            with loopctl.start("hold", *(["-P"] if partitions else []), image) as running:
                node = running.line() + ("p1" if partitions else "")
                udisks.mount(user, node)
                udisks.unmount(user, node)
                running.signal(signal.SIGTERM)
                assert running.end()[0] == 0


def test_a_partition_is_whose_the_disk_is(world: World, udev: Udev, udisks: Udisks) -> None:
    image = make_gpt(world.new_path(), owner=USER)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(world.new_path(), size=MIB).read_bytes())
    user = log_in(world, USER)
    attached = user.attach(image, partition_scan=True)
    udev.settle()
    node = f"{attached.node}p1"
    assert not refused(udisks, user, node)
    assert refused(udisks, log_in(world, OTHER), node)
    user.detach(attached.path)


def test_nobody_else_does(world: World, udev: Udev, udisks: Udisks) -> None:
    owner = log_in(world, USER)
    attached = attach(world, udev, owner)
    assert refused(udisks, log_in(world, OTHER), attached.node)
    # Nor the owner from elsewhere, such as by ssh, or while another user is at the screen.
    assert refused(udisks, world.caller(USER), attached.node)
    uid = pwd.getpwnam(USER).pw_uid
    authority(world).set_active(uid, active=False)
    assert refused(udisks, owner, attached.node)
    authority(world).set_active(uid, active=True)
    assert not refused(udisks, owner, attached.node)
    owner.detach(attached.path)


def allows(
    world: World, caller: Caller, device: str, action: str = f"{MOUNT}-system", **details: str
) -> bool:
    """Whether polkit says yes to what udisksd might ask."""
    subject = ("system-bus-name", {"name": Variant("s", caller.unique_name)})
    with world.bus.connect() as client:
        reply = client.call(
            "/org/freedesktop/PolicyKit1/Authority",
            f"{POLKIT}.Authority",
            "CheckAuthorization",
            "(sa{sv})sa{ss}us",
            [subject, action, details | {"device": device}, 0, ""],
            destination=POLKIT,
        )
    return bool(reply.body[0][0])


@pytest.mark.alone
def test_a_number_that_has_become_another_users_is_not_the_first_ones(
    world: World, udev: Udev
) -> None:
    """At once, whatever udev and udisksd have heard of it."""
    first, second = log_in(world, USER), log_in(world, OTHER)
    # Which nobody else on this machine is given meanwhile.
    number = 400_000 + os.getpid() % 50_000
    attached = first.attach(world.image(), number=number)
    udev.settle()
    assert allows(world, first, attached.node)
    assert not allows(world, second, attached.node)
    first.detach(attached.path)
    assert not allows(world, first, attached.node)
    again = second.attach(world.image(owner=OTHER), number=number)
    assert again.node == attached.node
    assert not allows(world, first, attached.node)
    udev.settle()
    assert not allows(world, first, attached.node)
    assert allows(world, second, attached.node)
    second.detach(again.path)


def test_nothing_but_a_mount_of_that_device_is_allowed(world: World, udev: Udev) -> None:
    user = log_in(world, USER)
    attached = user.attach(world.image())
    udev.settle()
    node = attached.node
    assert allows(world, user, node, f"{MOUNT}-other-seat")
    actions = ("filesystem-fstab", "modify-device-system", "encrypted-unlock-system")
    assert not any(allows(world, user, node, f"org.freedesktop.udisks2.{a}") for a in actions)
    names = ("", "loop", node[5:], f"{node}p", f"/dev/disk/../{node[5:]}", f"{node}\n", "/dev/sda1")
    assert not any(allows(world, user, name) for name in names)
    user.detach(attached.path)


def test_what_is_not_certain_is_not_allowed(world: World, udev: Udev, fstab: Path) -> None:
    """Lines of fstab."""
    user = log_in(world, USER)
    image = make_ext4(world.new_path(), owner=USER)
    attached = user.attach(image, read_only=True)
    # udev may not have looked yet, and has then.
    udev.settle()
    assert allows(world, user, attached.node)
    # By what udisksd still takes it for it would have found a line.
    for key in ("id.label", "id.uuid", "partition.name", "partition.uuid"):
        assert not allows(world, user, attached.node, **{key: "x"})
    assert allows(world, user, attached.node, **{"id.type": "ext4", "partition.number": "1"})
    # A name that is escaped could be any, and a file that polkitd may not read have any line.
    lines = "/dev/sda1 / ext4", "LABEL=a\\040b /b ext4", "server:/a\\040b /c nfs", "# /dev/a\\040b"
    fstab.write_text("\n".join([*lines, "//server/a\\040b /d cifs", "/srv/a\\040b /e none bind"]))
    assert allows(world, user, attached.node)
    # libmount, by which udisksd reads the file, knows any character in octal.
    hidden = [attached.node[:at] + f"\\{ord(attached.node[at]):03o}" for at in range(5)]
    names = [f"{each}{attached.node[at + 1 :]}" for at, each in enumerate(hidden)]
    for name in ("/dev/disk/by-label/a\\040b", *names):
        fstab.write_text(f"{name} /a ext4")
        assert not allows(world, user, attached.node), name
    fstab.write_text("")
    fstab.chmod(0o600)
    assert not allows(world, user, attached.node)
    fstab.chmod(0o644)
    # Another file, which its owner has put behind it.
    fd = user.open_device(attached.path, "r").fetch()
    try:
        with image.open("rb") as file:
            fcntl.ioctl(fd, LOOP_CHANGE_FD, file.fileno())
    finally:
        os.close(fd)
    assert not allows(world, user, attached.node)
    user.detach(attached.path)


def test_what_loopd_did_not_attach_for_a_user_is_left_to_udisks(
    world: World, udev: Udev, udisks: Udisks
) -> None:
    user = log_in(world, USER)
    assert refused(udisks, user, attach(world, udev, world.caller(None)).node)
    with losetup(make_ext4(world.new_path(), owner=USER)) as node:
        udev.settle()
        assert refused(udisks, user, node)


def partitioned(world: World) -> Path:
    """A disk whose only partition has a filesystem."""
    image = make_gpt(world.new_path(), [(2048, 8192)], 8 * MIB, owner=USER)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(make_ext4(world.new_path(), label="inside").read_bytes())
    return image


@contextmanager
def the_systems(image: Path, udev: Udev, suffix: str) -> Iterator[str]:
    """Root's device with the same names, for which the lines of fstab are; its node."""
    with losetup(image) as node:
        if suffix:
            subprocess.run(["addpart", node, "1", "2048", "8192"], check=True)
        udev.settle()
        yield f"{node}{suffix}"
        if suffix:
            subprocess.run(["delpart", node, "1"], check=True)
    udev.settle()


def names_of(properties: dict[str, str]) -> list[str]:
    """What the first field of a line of fstab can call a device, by what udev says of it."""
    tags = {
        "LABEL": ("ID_FS_LABEL", "by-label"),
        "UUID": ("ID_FS_UUID", "by-uuid"),
        "PARTLABEL": ("ID_PART_ENTRY_NAME", "by-partlabel"),
        "PARTUUID": ("ID_PART_ENTRY_UUID", "by-partuuid"),
    }
    found = []
    for tag, (key, directory) in tags.items():
        if value := properties.get(key):
            found += [f"{tag}={value}", f"/dev/disk/{directory}/{value}"]
    return found


@pytest.mark.parametrize("present", [False, True], ids=["absent", "present"])
@pytest.mark.parametrize("suffix", ["", "p1"], ids=["disk", "partition"])
def test_a_users_image_takes_no_line_of_fstab(
    world: World, udev: Udev, udisks: Udisks, fstab: Path, suffix: str, present: bool
) -> None:
    """Lines of fstab."""
    label = uuid.uuid4().hex[:16]
    image = partitioned(world) if suffix else make_ext4(world.new_path(), label=label, owner=USER)
    original = Path(shutil.copy(image, world.new_path()))
    with the_systems(original, udev, suffix) as system:
        names = names_of(udev.properties(system))
    assert len(names) == (8 if suffix else 4)
    user = log_in(world, USER)
    attached = user.attach(image, partition_scan=bool(suffix))
    udev.settle()
    node = f"{attached.node}{suffix}"
    device = os.stat(node).st_rdev
    udisks.wait_filesystem(user, node)
    with ExitStack() as stack:
        systems = 0
        if present:
            systems = os.stat(stack.enter_context(the_systems(original, udev, suffix))).st_rdev
        by_node = [node, *udev.links(node)]
        for name in names + by_node:
            fstab.write_text(f"# a comment\n{name} {world.new_path()} ext4 noauto,suid,dev 0 0\n")
            # The line of its node, which udisks2 takes it by, is not for the owner to use.
            assert mounts(udisks, user, node) is (name not in by_node)
            assert not udisks.mounts_of(systems)
            found = udisks.mounts_of(device)
            assert len(found) == (name not in by_node)
            for _, options in found:
                assert {"nosuid", "nodev"} <= options, name
                udisks.unmount(user, node)
    fstab.write_text("")
    user.detach(attached.path)


def test_nothing_of_it_shows_on_desktops(world: World, udev: Udev, udisks: Udisks) -> None:
    user = log_in(world, USER)
    attached = attach(world, udev, user)
    found = udisks.wait_filesystem(user, attached.node)
    assert (found["HintIgnore"], found["HintAuto"], found["HintSystem"]) == (True, False, True)
    # What root attaches does.
    root = world.caller(None)
    attached = attach(world, udev, root)
    found = udisks.wait_filesystem(user, attached.node)
    assert (found["HintIgnore"], found["HintAuto"], found["HintSystem"]) == (False, False, True)
