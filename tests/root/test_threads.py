# SPDX-License-Identifier: LGPL-2.1-or-later
"""A load takes threads, and leaves none behind."""

from contextlib import ExitStack

from tests.harness.deadline import Deadline
from tests.harness.world import real_world

CLIENTS = 32
IDLE = 0.3
PRELUDE = f"""
from loopd.daemon import pool
pool._IDLE = {IDLE}
"""
"""Nobody waits for the 10 seconds that it is otherwise."""


def test_after_a_load_loopd_has_as_few_threads_as_before() -> None:
    """Within the limits."""
    with real_world(prelude=PRELUDE) as world, world.test(), ExitStack() as stack:
        clients = [stack.enter_context(world.bus.connect()) for _ in range(CLIENTS)]
        before = world.daemon.threads()
        files = [stack.enter_context(world.image().open("r+b")) for _ in clients]
        manager = "/org/example/Loop1", "org.example.Loop1"
        most = before

        def call_all(calls: list[tuple[object, ...]]) -> list[object]:
            nonlocal most
            serials = [
                client.send(*call, fds=[file.fileno()])
                for client, file, call in zip(clients, files, calls, strict=True)
            ]
            most = max(most, world.daemon.threads())
            replies = []
            for client, serial in zip(clients, serials, strict=True):
                replies.append(client.reply(serial))
                most = max(most, world.daemon.threads())
            return [reply.body[0] for reply in replies]

        for _ in range(3):
            call_all([(*manager, "Attach", "ha{sv}", [0, {}])] * CLIENTS)
            call_all([(*manager, "Detach", "ha{sv}", [0, {}])] * CLIENTS)
        assert most >= before + 8
        deadline = Deadline()
        # Each look is paced by an answer; this takes no thread.
        while (left := world.daemon.threads()) > before:
            assert deadline.remaining, left
            clients[0].call("/org/example/Loop1", "org.freedesktop.DBus.Peer", "Ping")
