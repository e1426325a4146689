# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documents: each block is of a kind that something runs, and what they name is there."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT
from tests.harness.documents import DOCUMENTS, KINDS, blocks, name, outside

DEMANDS = CHECKOUT / "docs" / "demands.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
LINK = re.compile(r"\[[^]]*\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def is_test(file: str, test: str) -> bool:
    path = CHECKOUT / file
    return path.exists() and f"\ndef {test}(" in path.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_block_is_of_a_kind_that_is_run(document: Path) -> None:
    for block in blocks(document):
        assert re.fullmatch(KINDS, block.info), f"{block}: {block.info!r}"
        if block.info == "text":
            assert not re.search(r"^[$#] ", block.text, re.MULTILINE), block
        _, _, reference = block.info.partition("elsewhere=")
        file, _, test = reference.partition("::")
        assert not test or is_test(file, test), block
    rest = outside(document)
    assert "```" not in rest
    # What Markdown takes for code without a fence, and nobody would run.
    lists = re.compile(r"^\s*(?:[-*]|\d+\.) .*\n(?: .*\n|\n)*", re.MULTILINE)
    assert not re.search(r"^(?:    |\t)\s*\S", lists.sub("", rest), re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_its_links_lead_somewhere(document: Path) -> None:
    for target, heading in LINK.findall(document.read_text()):
        path = document.parent / target if target else document
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in {
            re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings
        }


def commands(program: str) -> set[str]:
    """What the documents call of a program in blocks that are not run as they stand."""
    found = set()
    for document in DOCUMENTS:
        for block in blocks(document):
            if "elsewhere=" in block.info:
                found |= set(
                    re.findall(rf"(?:^\$ (?:sudo )?|&& ){program} (\S+)", block.text, re.M)
                )
    return found


def test_the_makefile_has_what_the_documents_name() -> None:
    targets = commands("make")
    assert targets >= {"demo", "check", "install", "uninstall", "deb"}
    # What each would do, and no more.
    subprocess.run(
        ["make", "--dry-run", "--silent", "SUDO=false", *sorted(targets)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )


def test_what_is_run_by_python_is_there() -> None:
    called = set()
    for document in DOCUMENTS:
        called |= set(re.findall(r"python -m ((?:tests|bench)[\w.]*)", document.read_text()))
    assert called
    for module in called:
        path = CHECKOUT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_architecture_has_every_package_and_module() -> None:
    text = (CHECKOUT / "docs" / "architecture.md").read_text()
    (tree,) = re.findall(r"^```text\n(loopd/\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    told, package = [], ""
    for line in tree.splitlines():
        assert re.fullmatch(r" {2}\w+ {2,}\S.*|[\w/]+/( {2,}\S.*)?", line), line
        name = line.split()[0]
        if name.endswith("/"):
            package = name
        else:
            told.append(f"{package}{name}.py")
    assert sorted(told) == sorted(
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "loopd").rglob("*.py")
        if not path.stem.startswith("__")
    )


def test_each_demand_has_tests() -> None:
    text = DEMANDS.read_text()
    rows = re.findall(r"^\|(.*)\|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)[2:]
    assert len(rows) >= 28
    assert len(re.findall(r"\[[\w-]+#\d+\]\(https://github\.com/", text)) >= 39
    for _, where, _, shown in rows:
        assert "https://" in where
        found = TEST.findall(shown)
        assert found, shown
        for file, test in found:
            assert is_test(file, test), f"{file} has no {test}"
