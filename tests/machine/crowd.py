# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices of every kind at once, and whether they still are what they were."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.harness import loops
from tests.harness.booted import Machine
from tests.harness.caller import DEVICE, Attached, RemoteFd
from tests.harness.images import make_plain
from tests.harness.logins import Login, Stranger
from tests.harness.unit import Unit

REMOVED = "InterfacesRemoved"
CROWD_FDS = 8
"""How many fds of a Crowd systemd keeps: six devices, a lock and a Hold."""


@dataclass(kw_only=True)
class Crowd:
    """What three users have, and how to tell whether it is still the same."""

    unit: Unit
    alice: Login
    carol: Login
    root: Stranger
    connection: Attached
    """Of alice's connection, with partitions, an exclusive lock and a Hold."""
    bare: Attached
    """Of alice's connection, and nothing besides."""
    user: Attached
    """Of alice, for as long as she is logged in."""
    carols: Attached
    """Of carol's connection."""
    kept: Attached
    """Carol's, that stays."""
    roots: Attached
    """Root's, that stays."""
    hold: RemoteFd
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def staying(self) -> list[Attached]:
        """Those of lifetime `system`."""
        return [self.kept, self.roots]

    @property
    def leaving(self) -> list[Attached]:
        """The others."""
        return [self.connection, self.bare, self.user, self.carols]

    def look(self) -> dict[str, Any]:
        """Return all that loopd says of the devices that it manages, by path."""
        objects = self.root.managed_objects().items()
        return {path: each[DEVICE] for path, each in objects if each[DEVICE]["Managed"]}

    def require_unchanged(self) -> None:
        """Fail unless everything is as it was when all had been attached."""
        assert changes(self.before, self.look()) == {}
        assert not is_free(self.connection)
        assert is_free(self.bare)
        assert not self.hold.evaluate("__import__('select').select([fd], [], [], 0)[0]")
        for caller in (self.alice, self.carol):
            removed = [each.args[0] for each in caller.sync_signals() if each.member == REMOVED]
            assert not self.before.keys() & removed

    def disperse(self) -> None:
        """Have everybody leave, and see every device end as it should."""
        self.alice.kill()
        self.carol.close()
        for attached in self.leaving:
            loops.wait_unbound(attached.number, attached.diskseq)
        self.require_kept()

    def require_kept(self, *, partitions: bool = True) -> None:
        """Fail unless the devices that stay are there as they were; detach them.

        Without `partitions`, they may have lost those: when the last one closes a device who could
        write to it, udev has the kernel read the table again, for which not each has the parser.
        """
        staying = {each.path: self.before[each.path] for each in self.staying}
        # The kernel may have let go of the others a moment before loopd hears of it.
        self.unit.wait(lambda: self.look().keys() == staying.keys(), "the others to be gone")
        different = changes(staying, self.look())
        if not partitions:
            different.pop(f"{self.kept.path} Partitions", None)
        assert different == {}
        with Stranger(self.root.machine, "carol") as carol:
            assert carol.detach(self.kept.path)
        assert self.root.detach(self.roots.path)
        for attached in self.staying:
            loops.wait_unbound(attached.number, attached.diskseq)


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what is not as it was, by path and property."""
    found: dict[str, Any] = {}
    for path in before.keys() | now.keys():
        old, new = before.get(path, {}), now.get(path, {})
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                found[f"{path} {name}"] = (old.get(name), new.get(name))
    return found


def is_free(attached: Attached) -> bool:
    """Say whether nobody has locked a device."""
    fd = os.open(attached.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


@contextmanager
def foreign(machine: Machine) -> Iterator[loops.BoundLoop]:
    """Have a device that is none of loopd's, which has to stay as it is."""
    file = machine.image("foreign.img", make_plain, owner="root")
    node = machine.run("losetup", "--find", "--show", file).strip()
    loop = loops.look_at(int(node.removeprefix("/dev/loop")))
    assert loop
    try:
        yield loop
        assert loops.look_at(loop.number) == loop
    finally:
        loops.detach_leaked(loop)


def gather(
    machine: Machine,
    unit: Unit,
    login: Callable[..., Login],
    stranger: Callable[..., Stranger],
) -> Crowd:
    """Have three users attach something of every kind."""

    def image(name: str, owner: str) -> Any:
        return machine.image(f"{name}.img", owner=owner)

    alice, carol, root = login("alice"), login("carol", seat=False), stranger("root")
    connection = alice.attach(image("connection", "alice"), partition_scan=True, lock="exclusive")
    (hold,) = alice.device(connection.path, "Hold", "a{sv}", {})
    crowd = Crowd(
        unit=unit,
        alice=alice,
        carol=carol,
        root=root,
        connection=connection,
        hold=hold,
        bare=alice.attach(image("bare", "alice"), mode="r", reference="bare"),
        user=alice.attach(image("user", "alice"), lifetime="user", sector_size=4096),
        carols=carol.attach(image("carols", "carol"), partition_scan=True),
        kept=carol.attach(image("kept", "carol"), lifetime="system", partition_scan=True),
        roots=root.attach(image("roots", "root"), lifetime="system", offset=512),
    )
    crowd.before = crowd.look()
    assert len(crowd.before) == 6
    assert unit.stored == CROWD_FDS
    crowd.require_unchanged()
    return crowd
