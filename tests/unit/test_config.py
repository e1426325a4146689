# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's file: every key optional, every mistake named with file, key and reason."""

from pathlib import Path

import pytest

from loopd.config import BadConfig, Config, Limits, load


def test_no_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "loopd.toml") == Config()


def test_the_defaults_are_the_documented_ones() -> None:
    limits = Limits()
    assert (limits.devices_per_user, limits.devices) == (32, 1024)
    assert (limits.calls_per_connection, limits.calls_per_user, limits.calls) == (16, 64, 256)
    assert limits.questions_per_user == 4
    deadlines = Config().deadlines
    assert (deadlines.authorization, deadlines.interactive_authorization) == (10, 300)
    assert Config().direct_io is True


def test_what_is_given_counts_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text(
        'direct_io = false\ntrusted_filesystems = ["nfs4"]\n[limits]\ndevices_per_user = 3\n'
    )
    config = load(path)
    assert config.direct_io is False
    assert config.trusted_filesystems == ("nfs4",)
    assert config.limits == Limits(devices_per_user=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "x: there is no such setting"),
        ("[limits]\nx = 1", "limits: x: there is no such setting"),
        ("limits = 3", "limits: has to be a table"),
        ("[limits]\ndevices = '3'", "limits: devices: has to be a whole number"),
        ("[limits]\ndevices = true", "limits: devices: has to be a whole number"),
        ("[limits]\ndevices = 0", "limits: devices: has to be at least 1"),
        ("direct_io = 1", "direct_io: has to be true or false"),
        ("trusted_filesystems = 'nfs'", "trusted_filesystems: has to be a list of strings"),
        ("trusted_filesystems = [1]", "trusted_filesystems: has to be a list of strings"),
        ("x =", "Invalid value"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read_is_no_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="Is a directory"):
        load(tmp_path)
