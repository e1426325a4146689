# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in systemd's store as far as we know; in tests/root/test_restart.py one answers."""

import os
from collections.abc import Sequence

import pytest

from loopd import supervisor
from loopd.fd import OwnedFd
from loopd.fdstore import FdStore


@pytest.mark.parametrize("takes_it", [True, False])
def test_what_could_not_be_sent_does_not_count(
    monkeypatch: pytest.MonkeyPatch, takes_it: bool
) -> None:
    told: list[str] = []

    def tell(state: str, _fds: Sequence[int] = ()) -> bool:
        told.append(state.partition("=")[0])
        # Whoever waits at a barrier waits until its fd is closed, which it is here.
        return takes_it

    monkeypatch.setattr(supervisor, "tell", tell)
    store = FdStore()
    store.room = 2
    fd = store.keep("loop3_7", OwnedFd(os.memfd_create("device")))
    assert store.keeps("loop3_7") is takes_it
    assert store.count == int(takes_it)
    fd.close()
    assert store.count == 0
    assert told == (["FDSTORE", "FDSTOREREMOVE", "BARRIER"] if takes_it else ["FDSTORE"])
