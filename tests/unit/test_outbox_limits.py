# SPDX-License-Identifier: LGPL-2.1-or-later
"""A queue of messages that is full: what is dropped, and that nobody waits for it."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loopd.bus import outbox
from loopd.bus.outbox import Outbox

SHARE, ALL = 1000, 2500


def story(
    monkeypatch: pytest.MonkeyPatch, body: Callable[[Outbox], Coroutine[Any, Any, None]]
) -> None:
    """Run a test's coroutine with an outbox that takes little, and whose socket is full."""
    monkeypatch.setattr(outbox, "_MAX_QUEUED_PER_DESTINATION", SHARE)
    monkeypatch.setattr(outbox, "_MAX_QUEUED", ALL)

    async def run() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            box = Outbox(ours, pytest.fail)
            while box.put(b"x" * SHARE, (), "", soon=False).done():
                pass
            # What waits for the socket is small, so that the shares are the destinations'.
            box._queue[0].data = box._queue[0].data[:1]
            box._queued[""] = 1
            await asyncio.wait_for(body(box), 20)
            box.close()

    asyncio.run(run())


def test_a_message_beyond_its_destinations_share_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transport rule 5 (reply fds): else the fds of an answer would be kept for ever."""

    async def body(box: Outbox) -> None:
        kept = box.put(b"x" * SHARE, [0], ":1.7")
        dropped = box.put(b"x", [0], ":1.7")
        other = box.put(b"x", [0], ":1.8")
        assert dropped.cancelled()
        assert not kept.done()
        assert not other.done()

    story(monkeypatch, body)


def test_messages_of_who_fills_the_queue_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transport rule 5 (reply fds)."""

    async def body(box: Outbox) -> None:
        filler = [box.put(b"x" * 500, [0], ":1.7") for _ in range(2)]
        others = [box.put(b"x" * 800, [0], name) for name in (":1.8", ":1.9")]
        assert all(each.cancelled() for each in filler)
        assert not any(each.done() for each in others)

    story(monkeypatch, body)


def test_what_waits_at_the_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(box: Outbox) -> None:
        waiting = box.put(b"x", [0], ":1.7")
        box.close()
        assert waiting.cancelled()

    story(monkeypatch, body)
