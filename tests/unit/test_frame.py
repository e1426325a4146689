# SPDX-License-Identifier: LGPL-2.1-or-later
"""The byte stream cut into messages: whatever the pieces, whoever sends."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopd.bus import codec, frame

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
    assert reader.feed(large[:10], [5]) == []
    skipped, following = reader.feed(large[10:] + call(2), [])
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
    reader = frame.Reader(CAP, {OTHER})
    (good,) = reader.feed(bytes(broken) + call(2), [])
    assert good.data == call(2)


# Senders that are not heard

OTHER = b":1.7666"


def call_of(
    sender: bytes, serial: int, size: int = 0, fds: int = 0, *, extra: bytes = b""
) -> bytes:
    """A call with the sender as its last field, as a bus writes it, and `extra` fields before."""
    message = codec.method_call(
        "org.example.Loop1", "/a", "b.c", "D", "s", ["x" * size], serial=serial, fds=[0] * fds
    )
    data = codec.serialize(message)
    (length,) = struct.unpack_from("<I", data, 12)
    fields, body = data[16 : 16 + length], data[(16 + length + 7) & ~7 :]
    field = b"\x07\x01s\0" + struct.pack("<I", len(sender)) + sender + b"\0"
    for each in (extra, field):
        fields += bytes(-len(fields) % 8) + each if each else b""
    header = data[:12] + struct.pack("<I", len(fields)) + fields
    return header + bytes(-len(header) % 8) + body


@given(
    senders=st.lists(st.booleans(), min_size=1, max_size=8),
    sizes=st.lists(st.integers(0, 2 * CAP), min_size=8, max_size=8),
    cuts=st.lists(st.integers(0, 50_000), max_size=20),
)
def test_of_a_muted_sender_nothing_comes_and_of_others_everything(
    senders: list[bool], sizes: list[int], cuts: list[int]
) -> None:
    messages = [
        call_of(b":1.7" if heard else OTHER, serial, size)
        for serial, (heard, size) in enumerate(zip(senders, sizes, strict=False), 1)
    ]
    reader = frame.Reader(CAP, {OTHER})
    seen = [one for piece in pieces(b"".join(messages), cuts) for one in reader.feed(piece, [])]
    assert [one.header and one.header.serial for one in seen] == [
        serial for serial, heard in enumerate(senders, 1) if heard
    ]
    assert all(one.data in (b"", messages[one.header.serial - 1]) for one in seen if one.header)


@pytest.mark.parametrize("cut", [10, 30, 100, -1, None])
@pytest.mark.parametrize("size", [0, 2 * CAP])
def test_fds_of_a_muted_sender_come_without_their_message(cut: int | None, size: int) -> None:
    reader = frame.Reader(CAP, {OTHER})
    data = call(1) + call_of(OTHER, 2, size, fds=2)
    place = len(call(1)) + cut if cut and cut > 0 else len(data) + (cut or 0)
    seen = reader.feed(data[:place], [5, 6]) + reader.feed(data[place:] + call(3), [])
    assert [one.header and one.header.serial for one in seen] == [1, None, 3]
    assert [one.fds for one in seen] == [[], [5, 6], []]
    seen = reader.feed(call_of(OTHER, 4, fds=1), [], fds_lost=True) + reader.feed(call(5), [])
    assert [one.fds_lost for one in seen if one.header] == [False]


@given(
    senders=st.lists(st.sampled_from([b":1.7", OTHER, b":1.12"]), min_size=1, max_size=6),
    sizes=st.lists(st.sampled_from([0, 10, 300, 2 * CAP]), min_size=6, max_size=6),
    cut=st.integers(0, 20_000),
)
def test_whose_a_piece_is_can_be_asked_before_it_is_fed(
    senders: list[bytes], sizes: list[int], cut: int
) -> None:
    messages = [
        call_of(sender, serial, size)
        for serial, (sender, size) in enumerate(zip(senders, sizes, strict=False), 1)
    ]
    data = b"".join(messages)
    cut %= len(data) + 1
    reader = frame.Reader(CAP)
    before = len(reader.feed(data[:cut], []))
    begun = [sum(map(len, messages[:each])) for each in range(len(messages))]
    starts = [sender for sender, place in zip(senders, begun, strict=False) if place < len(data)]
    if any(cut <= place for place in begun):
        assert reader.last_sender(data[cut:]) == starts[-1].decode()
    # Asking changes nothing.
    after = reader.feed(data[cut:], [])
    assert [one.header.serial for one in after if one.header] == [
        *range(before + 1, len(messages) + 1)
    ]


def test_who_is_muted_may_change_between_two_messages() -> None:
    muted: set[bytes] = set()
    reader = frame.Reader(CAP, muted)
    assert len(reader.feed(call_of(OTHER, 1) * 3, [])) == 3
    muted.add(OTHER)
    assert reader.feed(call_of(OTHER, 1) * 3, []) == []
    muted.clear()
    assert len(reader.feed(call_of(OTHER, 1) * 3, [])) == 3


@pytest.mark.parametrize("code", [1, 10, 200])
@pytest.mark.parametrize("kind", ["s", "g"])
def test_a_sender_cannot_be_written_into_another_field(code: int, kind: str) -> None:
    """By bytes of a string that look like the sender's field, which begins with no NUL."""
    forged = b"\x07\x01s"
    length = struct.pack("<I", len(forged)) if kind == "s" else bytes([len(forged)])
    extra = bytes([code, 1, ord(kind), 0]) + length + forged + b"\0"
    reader = frame.Reader(CAP, {OTHER})
    assert reader.feed(call_of(OTHER, 1, extra=extra), []) == []
    (heard,) = reader.feed(call_of(b":1.7", 2, extra=extra), [])
    assert heard.header is not None
    assert heard.header.sender == ":1.7"


@given(
    st.lists(
        st.tuples(
            st.integers(1, 255).filter(lambda code: code != 7),
            st.sampled_from("sogu"),
            st.binary(max_size=60).map(lambda each: each.replace(b"\0", b"\x07")),
        ),
        max_size=6,
    )
)
def test_whatever_the_other_fields_are_the_sender_is_found_as_the_header_has_it(
    others: list[tuple[int, str, bytes]],
) -> None:
    fields = b""
    for code, kind, value in others:
        fields += bytes(-len(fields) % 8) + bytes([code, 1, ord(kind), 0])
        if kind == "u":
            fields += (value + bytes(4))[:4]
        elif kind == "g":
            fields += bytes([len(value)]) + value + b"\0"
        else:
            fields += struct.pack("<I", len(value)) + value + b"\0"
    reader = frame.Reader(CAP, {OTHER})
    assert reader.feed(call_of(OTHER, 1, extra=fields), []) == []
    for one in reader.feed(call_of(b":1.7", 2, extra=fields), []):
        assert one.header is None or one.header.sender == ":1.7"


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


def test_types_that_are_not_wanted_are_skipped_and_their_fds_are_not() -> None:
    signal = codec.serialize(codec.signal("/a", "b.c", "D", "", [], serial=1))
    reader = frame.Reader(CAP, types=[frame.METHOD_CALL])
    seen = reader.feed(with_sender(signal) + call(2) + with_sender(signal), [5])
    assert [one.header and one.header.serial for one in seen] == [2, None]
    assert [one.fds for one in seen] == [[], [5]]


def test_signals_to_one_connection_are_skipped_where_broadcasts_are_heard() -> None:
    """Transport rule 15 (every connection): unparsed, and their fds are their sender's."""
    to_all = with_sender(codec.serialize(codec.signal("/a", "b.c", "D", "", [], serial=1)))
    one = codec.signal("/a", "b.c", "E", "", [], serial=2, destination=":1.1")
    to_one = with_sender(codec.serialize(one))
    call = with_sender(
        codec.serialize(codec.method_call(":1.1", "/a", "b.c", "F", "", [], serial=3))
    )
    reader = frame.Reader(1 << 16, broadcasts=True)
    frames = reader.feed(to_one + to_all + call + to_one, [])
    assert [one.header.serial for one in frames if one.header] == [1, 3]
    (skipped,) = reader.feed(to_one, [7])
    assert (skipped.header, skipped.fds, skipped.sender) == (None, [7], ":1.7")
    everything = frame.Reader(1 << 16).feed(to_one + to_all, [])
    assert [one.header.serial for one in everything if one.header] == [2, 1]


def test_a_signal_whose_fields_cannot_be_told_is_skipped_where_broadcasts_are_heard() -> None:
    """Transport rule 15 (every connection): a field of another kind hides no destination."""
    signal = with_sender(
        codec.serialize(codec.signal("/a", "b.c", "D", "", [], serial=1, destination=":1.1"))
    )
    hiding = signal.replace(b"\x06\x01s\0", b"\x06\x01o\0")
    assert hiding != signal
    odd = signal.replace(b"\x06\x01s\0", b"\x0b\x01d\0")
    assert odd != signal
    for data in (hiding, odd):
        assert frame.Reader(1 << 16, broadcasts=True).feed(data, []) == []


def test_fds_of_skipped_types_are_their_senders() -> None:
    """Transport rule 16 (whose fds)."""
    call = with_sender(
        codec.serialize(codec.method_call(":1.1", "/a", "b.c", "F", "", [], serial=3))
    )
    reader = frame.Reader(1 << 16, types=[frame.SIGNAL])
    assert [each.sender for each in reader.feed(call[:20], [])] == []
    (skipped,) = reader.feed(call[20:], [7])
    assert (skipped.fds, skipped.sender) == ([7], ":1.7")
