# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two mappings of one file, compared with what bytes they really share."""

from hypothesis import given
from hypothesis import strategies as st

from loopd.overlap import Mapping

MAPPINGS = st.builds(
    lambda device, inode, start, length, writable: Mapping(
        device=device, inode=inode, start=start, end=start + length, writable=writable
    ),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 6),
    st.integers(1, 6),
    st.booleans(),
)


@given(MAPPINGS, MAPPINGS)
def test_a_conflict_is_a_shared_byte_that_can_be_written(one: Mapping, other: Mapping) -> None:
    same_file = (one.device, one.inode) == (other.device, other.inode)
    shared = set(range(one.start, one.end)) & set(range(other.start, other.end))
    expected = same_file and bool(shared) and (one.writable or other.writable)
    assert one.conflicts_with(other) is expected
    assert other.conflicts_with(one) is expected
