# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages say what the programs take: each command, option, exit status and setting."""

import argparse
import re
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from loopd import errors
from loopd.cli import arguments
from loopd.cli.columns import COLUMNS
from loopd.cli.outcome import MEANINGS
from loopd.daemon import access, config, main
from loopd.daemon.server import options
from tests.harness.area import CHECKOUT

SOURCES = CHECKOUT / "docs" / "man"
NAMES = [path.stem for path in sorted(SOURCES.glob("*.rst"))]
INTERFACE = "org.example.Loop1"


def make_pages(directory: Path) -> subprocess.CompletedProcess[str]:
    # As `make install` does: with Debian's Python, and its Docutils.
    return subprocess.run(
        ["/usr/bin/python3", SOURCES / "pages.py", directory],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages by their names, as they are read, in lines so long that none is broken."""
    directory = tmp_path_factory.mktemp("man")
    done = make_pages(directory)
    if "Docutils" in done.stderr:
        pytest.skip("python3-docutils is not installed")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return {path.name: rendered(path) for path in directory.glob("man*/*")}


def rendered(path: Path) -> str:
    assert path.parent.name == f"man{path.name[-1]}"
    done = subprocess.run(
        ["groff", "-ww", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=1000n", path],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout


def section(page: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)(?:^\S|\Z)", page, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(?:--[a-z][a-z-]*|-[a-zA-Z](?![\w-]))", text))


def parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser and those of its commands."""
    found = {"": parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def terms(text: str, indent: int) -> list[str]:
    """What is explained at this depth: a line, and behind or below it what it means."""
    return re.findall(rf"^ {{{indent}}}(\S+)", text, re.MULTILINE)


def test_there_is_every_page_and_each_knows_only_pages_that_are(pages: dict[str, str]) -> None:
    assert set(pages) == set(NAMES)
    assert len(pages) == 5
    own = {f"{name[:-2]}({name[-1]})" for name in pages}
    for name, text in pages.items():
        # But for the last line of the page.
        others = section(text, "SEE ALSO").rstrip().rpartition("\n")[0].replace(",", "").split()
        assert f"{name[:-2]}({name[-1]})" not in others
        for other in others:
            assert re.fullmatch(r"[\w.@-]+\([158]\)|loop\(4\)", other)
            if "loop" in other and other not in ("loop(4)", "losetup(8)"):
                assert other in own


@pytest.mark.parametrize(
    ("page", "parser"),
    [("loopctl.1", arguments.parser()), ("loopd.8", main._parser())],
    ids=["loopctl", "loopd"],
)
def test_all_options_are_told_and_no_others(
    pages: dict[str, str], page: str, parser: argparse.ArgumentParser
) -> None:
    taken = {
        option
        for each in parsers(parser).values()
        for action in each._actions
        for option in action.option_strings
    }
    text, _, _ = pages[page].partition("\nEXAMPLES\n")
    assert options_in(text) == taken


def test_all_commands_of_loopctl_are_told(pages: dict[str, str]) -> None:
    commands = {name for name in parsers(arguments.parser()) if name}
    page = pages["loopctl.1"]
    assert set(re.findall(r"^ +loopctl ([a-z]+)", section(page, "SYNOPSIS"), re.M)) == commands
    assert set(terms(section(page, "COMMANDS"), 7)) == commands


@pytest.mark.parametrize(
    ("command", "parser"), [each for each in parsers(arguments.parser()).items() if each[0]]
)
def test_each_command_has_the_options_that_are_told_of_it(
    pages: dict[str, str], command: str, parser: argparse.ArgumentParser
) -> None:
    page = section(pages["loopctl.1"], "OPTIONS") + section(pages["loopctl.1"], "LOSETUP")
    parts = re.split(r"^   Options of (.*)$", page, flags=re.M)
    told: set[str] = set()
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        if title == "all commands" or command in re.findall(r"\w+", title):
            told |= options_in("\n".join(re.findall(r"^ {7}-.*$", text, re.MULTILINE)))
    taken = {option for action in parser._actions for option in action.option_strings}
    assert told - {"-V", "--version"} == taken


def test_all_columns_of_loopctls_list_are_told(pages: dict[str, str]) -> None:
    # But for losetup's own, which are named as such.
    listed = pages["loopctl.1"]
    ours = list(COLUMNS)[list(COLUMNS).index("SIZE") :]
    assert [each for each in ours if not re.search(rf"\b{each}\b", listed)] == []


def test_all_exit_statuses_of_loopctl_are_told(pages: dict[str, str]) -> None:
    told = section(pages["loopctl.1"], "EXIT STATUS")
    assert dict(re.findall(r"^ +(\d) +(.*)$", told, re.MULTILINE)) == {
        str(int(code)): meaning for code, meaning in MEANINGS.items()
    }


def test_the_exit_statuses_of_loopd_are_told(pages: dict[str, str]) -> None:
    assert terms(section(pages["loopd.8"], "EXIT STATUS"), 7) == ["0", "1", "78"]


def test_all_settings_are_told_with_their_defaults(pages: dict[str, str]) -> None:
    lines = re.findall(
        r"^ +(\[\w+\]|\w+ = .*)$", section(pages["loopd.toml.5"], "SETTINGS"), re.MULTILINE
    )
    told = tomllib.loads("\n".join(lines))
    defaults = asdict(config.Config())
    defaults["trusted_filesystems"] = list(config.Config().trusted_filesystems)
    assert told == defaults


def members(tree: ElementTree.Element) -> Iterator[tuple[str, list[str]]]:
    """Each of our interfaces with the names of its methods and properties."""
    for each in tree.iter("interface"):
        name = each.get("name", "")
        if name.startswith(INTERFACE):
            yield name, [str(one.get("name")) for one in each if one.tag in ("method", "property")]


def test_all_members_errors_and_actions_are_told(pages: dict[str, str]) -> None:
    page = pages[f"{INTERFACE}.5"]
    tree = ElementTree.parse(CHECKOUT / "dbus" / f"{INTERFACE}.xml").getroot()
    for name, names in members(tree):
        text = section(page, f"INTERFACE {name.upper()}")
        assert [term.partition("(")[0] for term in terms(text, 7)][-len(names) :] == names
    assert set(terms(section(page, "ERRORS"), 7)) >= {
        cls.dbus_name for cls in errors.LoopError.__subclasses__() if hasattr(cls, "dbus_name")
    }
    assert set(terms(section(page, "AUTHORIZATION"), 7)) >= {*access.Action}


def test_all_options_of_attach_are_told_with_their_types(
    pages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, str]] = []

    def take(self: options.Options, key: str, kind: str) -> None:
        taken.append((key, kind))

    monkeypatch.setattr(options.Options, "_take", take)
    options.attach_options({})
    page = pages[f"{INTERFACE}.5"]
    attach = page[page.index("\n       Attach(") : page.index("\n       Detach(")]
    assert sorted(re.findall(r"^ {17}([a-z-]+) (\w)\b", attach, re.MULTILINE)) == sorted(taken)


def test_who_has_no_docutils_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "docutils.py").write_text("")
    done = subprocess.run(
        ["/usr/bin/python3", SOURCES / "pages.py", tmp_path / "man"],
        env={"PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "the manual pages need Docutils (Debian: python3-docutils)\n"
