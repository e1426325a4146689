# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m bench.hostile [MESSAGES]`: what hostile messages leave behind, 100,000 by default.

Messages of all kinds that the tests make up, each some times with fds of several sorts, by
clients that come and go, under each D-Bus library; half of them with our bus policy in front.
Ends with a failure unless loopd then has the fds, the devices and the memory that it had after the
first tenth of them, and serves others all the time.
"""

import argparse
import os
import random
import time
from contextlib import ExitStack, suppress

import hypothesis

from tests.harness import leaks, loops
from tests.harness.caller import MANAGER, MANAGER_PATH
from tests.harness.daemon import LIBRARIES
from tests.harness.images import memfd
from tests.harness.messages import Packet, packets
from tests.harness.polkit import Answer
from tests.harness.raw import BUS, DisconnectedError, RawClient
from tests.harness.wire import METHOD_RETURN, CallError
from tests.harness.world import OTHER, USER, World, make_world

NOT_OURS = ("org.example.loop1.manage-others", "org.example.loop1.open-others-device")
KINDS = 3000
"""Different messages."""
PER_CLIENT = 400
"""Messages before a client leaves, if the bus keeps it that long."""
RUDE = 0.01
"""The share of those for which the bus may close the connection."""
MEMORY = 2 << 20
"""Bytes that the heap may differ by."""

Made = tuple[list[Packet], list[Packet]]


def main() -> None:
    """Send so many under each library and each policy, and say what was left."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__)
    parser.add_argument("messages", type=int, nargs="?", default=100_000)
    share = parser.parse_args().messages // (len(LIBRARIES) * 2)
    leaks.adopt_orphans()
    made = make_up(KINDS, polite=True), make_up(KINDS, polite=False)
    for library in LIBRARIES:
        for policy in ("our policy", "no policy"):
            options = {} if policy == "our policy" else {"policies": []}
            with make_world(library=library, **options) as world, world.test():
                for action in NOT_OURS:
                    world.polkit.on(action, Answer.DENY)
                print(f"{library}, {policy}: {attack(world, made, share)}", flush=True)


def make_up(count: int, *, polite: bool) -> list[Packet]:
    """Have hypothesis make up so many messages, `polite` ones for which the bus stays."""
    found: list[Packet] = []

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(packets(polite=polite))
    def run(packet: Packet) -> None:
        found.append(packet)

    run()
    return found


def attack(world: World, made: Made, count: int) -> str:
    """Send them, and fail if anything is left; say how it went."""
    chance = random.Random(1)
    begun = time.monotonic()
    with ExitStack() as stack:
        fds = [stack.enter_context(memfd(64 * 1024)) for _ in range(2)]
        for path, flags in ((world.image(), os.O_RDWR), ("/proc/self/status", os.O_RDONLY)):
            fds.append(os.open(path, flags | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        witness = stack.enter_context(world.bus.connect(OTHER))
        sent, waits, lost = 0, [0.0], 0
        warm = count // 10
        memory = 0
        while sent < count:
            if sent >= warm and not memory:
                memory = at_rest(world)
            with world.bus.connect(USER) as client:
                try:
                    sent += one_client(client, made, fds, chance)
                except DisconnectedError:
                    lost += 1
                    sent += 1
            asked = time.monotonic()
            # The bus itself refuses everybody while its queue to loopd is full of fds.
            while served(witness) == BUS:
                pass
            waits.append(time.monotonic() - asked)
        grown = at_rest(world) - memory
    if grown > MEMORY:
        raise AssertionError(f"loopd has {grown} bytes more than after {warm} messages")
    return (
        f"{sent} messages in {time.monotonic() - begun:.0f} s, {lost} connections closed by the "
        f"bus; others waited for {max(waits) * 1000:.0f} ms at most; {grown / 1024:+.0f} KiB of "
        "memory, no fd and no device more"
    )


def one_client(client: RawClient, made: Made, fds: list[int], chance: random.Random) -> int:
    """Send what one client sends before it leaves; return how much that was."""
    device = "/"
    with suppress(CallError):
        attached = client.call(MANAGER_PATH, MANAGER, "Attach", "ha{sv}", [0, {}], fds=fds[:1])
        device = str(attached.body[0])
        loops.used_numbers.add(int(str(attached.body[1]).removeprefix("/dev/loop")))
    polite, rude = made
    count = chance.randint(1, PER_CLIENT)
    for _ in range(count):
        # What the bus closes the connection for is interesting, too, but not always.
        packet = chance.choice(rude if chance.random() < RUDE else polite)
        passed = [chance.choice(fds) for _ in range(packet.fds)]
        client.send_bytes(packet.data(client.next_serial(), device), passed)
        for message in client.drain():
            for fd in message.fds:
                os.close(fd)
    return count


def served(client: RawClient) -> str | None:
    """Call as somebody else; return who has answered, which loopd does well."""
    reply = client.reply(client.send(MANAGER_PATH, MANAGER, "ListDevices"))
    assert reply.type == METHOD_RETURN or reply.sender == BUS, reply
    return reply.sender


def at_rest(world: World) -> int:
    """Wait until nothing is left, and return the memory in use."""
    world.wait_devices(0)
    world.wait_idle_fds()
    return world.daemon.rss()


if __name__ == "__main__":
    main()
