# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in systemd's store as far as we know; in tests/root/test_restart.py one answers."""

import os
from collections.abc import Sequence

import pytest

from loopd import notify
from loopd.daemon.host import systemd
from loopd.daemon.host.fd_store import FdStore
from loopd.fd import OwnedFd


@pytest.mark.parametrize("takes_it", [True, False])
def test_what_could_not_be_sent_does_not_count(
    monkeypatch: pytest.MonkeyPatch, takes_it: bool
) -> None:
    told: list[str] = []

    def tell(state: str, _fds: Sequence[int] = ()) -> bool:
        told.append(state.partition("=")[0])
        # Whoever waits at a barrier waits until its fd is closed, which it is here.
        return takes_it

    monkeypatch.setattr(notify, "tell", tell)
    store = FdStore()
    store.room = 2
    fd = store.keep("loop3_7", OwnedFd(os.memfd_create("device")))
    assert store.keeps("loop3_7") is takes_it
    fd.close()
    assert not store.keeps("loop3_7")
    assert told == (["FDSTORE", "FDSTOREREMOVE", "BARRIER"] if takes_it else ["FDSTORE"])


def kept(store: FdStore, *names: str) -> None:
    """Have things under these names."""
    for name in names:
        with OwnedFd(os.memfd_create(name)) as fd:
            os.close(store.keep(name, fd).release())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FdStore:
    """One that a systemd takes everything for."""
    monkeypatch.setattr(notify, "tell", lambda *_: True)
    made = FdStore()
    made.room = 10
    return made


def test_what_systemd_has_lost_is_told(store: FdStore, caplog: pytest.LogCaptureFixture) -> None:
    kept(store, "loop1_1", "loop2_2", "loop3_3")
    store.compare(0)  # all of them may be on their way
    store.compare(3)
    store.compare(4)  # one more is on its way out
    assert not caplog.messages
    store.compare(2)
    assert caplog.messages == ["systemd has lost 1 fds: devices may go when loopd does"]
    store.compare(3)
    assert len(caplog.messages) == 1


def test_what_comes_and_goes_all_the_time_is_not_lost(
    store: FdStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each comparison one fd is on its way in, and another one on its way out."""

    def compare(state: str, *_: object) -> bool:
        if state.startswith("FDSTOREREMOVE"):
            store.compare(1)
        return True

    kept(store, "loop1_1")
    fd = store.keep("loop2_2", OwnedFd(os.memfd_create("device")))
    store.compare(2)
    for number in range(3, 6):
        name = f"loop{number}_{number}"
        arriving = store.keep(name, OwnedFd(os.memfd_create("device")))
        monkeypatch.setattr(notify, "tell", compare)
        fd.close()
        monkeypatch.setattr(notify, "tell", lambda *_: True)
        fd = arriving
    fd.close()
    assert not caplog.messages


def test_without_a_store_nothing_is_sent_or_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(notify, "tell", lambda state, _fds=(): told.append(state))
    store = FdStore()
    kept(store, "loop1_1")
    assert (store.keeps("loop1_1"), told) == (False, [])


def test_a_new_name_is_newer_than_all_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two locks of one device the newer one counts."""
    fds = [os.memfd_create("kept") for _ in range(5)]
    passed = {"loop1_1": fds[:1], "loop1_1.hold7": fds[1:4], "loop1_1.lock12": fds[4:]}
    monkeypatch.setattr(systemd, "passed_fds", lambda: passed)
    store = FdStore()
    found = store.passed()
    assert {name: fd.fileno() for name, fd in found.items()} == {
        name: each[0] for name, each in passed.items()
    }
    for copy in fds[2:4]:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(copy)
    assert store.name("loop1_1", "hold") == "loop1_1.hold13"
    assert store.name("loop1_1", "lock") == "loop1_1.lock14"
    assert all(store.keeps(name) for name in passed)
    assert store.keeps("loop1_1.hold7")
    for fd in found.values():
        os.close(fd.release())
