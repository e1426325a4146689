# SPDX-License-Identifier: LGPL-2.1-or-later
"""What lives beside loopd on a whole system: udisks2 with real sessions, busctl from a shell."""

from collections.abc import Callable

from tests.harness import loops
from tests.harness.area import CHECKOUT
from tests.harness.booted import Machine
from tests.harness.images import make_ext4
from tests.harness.logins import Login, Stranger

SCRIPT = "/run/devices.sh"


def says(caller: Stranger, command: str) -> tuple[int, str]:
    """Run a command as the caller; return its status and what it printed."""
    status, output = caller.evaluate(
        "__import__('subprocess').getstatusoutput(command)", command=command
    )
    return int(status), str(output)


def udisksctl(caller: Stranger, verb: str, node: str) -> tuple[int, str]:
    return says(caller, f"udisksctl {verb} --no-user-interaction --block-device={node}")


def may_mount(caller: Stranger, node: str) -> bool:
    """Whether the caller can; what was mounted is unmounted."""
    status, output = udisksctl(caller, "mount", node)
    if status != 0:
        assert "NotAuthorized" in output
        return False
    status, output = udisksctl(caller, "unmount", node)
    assert status == 0, output
    return True


def test_who_attached_it_and_sits_at_the_machine_mounts_it(
    machine: Machine, login: Callable[..., Login], stranger: Callable[..., Stranger]
) -> None:
    alice = login("alice")
    attached = alice.attach(machine.image("fs.img", make_ext4, owner="alice"))
    machine.run("udevadm", "settle")
    status, output = udisksctl(alice, "mount", attached.node)
    assert status == 0, output
    options = machine.run("findmnt", "--noheadings", "--output=OPTIONS", attached.node)
    assert {"nosuid", "nodev"} <= set(options.strip().split(","))
    assert udisksctl(alice, "unmount", attached.node)[0] == 0
    # From elsewhere, and outside of any session, the same user may not; nor may another.
    afar = login("alice", seat=False)
    assert not may_mount(afar, attached.node)
    # polkit takes a user for active who is in any session; one without a seat always is.
    afar.close()
    assert not may_mount(stranger("bob"), attached.node)
    bob = login("bob")
    machine.run("loginctl", "activate", bob.session)
    assert not may_mount(bob, attached.node)
    # Nor may alice while bob sits there.
    assert not may_mount(alice, attached.node)
    machine.run("loginctl", "activate", alice.session)
    assert may_mount(alice, attached.node)
    alice.detach(attached.path)


def test_busctl_attaches_where_it_can_pass_a_file(machine: Machine, alice: Login) -> None:
    machine.write(SCRIPT, (CHECKOUT / "examples" / "devices.sh").read_text())
    image = machine.image("disk.img", make_ext4, owner="alice")
    status, output = says(alice, f"sh {SCRIPT} attach {image}")
    if machine.release.systemd < 257:
        assert (status, output.split(":")[0]) == (1, "devices.sh")
        return
    assert status == 0, output
    number = int(output.removeprefix("/dev/loop"))
    size = image.stat().st_size
    assert f"{output} {size} 1000 user" in says(alice, f"sh {SCRIPT} list")[1].splitlines()
    assert says(alice, f"sh {SCRIPT} detach {output}") == (0, "")
    loops.wait_unbound(number)


def test_udisks2_mounts_at_once_what_loopctl_has_attached(machine: Machine, alice: Login) -> None:
    image = machine.image("ready.img", make_ext4, owner="alice")
    for _ in range(8):
        node = alice.run("loopctl", "attach", str(image)).strip()
        status, output = udisksctl(alice, "mount", node)
        assert status == 0, output
        assert udisksctl(alice, "unmount", node)[0] == 0
        alice.run("loopctl", "detach", node)


def test_roots_links_are_there_when_loopctl_returns(machine: Machine) -> None:
    image = machine.image("links.img", make_ext4, owner="root")
    for turn in range(8):
        name = f"ready{turn}"
        attach = f"node=$(loopctl attach --loop-ref={name} {image}) && echo $node"
        find = f"readlink --canonicalize /dev/disk/by-loop-ref/{name}"
        said = machine.run("sh", "-c", f"{attach} && {find} && loopctl detach $node")
        node, found = said.split()
        assert found == node
