# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a connection is let in, by a bus that says what it should, and by one that does not."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopd import errors
from loopd.bus import dial


@contextmanager
def listening(directory: Path, answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A bus that answers one connection so; yields its address."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "bus"))
        listener.listen()
        listener.settimeout(20)

        def serve() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(20)
                answer(accepted)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"unix:path={directory}/bus"
        finally:
            thread.join()


def asked(bus: socket.socket) -> bytes:
    """What the client says before it is answered."""
    said = b""
    while not said.endswith(b"BEGIN\r\n"):
        said += bus.recv(4096)
    return said


@pytest.mark.parametrize("fds", [True, False])
def test_fds_are_asked_for_where_they_are_wanted(tmp_path: Path, fds: bool) -> None:
    """Transport rule 15 (every connection)."""
    said: list[bytes] = []

    def answer(bus: socket.socket) -> None:
        said.append(asked(bus))
        bus.sendall(b"DATA\r\nOK " + b"0" * 32 + b"\r\n" + b"AGREE_UNIX_FD\r\n" * fds)

    with listening(tmp_path, answer) as address:
        dial.connect(address, fds=fds).close()
    assert (b"NEGOTIATE_UNIX_FD" in said[0]) == fds
    assert said[0].startswith(b"\0AUTH EXTERNAL\r\n")  # no uid, which a user namespace makes wrong


def test_a_bus_that_talks_without_end_is_left(tmp_path: Path) -> None:
    """Before it has said more than a page, and not when it has taken too long."""

    def answer(bus: socket.socket) -> None:
        asked(bus)
        bus.sendall(b"OK " + b"0" * 5000)
        assert bus.recv(1) == b""  # the client leaves first

    with (
        listening(tmp_path, answer) as address,
        pytest.raises(errors.BusError, match="ended the authentication"),
    ):
        dial.connect(address)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (b"REJECTED EXTERNAL\r\n\r\n", "refused the authentication"),
        (b"DATA\r\nREJECTED EXTERNAL\r\nERROR\r\n", "refused the authentication"),
        (b"OK 0\r\nERROR no fds\r\n\r\n", "refused the authentication"),
        (b"DATA\r\nOK 0\r\nERROR no \xff\x1b fds\r\n", "passes no file descriptors"),
    ],
)
def test_a_bus_that_refuses_is_left(tmp_path: Path, words: bytes, why: str) -> None:
    def answer(bus: socket.socket) -> None:
        asked(bus)
        bus.sendall(words)

    with (
        listening(tmp_path, answer) as address,
        pytest.raises(errors.BusError, match=why) as caught,
    ):
        dial.connect(address)
    assert str(caught.value).isprintable()
