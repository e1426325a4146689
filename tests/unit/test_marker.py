# SPDX-License-Identifier: LGPL-2.1-or-later
"""The marks for udev's rules: there while an ordinary user's file is bound, and no longer."""

import os
from pathlib import Path

import pytest

from loopd.daemon.host.udev_marks import Markers
from loopd.loop import kernel


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The bindings that the kernel has, by number."""
    bindings: dict[int, int] = {}
    monkeypatch.setattr(kernel, "loop_binding", bindings.get)
    return bindings


@pytest.fixture
def markers(tmp_path: Path) -> Markers:
    markers = Markers(tmp_path)
    markers.prepare()
    return markers


def marks(tmp_path: Path, kind: str = "unprivileged") -> set[str]:
    return {path.name for path in (tmp_path / kind).iterdir()}


def test_a_mark_lasts_from_claim_to_release(tmp_path: Path, markers: Markers) -> None:
    release = markers.claim(7, unprivileged=True)
    assert marks(tmp_path) == {"loop7"}
    assert markers.claimed(7, 41)
    release(None)
    assert marks(tmp_path) == set()
    assert not markers.claimed(7, 41)


def test_roots_devices_have_no_mark_and_take_away_a_left_over_one(
    tmp_path: Path, markers: Markers
) -> None:
    (tmp_path / "unprivileged" / "loop7").touch()
    release = markers.claim(7, unprivileged=False)
    assert marks(tmp_path) == set()
    assert marks(tmp_path, "attached") == {"loop7"}
    assert markers.claimed(7, 41)
    release(None)
    assert marks(tmp_path, "attached") == set()


def test_the_end_of_a_former_claim_does_not_touch_a_newer_one(
    tmp_path: Path, markers: Markers
) -> None:
    release_former = markers.claim(7, unprivileged=True)
    release_newer = markers.claim(7, unprivileged=True)
    release_former(None)
    assert marks(tmp_path) == {"loop7"}
    assert markers.claimed(7, 41)
    release_newer(None)
    assert marks(tmp_path) == set()


def test_a_mark_outlasts_its_release_while_others_keep_the_device_bound(
    tmp_path: Path, markers: Markers
) -> None:
    release = markers.claim(7, unprivileged=True)
    release(41)
    assert marks(tmp_path) == {"loop7"}
    assert markers.claimed(7, 41)
    markers.unbound(7)
    assert marks(tmp_path) == set()
    assert not markers.claimed(7, 41)


def test_an_unbound_number_that_is_about_to_be_bound_keeps_its_mark(
    tmp_path: Path, markers: Markers
) -> None:
    markers.claim(7, unprivileged=True)
    markers.unbound(7)
    assert marks(tmp_path) == {"loop7"}


def test_left_over_marks_go_and_those_of_bound_and_claimed_devices_stay(
    tmp_path: Path, bound: dict[int, int]
) -> None:
    for kind, names in (("unprivileged", "3 4 x"), ("attached", "3 4 6 x")):
        directory = tmp_path / kind
        directory.mkdir()
        for name in names.split():
            (directory / f"loop{name}").touch()
    bound[3] = 41
    markers = Markers(tmp_path)
    markers.prepare()
    markers.claim(5, unprivileged=True)
    assert marks(tmp_path) == {"loop3", "loop4", "loop5", "loopx"}
    assert markers.prune() == [4, 6]
    assert marks(tmp_path) == marks(tmp_path, "attached") == {"loop3", "loop5"}


def test_what_somebody_else_has_bound_since_is_theirs(tmp_path: Path, markers: Markers) -> None:
    markers.claim(7, unprivileged=True)(41)
    assert markers.claimed(7, 41)
    assert not markers.claimed(7, 42)
    assert marks(tmp_path) == marks(tmp_path, "attached") == set()


def test_what_udev_is_told_lasts_as_long_as_the_claim(tmp_path: Path, markers: Markers) -> None:
    release = markers.claim(7, unprivileged=False)
    markers.publish(7, 41, "LOOPD_LINKS=1\n")
    assert marks(tmp_path, "links") == {"loop7_41"}
    release(41)
    assert marks(tmp_path, "links") == {"loop7_41"}
    markers.unbound(7)
    assert marks(tmp_path, "links") == set()


def test_the_next_claim_takes_away_what_udev_was_told(tmp_path: Path, markers: Markers) -> None:
    markers.claim(7, unprivileged=False)
    markers.publish(7, 41, "")
    markers.claim(7, unprivileged=True)
    assert marks(tmp_path, "links") == set()


def test_a_reference_may_change(tmp_path: Path, markers: Markers) -> None:
    markers.claim(7, unprivileged=False)
    markers.publish(7, 41, "LOOPD_LINKS=1\n")
    markers.rename(7, b"other")
    text = (tmp_path / "links" / "loop7_41").read_text()
    assert text.splitlines()[0] == "LOOPD_LINKS=1"
    assert "ID_LOOP_BACKING_FILENAME_ENC=other" in text.splitlines()
    markers.rename(8, b"nobody's")
    assert marks(tmp_path, "links") == {"loop7_41"}


def test_what_was_left_over_for_udev_goes_with_its_device(
    tmp_path: Path, bound: dict[int, int]
) -> None:
    (tmp_path / "links").mkdir()
    for name in ("loop3_41", "loop4_42"):
        (tmp_path / "links" / name).touch()
    bound[3] = 41
    markers = Markers(tmp_path)
    markers.prepare()
    assert markers.prune() == [4]
    assert marks(tmp_path, "links") == {"loop3_41"}
    markers.rename(3, b"other")
    assert "other" in (tmp_path / "links" / "loop3_41").read_text()
    markers.unbound(3)
    assert marks(tmp_path, "links") == set()


def test_a_users_mark_tells_whose_it_is_and_of_which_binding(
    tmp_path: Path, markers: Markers, bound: dict[int, int]
) -> None:
    release = markers.claim(7, unprivileged=True)
    mark = tmp_path / "unprivileged" / "loop7"
    # Until it is bound nobody can tell: then it holds in any case.
    assert mark.read_text() == ""
    bound[7] = 41
    markers.sign(7, 1234, 1000)
    text = "LOOPD_OWNER=1000\nLOOPD_DISKSEQ=1234\nLOOPD_BINDING=41\n"
    assert mark.read_text() == mark.with_name("loop7_1234").read_text() == text
    markers.rename(7, b"other")
    assert mark.read_text() == text
    release(None)
    assert marks(tmp_path) == set()


def test_others_read_a_users_mark_and_nothing_else(tmp_path: Path) -> None:
    markers = Markers(tmp_path)
    before = os.umask(0o077)
    try:
        markers.prepare()
        markers.claim(7, unprivileged=True)
        markers.sign(7, 1234, 1000)
        markers.claim(8, unprivileged=False)
        markers.publish(8, 1235, "")
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777
        for path in (tmp_path, *tmp_path.rglob("*"))
    }
    assert {name for name, mode in modes.items() if mode & 0o004} == {
        "unprivileged/loop7",
        "unprivileged/loop7_1234",
    }
    # By its name, which says nothing new.
    assert {name for name, mode in modes.items() if mode & 0o001} == {".", "unprivileged"}


def test_a_left_over_mark_of_another_binding_goes(tmp_path: Path, bound: dict[int, int]) -> None:
    former = Markers(tmp_path)
    former.prepare()
    for number in (3, 4):
        bound[number] = 41
        former.claim(number, unprivileged=True)
        former.sign(number, number, 1000)
    bound[4] = 42
    markers = Markers(tmp_path)
    markers.prepare()
    # What is bound now is somebody else's, whose partitions are not to be removed.
    assert markers.prune() == []
    assert marks(tmp_path) == {"loop3", "loop3_3"}
    assert marks(tmp_path, "attached") == {"loop3"}
    markers.unbound(3)
    assert marks(tmp_path) == set()
