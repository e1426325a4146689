# SPDX-License-Identifier: LGPL-2.1-or-later
"""How loopctl lists devices and tells of changes: for terminals, pipes, and programs."""

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from typing import TextIO

import pytest

from loopd.cli import columns, monitor
from loopd.cli.style import Style
from loopd.client import Change
from loopd.client.properties import FOREIGN, Partition, Properties
from tests.unit.test_cli import device

SMALL = device()
FOREIGN_DEVICE = device(
    node="/dev/loop11", size=1536, owner=FOREIGN, lifetime="", read_only=True, managed=False
)


def lines(devices: list[Properties], names: tuple[str, ...], width: int = 80) -> list[str]:
    """What a terminal of that width gets."""
    rows = columns.listed(devices, names, in_bytes=False, headings=True)
    return columns.aligned(rows, names, width)


def test_a_list_for_a_terminal_is_aligned() -> None:
    assert lines([SMALL, FOREIGN_DEVICE], columns.DEFAULT) == [
        "NAME        SIZE OFFSET RO OWNER LIFETIME   STATE    BACK-FILE",
        "/dev/loop3    4M      0  0 root  connection attached /tmp/disk.img",
        "/dev/loop11 1.5K      0  1 -     -          attached /tmp/disk.img",
    ]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "/srv/images/of/some/systems/disk.img"),
        (60, "/srv/images/of/some/systems/disk.img"),
        (50, "…v/images/of/some/systems/disk.img"),
        (10, "…me/systems/disk.img"),
    ],
)
def test_a_path_that_has_no_room_loses_its_beginning(width: int, shown: str) -> None:
    long = device(backing_file=b"/srv/images/of/some/systems/disk.img")
    names = ("NAME", "BACK-FILE", "SIZE")
    header, row = lines([long], names, width)
    assert row == f"/dev/loop3 {shown}   4M"
    assert len(header) == len(row) <= max(width, 36)


def test_cells_for_a_pipe_are_in_bytes_and_never_empty() -> None:
    (row,) = columns.listed(
        [device(backing_file=b"/a b\nc", size_limit=0)],
        (*columns.DEFAULT, "SIZELIMIT", "REF", "PARTITIONS", "HOLDS"),
        in_bytes=True,
        headings=False,
    )
    assert row == [
        *("/dev/loop3", "4194304", "0", "0", "root", "connection", "attached", "/a b\\nc"),
        *("0", "-", "-", "0"),
    ]


def test_every_column_has_a_text_and_a_value() -> None:
    names = tuple(columns.COLUMNS)
    partition = Partition(1, "/dev/loop3p1", 512, 1024)
    for each in (device(reference="x\x07", partitions=(partition,)), FOREIGN_DEVICE):
        (row,) = columns.listed([each], names, in_bytes=True, headings=False)
        assert all(cell and cell.isprintable() for cell in row)
        assert json.loads(json.dumps(columns.for_json(each, names))).keys() == {
            name.lower() for name in names
        }
    numbers = ("MAJ:MIN", "BACK-MAJ:MIN", "BACK-INO")
    shown = columns.listed([SMALL], numbers, in_bytes=True, headings=False)
    assert shown == [["7:3", "254:0", "99"]]


def test_losetups_columns_have_its_names() -> None:
    known = subprocess.run(["losetup", "--help"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^ +([A-Z:-]+)  ", known.partition("columns:")[2], re.MULTILINE)
    assert len(names) >= 12
    assert set(names) - {"BACK-MAJ", "BACK-MIN", "MAJ", "MIN"} <= columns.COLUMNS.keys()


def test_json_has_the_types_of_losetups() -> None:
    given = columns.for_json(SMALL, ("NAME", "SIZELIMIT", "OFFSET", "AUTOCLEAR", "RO", "DIO"))
    assert given == {
        "name": "/dev/loop3",
        "sizelimit": 0,
        "offset": 0,
        "autoclear": True,
        "ro": False,
        "dio": True,
    }
    assert columns.for_json(FOREIGN_DEVICE, ("OWNER", "BACK-MAJ:MIN")) == {
        "owner": None,
        "back-maj:min": "254:0",
    }


# --- colours ------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[TextIO]:
    """A terminal that knows colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    reading, writing = pty.openpty()
    with open(reading), open(writing, "w") as stream:
        yield stream


def test_a_terminal_has_colours_unless_somebody_objects(
    screen: TextIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Style(screen).red("x") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "")  # which says nothing
    assert Style(screen).bold("x") != "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Style(screen).bold("x") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert Style(screen).bold("x") == "x"


def test_a_pipe_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with open(os.devnull, "w") as stream:
        for style in (Style(stream), Style(None)):
            assert not style.on_terminal
            assert style.green("x") == "x"


# --- changes ------------------------------------------------------------------------------------


class Named:
    """Stands for a Device."""

    path = "/o"


def line(kind: str, properties: Properties, *names: str) -> str:
    change = Change(kind, Named(), properties, names)  # type: ignore[arg-type]
    time, _, rest = monitor.as_line(change, Style(None)).partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", time)
    assert json.loads(monitor.as_json(change))["event"] == kind
    return rest


def test_what_happened_is_told_on_a_line() -> None:
    assert line("attached", SMALL) == "attached /dev/loop3  /tmp/disk.img (4 MiB, for root)"
    assert line("detached", FOREIGN_DEVICE) == "detached /dev/loop11 /tmp/disk.img (1.5 KiB)"
    changed = device(size=8192, reference="a\nb", direct_io=False)
    assert line("changed", changed, "size", "reference", "direct_io", "backing_device") == (
        "changed  /dev/loop3  size 8 KiB (8192 bytes), reference a\\nb, direct I/O no"
    )
