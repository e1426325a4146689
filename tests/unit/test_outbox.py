# SPDX-License-Identifier: LGPL-2.1-or-later
"""What waits for a slow bus: in which order it goes."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

from loopd.bus.outbox import Outbox
from tests.harness.asynchronous import run_async

SIZE = 1000


@contextmanager
def full(whose: Callable[[str], str] = str) -> Iterator[tuple[Outbox, Callable[[], str]]]:
    """An outbox whose socket is full, and what reads the rest of it, a letter for each message."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        outbox = Outbox(ours, on_error=lambda why: None, whose=whose)
        while not outbox._waits:
            outbox.put(b"." * SIZE, (), ":1.0")

        def read() -> str:
            data = b""
            while outbox._queue:
                try:
                    data += theirs.recv(1 << 20)
                except BlockingIOError:
                    outbox._writable()
            data += theirs.recv(1 << 20)
            return "".join(letter for letter, _ in groupby(data.decode().lstrip(".")))

        yield outbox, read
        outbox.close()


def send(outbox: Outbox, *letters: str) -> None:
    """Send a message of each letter, to the destination of that letter; capitals to everyone."""
    for letter in letters:
        destination = "" if letter.isupper() else f":1.{letter}"
        outbox.put(letter.encode() * SIZE, (), destination)


def test_a_user_of_many_connections_gets_no_more_than_one_of_one() -> None:
    """What a user gets goes by turns, and not what a connection gets."""

    async def body() -> None:
        with full(whose=lambda name: "x" if name == ":1.x" else "crowd") as (outbox, read):
            for letter in "abcdefghij" * 3:
                send(outbox, letter)
            send(outbox, "x")
            assert read().index("x") <= 1

    run_async(body())


def test_who_gets_little_does_not_wait_for_all_that_another_gets() -> None:
    """Within the limits."""

    async def body() -> None:
        with full() as (outbox, read):
            outbox.put(b"a" * SIZE * 100, (), ":1.a")
            for number in range(20):
                outbox.put(bytes([65 + 32 + number % 2]) * SIZE, (), ":1.a")
            send(outbox, "x", "y")
            told = read()
            assert told.index("x") <= 2
            assert told.index("y") <= 3

    run_async(body())


def test_each_of_two_gets_as_many_bytes() -> None:
    async def body() -> None:
        with full() as (outbox, read):
            send(outbox, *"aaaaa", *"bbbbb")
            assert sorted(read()[:4]) == ["a", "a", "b", "b"]

    run_async(body())


def test_what_is_for_everyone_stays_between_what_came_before_and_after() -> None:
    """Signals come before the answers that follow them, and after those that went before."""

    async def body() -> None:
        with full() as (outbox, read):
            send(outbox, *"aaaa", "X", *"aaaa", "b", "Y", "c")
            told = read()
            assert told.index("X") < told.index("b") < told.index("Y") < told.index("c")
            assert told[: told.index("X")] == "a"

    run_async(body())


def test_what_goes_to_one_stays_in_its_order() -> None:
    async def body() -> None:
        with full() as (outbox, read):
            for letter in "abcdefgh":
                outbox.put(letter.encode() * SIZE, (), ":1.1")
                outbox.put(letter.upper().encode() * 10 * SIZE, (), ":1.2")
            told = read()
            assert "".join(each for each in told if each.islower()) == "abcdefgh"
            assert "".join(each for each in told if each.isupper()) == "ABCDEFGH"

    run_async(body())


def test_nothing_is_remembered_of_those_who_wait_for_nothing() -> None:
    async def body() -> None:
        with full() as (outbox, read):
            send(outbox, *"aabbcc")
            read()
            await asyncio.sleep(0)
            assert (outbox._places, [*outbox._queued]) == ({}, [])

    run_async(body())
