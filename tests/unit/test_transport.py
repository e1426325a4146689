# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of our end of the bus that need no bus; see tests/bus/test_transport.py for the others."""

import asyncio
import socket

from loopd.bus import codec, frame, transport
from tests.harness.asynchronous import run_async
from tests.unit.test_frame import with_sender

ENDLESS = 50_000
"""As many messages as nobody reads in the time of a slice."""


def test_a_sender_that_never_pauses_leaves_others_their_turn() -> None:
    """Transport rule 2 (reader): a bounded slice of reading, though there is always more."""

    async def body() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        message = with_sender(
            codec.serialize(codec.method_call(":1.1", "/a", "b.c", "D", "", [], serial=5))
        )
        count, came = 0, asyncio.Event()

        def take(_: frame.Frame) -> None:
            # Before it is dealt with the next one is there.
            nonlocal count
            count += 1
            came.set()
            if count < ENDLESS:
                theirs.send(message)

        connection = transport.Connection(
            ours, max_message=1 << 16, on_call=take, on_signal=take, on_lost=print
        )
        theirs.send(message)
        await came.wait()
        assert count < ENDLESS
        came.clear()
        await came.wait()  # it goes on after the others
        connection.close()
        theirs.close()

    run_async(body())
