# SPDX-License-Identifier: LGPL-2.1-or-later
"""The byte stream cut into messages: whatever the pieces, whoever sends."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopd import codec, frame

CAP = 4096


def call(serial: int, text: str = "", fds: int = 0) -> bytes:
    """A whole method call with a string for a body."""
    message = codec.method_call(
        "org.example.Loop1", "/a", "b.c", "D", "s", [text], serial=serial, fds=[0] * fds
    )
    message.sender = ":1.7"
    return with_sender(codec.serialize(message))


def with_sender(data: bytes) -> bytes:
    """Add the field that only a bus may write."""
    (fields,) = struct.unpack_from("<I", data, 12)
    end = 16 + fields
    body = data[(end + 7) & ~7 :]
    added = data[16:end]
    added += bytes(-len(added) % 8) + b"\x07\x01s\0" + struct.pack("<I", 4) + b":1.7\0"
    header = data[:12] + struct.pack("<I", len(added)) + added
    return header + bytes(-len(header) % 8) + body


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def test_a_header_is_read_to_the_last_field() -> None:
    data = call(9, fds=2)
    (incoming,) = frame.Reader(CAP).feed(data, [])
    assert incoming.header == frame.Header(
        type=frame.METHOD_CALL,
        flags=0,
        serial=9,
        path="/a",
        interface="b.c",
        member="D",
        destination="org.example.Loop1",
        sender=":1.7",
        signature="s",
        unix_fds=2,
    )
    assert incoming.data == data


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_messages_come_out_whole_and_in_order_however_they_are_cut(
    texts: list[str], cuts: list[int]
) -> None:
    """Transport rule 2 (reader)."""
    messages = [call(serial, text) for serial, text in enumerate(texts, 1)]
    reader = frame.Reader(CAP)
    seen = [one for piece in pieces(b"".join(messages), cuts) for one in reader.feed(piece, [])]
    assert [one.data for one in seen] == messages


@given(cuts=st.lists(st.integers(0, 10_000), max_size=10), size=st.integers(CAP, 3 * CAP))
def test_a_message_over_the_cap_is_judged_by_its_header_and_the_next_one_is_whole(
    cuts: list[int], size: int
) -> None:
    """Transport rule 2 (reader)."""
    data = call(1, "x" * size) + call(2, "next")
    reader = frame.Reader(CAP)
    large, following = (one for piece in pieces(data, cuts) for one in reader.feed(piece, []))
    assert large.data == b""
    assert large.header is not None
    assert (large.header.sender, large.header.serial) == (":1.7", 1)
    assert following.data == call(2, "next")


def test_fds_belong_to_the_message_begun_last() -> None:
    first, second, third = call(1), call(2, fds=2), call(3)
    reader = frame.Reader(CAP)
    assert [one.fds for one in reader.feed(first + second, [5, 6])] == [[], [5, 6]]
    # Begun in one piece, complete in the next.
    assert [one.fds for one in reader.feed(first + second[:30], [7, 8])] == [[]]
    assert [one.fds for one in reader.feed(second[30:] + third, [])] == [[7, 8], []]


def test_fds_of_a_message_over_the_cap_stay_with_it() -> None:
    large = call(1, "x" * CAP, fds=1)
    reader = frame.Reader(CAP)
    assert reader.feed(large[:100], [5]) == []
    skipped, following = reader.feed(large[100:] + call(2), [])
    assert (skipped.data, skipped.fds) == (b"", [5])
    assert following.fds == []


def test_lost_fds_are_told_with_their_message() -> None:
    """Transport rule 2 (reader)."""
    reader = frame.Reader(CAP)
    data = call(1, fds=1)
    assert reader.feed(data[:50], [], fds_lost=True) == []
    (incoming, following) = reader.feed(data[50:] + call(2), [])
    assert (incoming.fds_lost, following.fds_lost) == (True, False)


def test_fds_of_a_message_that_never_completes_can_be_taken_back() -> None:
    reader = frame.Reader(CAP)
    assert reader.feed(call(1, fds=1)[:50], [5]) == []
    assert reader.take_fds() == [5]
    assert reader.take_fds() == []


def test_a_header_that_cannot_be_read_costs_its_message_only() -> None:
    """Transport rule 2 (reader)."""
    broken = bytearray(call(1))
    broken[17:20] = b"\x01(\0"  # the first field's type
    reader = frame.Reader(CAP)
    bad, good = reader.feed(bytes(broken) + call(2), [])
    assert bad.header is None
    assert good.data == call(2)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"l\x01\0\x02" + bytes(12)])
def test_what_is_no_message_ends_the_stream(data: bytes) -> None:
    with pytest.raises(frame.MalformedStream):
        frame.Reader(CAP).feed(data, [])


def test_a_length_beyond_what_d_bus_allows_ends_the_stream() -> None:
    with pytest.raises(frame.MalformedStream):
        frame.Reader(CAP).feed(b"l\x01\0\x01" + b"\xff" * 12, [])


@given(st.binary(max_size=200))
def test_no_header_makes_the_reader_fail_otherwise(noise: bytes) -> None:
    data = b"l\x01\0\x01" + struct.pack("<III", 0, 1, len(noise)) + noise
    for one in frame.Reader(CAP).feed(data + bytes(-len(data) % 8), []):
        assert one.header is None or one.header.serial == 1
