# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's file: every key optional, every mistake named with file, key and reason."""

import os
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loopd.daemon.config import Config, Deadlines, Limits, limited, load
from tests.harness.area import CHECKOUT, area

NUMBERS = [
    *(f"[limits]\n{each.name}" for each in fields(Limits)),
    *(f"[deadlines]\n{each.name}" for each in fields(Deadlines)),
    "idle_timeout",
]


def most(number: str) -> int:
    return 65536 if number.startswith("[limits]") else 86400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "loopd.toml"


def mistake(path: Path) -> str:
    """The only mistake in a file, without the name of the file."""
    config, (sentence,) = load(path)
    assert config == Config()
    assert sentence.startswith(f"{path}: ")
    assert sentence.isprintable()
    return sentence.removeprefix(f"{path}: ")


def test_no_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "loopd.toml") == (Config(), [])


def test_the_defaults_are_the_documented_ones() -> None:
    limits = Limits()
    assert (limits.devices_per_user, limits.devices) == (32, 1024)
    assert (limits.calls_per_connection, limits.calls_per_user, limits.calls) == (16, 64, 256)
    assert limits.questions_per_user == 4
    deadlines = Config().deadlines
    assert (deadlines.authorization, deadlines.interactive_authorization) == (10, 300)
    assert Config().direct_io is True


def test_what_is_given_counts_and_the_rest_stays(path: Path) -> None:
    path.write_text(
        'direct_io = false\ntrusted_filesystems = ["nfs4"]\n[limits]\ndevices_per_user = 3\n'
    )
    config, mistakes = load(path)
    assert mistakes == []
    assert config.direct_io is False
    assert config.trusted_filesystems == ("nfs4",)
    assert config.limits == Limits(devices_per_user=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "x: there is no such setting"),
        ("most = 1", "most: there is no such setting"),
        ("[limits]\nx = 1", "limits: x: there is no such setting"),
        ("limits = 3", "limits: has to be a table"),
        ("[limits]\ndevices = '3'", "limits: devices: has to be a whole number"),
        ("[limits]\ndevices = true", "limits: devices: has to be a whole number"),
        ("[limits]\ndevices = 1e400", "limits: devices: has to be a whole number"),
        ("[limits]\ndevices = 0", "limits: devices: has to be from 1 to 65536"),
        ("[limits]\nholds = 1000000000", "limits: holds: has to be from 1 to 65536"),
        (f"idle_timeout = 1{'0' * 400}", "idle_timeout: has to be from 1 to 86400"),
        (f"idle_timeout = 1{'0' * 5000}", "has a number with too many digits"),
        (f"idle_timeout = 0x1{'0' * 5000}", "idle_timeout: has to be from 1 to 86400"),
        ("direct_io = 1", "direct_io: has to be true or false"),
        ("trusted_filesystems = 'nfs'", "trusted_filesystems: has to be a list of strings"),
        ("trusted_filesystems = [1]", "trusted_filesystems: has to be a list of strings"),
        (
            f"trusted_filesystems = {['nfs'] * 65}",
            "trusted_filesystems: has to have 64 names at most",
        ),
        *(
            (
                f"trusted_filesystems = ['nfs4', {value}]",
                f"trusted_filesystems: {shown} is no type of a filesystem, as nfs4 is",
            )
            for value, shown in (
                ("''", "''"),
                ("' '", "' '"),
                ("'fuse.sshfs'", "'fuse.sshfs'"),
                ('"nfs\\n4"', r"'nfs\n4'"),
                (f"'{'n' * 65}'", f"'{'n' * 64}'"),
            )
        ),
        ("x =", "Invalid value (at end of document)"),
        ('"a\\nb\\u001b" = 1', r"a\nb\x1b: there is no such setting"),
        (f"{'a' * 1000} = 1", f"{'a' * 64}: there is no such setting"),
        ("x = " + "[" * 30000, "is nested too deeply"),
        ("#" * 65537, "is larger than 65536 bytes"),
    ],
    ids=range(26),
)
def test_a_mistake_is_one_sentence_with_its_place(path: Path, text: str, words: str) -> None:
    """Settings beyond reason."""
    path.write_text(text)
    assert mistake(path) == words


@pytest.mark.parametrize("number", NUMBERS)
def test_each_number_has_its_bounds(path: Path, number: str) -> None:
    """The manual page says the same of all of them."""
    for value in (1, most(number)):
        path.write_text(f"{number} = {value}")
        assert load(path)[1] == []
    for value in (-1, 0, most(number) + 1):
        path.write_text(f"{number} = {value}")
        assert mistake(path).endswith(f": has to be from 1 to {most(number)}")


def test_the_manual_page_tells_the_bounds() -> None:
    page = " ".join((CHECKOUT / "docs" / "man" / "loopd.toml.5.rst").read_text().split())
    assert f"a limit is at most {Limits.most}, a time at most {Deadlines.most}" in page
    assert Config.most == Deadlines.most


def test_a_mistake_costs_its_own_setting_and_no_other(path: Path) -> None:
    """Settings that destroy."""
    path.write_text(
        "direct_io = false\nold = 1\n[limits]\ndevices = 0\nholds = 7\n[deadlines]\noperation = 'x'"
    )
    config, mistakes = load(path)
    assert config == Config(direct_io=False, limits=Limits(holds=7))
    assert [each.removeprefix(f"{path}: ").partition(": h")[0] for each in mistakes] == [
        "old: there is no such setting",
        "limits: devices",
        "deadlines: operation",
    ]


def test_what_is_no_text_is_no_settings(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    assert "can't decode" in mistake(path)


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "terminal"])
def test_what_is_no_regular_file_is_not_waited_for(path: Path, kind: str) -> None:
    """Settings beyond reason."""
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/ptmx")
    assert mistake(path) == "is no regular file"


def test_a_file_that_cannot_be_opened_is_no_missing_file(path: Path) -> None:
    path.symlink_to(path)
    assert mistake(path) == "Too many levels of symbolic links"


KEYS = st.sampled_from(["limits", "deadlines", *(each.name for each in fields(Config))])
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.times(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS | st.text(), inner),
    max_leaves=5,
)


def toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(each):08x}" for each in value) + '"'
    return str(value).lower() if isinstance(value, bool | float) else str(value)


@given(st.dictionaries(KEYS | st.text(max_size=8), VALUES, max_size=4))
@example({"limits": {"devices": 10**400}})
def test_whatever_the_settings_are_there_is_an_answer(settings: dict[str, object]) -> None:
    require_answer(
        "\n".join(f"{toml(key)} = {toml(each)}" for key, each in settings.items()).encode()
    )


@given(st.binary() | st.text().map(str.encode))
def test_whatever_the_file_holds_there_is_an_answer(content: bytes) -> None:
    require_answer(content)


def require_answer(content: bytes) -> None:
    """Each setting of a file is right and counts, or there is a sentence about it."""
    with area("settings") as directory:
        path = directory / "loopd.toml"
        path.write_bytes(content)
        config, mistakes = load(path)
    for sentence in mistakes:
        assert re.fullmatch(rf"{re.escape(str(path))}: .+", sentence)
        assert sentence.isprintable()
    for group in (config, config.limits, config.deadlines):
        for each in fields(group):
            value = getattr(group, each.name)
            assert type(value) is not int or 1 <= value <= group.most
    assert all(re.fullmatch("[A-Za-z0-9_-]+", name) for name in config.trusted_filesystems)
    if not mistakes:
        for key, value in tomllib.loads(content.decode()).items():
            assert isinstance(value, dict | list) or getattr(config, key) == value


@pytest.mark.parametrize(
    ("limits", "fds", "left"),
    [
        (Limits(), 4096, Limits()),
        (Limits(), 2048, Limits(devices=341, holds=1024)),
        # Holds beyond reason leave room for devices, and the other way round.
        (Limits(holds=65536), 7680, Limits(devices=1024, holds=4608)),
        (Limits(devices=65536, holds=1), 7680, Limits(devices=2559, holds=1)),
        (Limits(devices=65536, holds=65536), 7680, Limits(devices=1280, holds=3840)),
        (Limits(), 1, Limits(devices=1, holds=1)),
    ],
)
def test_devices_and_holds_share_the_fds_there_are(limits: Limits, fds: int, left: Limits) -> None:
    """Settings beyond reason."""
    assert limited(Config(limits=limits), fds, 3, "so many fds are").limits == left
