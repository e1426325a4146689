# SPDX-License-Identifier: LGPL-2.1-or-later
"""The main job, shown: an ordinary user's program gets a loop device, and cannot leak it.

Run by `make demo`. The bus is a private one, everything else is real: dbus-daemon, polkitd, loopd,
the loop devices of this machine. Each step says what was seen and how long it took; the first that
is not so ends the demo with a non-zero exit.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.harness import images, loops
from tests.harness.area import area
from tests.harness.bus import PrivateBus
from tests.harness.caller import Attached, Caller
from tests.harness.daemon import Daemon
from tests.harness.polkit import RealPolkit, rules_allowing
from tests.harness.wire import CallError

USER = "nobody"
OTHER = "games"
LABEL = "holiday-photos"
MIB = 1 << 20
ACTIONS = ("org.example.loop1.attach", "org.example.loop1.open-device")


class NotSoError(Exception):
    """What should have been seen was not."""


class Step:
    """One line of the demo: what is done, and then what was seen."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen = ""

    def saw(self, what: str) -> None:
        """Note what was seen."""
        self._seen = what

    def expect(self, true: bool, otherwise: str) -> None:
        """End the demo unless it is so."""
        if not true:
            raise NotSoError(f"{self._what}: {otherwise}")

    def line(self, seconds: float) -> str:
        """What to print."""
        return f"{seconds * 1000:8.1f} ms  {self._what}: {self._seen}"


@contextmanager
def step(what: str) -> Iterator[Step]:
    """Time what happens in the block, and print it."""
    this = Step(what)
    begun = time.perf_counter()
    yield this
    print(this.line(time.perf_counter() - begun), flush=True)


def main() -> int:
    """Run the steps; the exit status."""
    logging.basicConfig(level=logging.WARNING)
    try:
        with ExitStack() as stack:
            show(stack)
    except (NotSoError, OSError, TimeoutError) as exc:
        print(f"NOT SO: {exc}", file=sys.stderr)
        return 1
    print("All of it was so.")
    return 0


def show(stack: ExitStack) -> None:
    """The steps, each on what the ones before have left in `stack`."""
    directory = stack.enter_context(area("demo"))
    with step("a bus of our own") as this:
        bus = stack.enter_context(PrivateBus())
        this.saw(f"dbus-daemon, pid {bus.pid}")
    with step("polkit, with one rule") as this:
        polkit = stack.enter_context(RealPolkit(bus, rules_allowing(*ACTIONS, users=(USER,))))
        this.saw(f"polkitd, pid {polkit.pid}; {USER} may attach files and open what it attached")
    with step("loopd") as this:
        daemon = stack.enter_context(Daemon(bus))
        this.saw(f"pid {daemon.pid}, from start to its name on the bus")
    with step(f"an ext4 image, of {USER}'s own") as this:
        image = images.make_ext4(directory / "disk.img", 8 * MIB, label=LABEL, owner=USER)
        this.saw(f"{image.stat().st_size // MIB} MiB, label {LABEL!r}")
    client = stack.enter_context(Caller(bus, user=USER))
    attached = use(client, image)
    refuse(bus, attached)
    die(client, bus, attached)


def use(client: Caller, image: Path) -> Attached:
    """What the ordinary user's program does with its image."""
    with step(f"{USER} attaches it") as this:
        attached = client.attach(image)
        loop = loops.look_at(attached.number)
        this.expect(loop is not None, f"{attached.node} is not bound")
        this.expect(client.get_all(attached.path)["Owner"] != 0, "the owner is root")
        this.saw(f"{attached.node}, diskseq {attached.diskseq}, object {attached.path}")
    with step("and reads the label through an fd of the device") as this:
        try:
            client.open(attached.node, os.O_RDONLY)
        except PermissionError:
            pass
        else:
            this.expect(False, f"{USER} could open {attached.node} itself")
        fd = client.open_device(attached.path, "r")
        label = images.ext4_label(fd.read(2048))
        fd.close()
        this.expect(label == LABEL, f"the label is {label!r}")
        this.saw(f"{label!r}; opening {attached.node} itself is refused to {USER}")
    with step("grows the file and resizes") as this:
        client.evaluate("os.truncate(path, size)", path=str(image), size=16 * MIB)
        size = client.resize(attached.path)
        this.expect(size == 16 * MIB, f"the device has {size} bytes")
        signal = client.wait_signal("PropertiesChanged", lambda each: "Size" in each.args[1])
        this.expect(signal.args[1]["Size"] == size, f"the signal says {signal.args[1]}")
        this.saw(f"{size // MIB} MiB, and a PropertiesChanged signal with it")
    return attached


def refuse(bus: PrivateBus, attached: Attached) -> None:
    """What another user's program gets."""
    with step(f"{OTHER} tries to detach it") as this, Caller(bus, user=OTHER) as other:
        try:
            other.detach(attached.path)
        except CallError as exc:
            this.saw(exc.name)
        else:
            this.expect(False, "it was allowed")
        this.expect(loops.loop_is_bound(attached.number), "it is gone")


def die(client: Caller, bus: PrivateBus, attached: Attached) -> None:
    """What is left when the client is gone."""
    with step(f"{USER}'s program is killed with -9") as this:
        client.kill()
        loops.wait_unbound(attached.number, attached.diskseq)
        this.saw(f"{attached.node} is gone")
    with step("loopd goes on") as this:
        with Caller(bus, user=USER) as next_client:
            (devices,) = next_client.manager("ListDevices")
        this.expect(attached.path not in [row[0] for row in devices], "it lists the device still")
        this.saw("and lists it no more")


if __name__ == "__main__":
    sys.exit(main())
