# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options as clients send them: each mistake is named with its key."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopd.bus.codec import Variant
from loopd.cli.arguments import parse
from loopd.daemon.actions.change import ResizeOptions
from loopd.daemon.actions.examine import AttachOptions
from loopd.daemon.server.options import (
    Options,
    attach_options,
    detach_options,
    lock_kind,
    open_options,
    resize_options,
    sector_size,
)
from loopd.errors import InvalidArgs, LoopError
from loopd.loop.block_device import Lock
from tests.harness.area import CHECKOUT

TYPES = {
    "read-only": ("b", True),
    "offset": ("t", 512),
    "size-limit": ("t", 4096),
    "sector-size": ("u", 4096),
    "partition-scan": ("b", True),
    "direct-io": ("b", False),
    "reference": ("s", "name"),
    "lock": ("s", "shared"),
    "lifetime": ("s", "connection"),
    "allow-overlap": ("b", True),
    "number": ("u", 7),
}


def test_no_options_are_the_defaults() -> None:
    assert attach_options({}) == AttachOptions()


def test_every_option_arrives() -> None:
    given = {key: Variant(kind, value) for key, (kind, value) in TYPES.items()}
    assert attach_options(given) == AttachOptions(
        read_only=True,
        offset=512,
        size_limit=4096,
        sector_size=4096,
        partition_scan=True,
        direct_io=False,
        reference=b"name",
        lock=Lock.SHARED,
        allow_overlap=True,
        number=7,
    )


def test_a_sector_size_of_0_is_to_be_found() -> None:
    options = attach_options({"sector-size": Variant("u", 0)})
    assert (options.sector_size, options.probe_sector_size) == (None, True)
    assert not attach_options({}).probe_sector_size
    assert sector_size(0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        Variant("b", True),
        Variant("s", "none"),
        Variant("t", 512),
        Variant("u", 512),
        Variant("i", 512),
        Variant("y", 1),
        Variant("x", -1),
        Variant("d", 1.0),
        Variant("h", 0),
        Variant("o", "/"),
        Variant("ay", b"none\0"),
        Variant("as", ["x"]),
        Variant("v", Variant("b", True)),
        Variant("a{sv}", {}),
        Variant("(b)", [True]),
    ],
    ids=lambda variant: variant.signature,
)
def test_a_wrong_type_is_named(wrong: Variant) -> None:
    for key, (right, _) in TYPES.items():
        if wrong.signature != right:
            with pytest.raises(InvalidArgs, match=f"^{key}: .*'{right}'"):
                attach_options({key: wrong})


def test_an_unknown_key_is_named_safely() -> None:
    with pytest.raises(InvalidArgs, match=r"'evil\\nkey'"):
        attach_options({"evil\nkey": Variant("b", True)})
    with pytest.raises(InvalidArgs) as caught:
        attach_options({"x" * 10_000: Variant("b", True)})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("sector-size", "u", 256),
        ("sector-size", "u", 768),
        ("sector-size", "u", 2**32 - 1),
        ("reference", "s", "x" * 63),
        ("reference", "s", "ä" * 32),
        ("reference", "s", "x" * 10_000),
        ("reference", "s", "a\nb"),
        ("reference", "s", "\x1b[2J"),
        ("reference", "s", "a\x7fb"),
        ("reference", "s", "a\x85b"),
        *(("lock", "s", wrong) for wrong in ("", "maybe", "None", "exclusive ", "unlock")),
        *(("lifetime", "s", wrong) for wrong in ("", "forever", "Connection")),
        ("number", "u", 1 << 20),
    ],
)
def test_a_value_out_of_range_is_named(key: str, kind: str, value: Any) -> None:
    with pytest.raises(InvalidArgs, match=f"^{key}: "):
        attach_options({key: Variant(kind, value)})


def test_a_reference_may_have_62_bytes() -> None:
    assert attach_options({"reference": Variant("s", "ä" * 31)}).reference == "ä".encode() * 31


def test_resize_takes_its_four() -> None:
    assert resize_options({}) == ResizeOptions()
    given = {
        "offset": Variant("t", 0),
        "size-limit": Variant("t", 512),
        "force": Variant("b", True),
        "allow-overlap": Variant("b", True),
    }
    assert resize_options(given) == ResizeOptions(
        offset=0, size_limit=512, force=True, allow_overlap=True
    )
    with pytest.raises(InvalidArgs, match="no such option"):
        resize_options({"lazy": Variant("b", True)})


@pytest.mark.parametrize(("mode", "writable"), [("r", False), ("rw", True)])
def test_open_knows_two_modes(mode: str, writable: bool) -> None:
    assert open_options(mode, {}) == (writable, None)


def test_open_takes_a_partition() -> None:
    assert open_options("r", {"partition": Variant("u", 3)}) == (False, 3)
    with pytest.raises(InvalidArgs, match=r"^partition: "):
        open_options("r", {"partition": Variant("t", 3)})


@pytest.mark.parametrize("kind", Lock)
def test_lock_knows_three_kinds(kind: Lock) -> None:
    assert lock_kind(str(kind)) is kind


@pytest.mark.parametrize("kind", ["", "None", "exclusive "])
def test_lock_knows_no_other_kind(kind: str) -> None:
    with pytest.raises(InvalidArgs, match=r"^lock: "):
        lock_kind(kind)


@pytest.mark.parametrize("mode", ["", "w", "R", "rw "])
def test_open_knows_no_other_mode(mode: str) -> None:
    with pytest.raises(InvalidArgs, match=r"^mode: "):
        open_options(mode, {})


def test_an_option_is_taken_once() -> None:
    options = Options({"lazy": Variant("b", True)})
    assert options.boolean("lazy") is True
    assert options.boolean("lazy") is None
    options.end()


_VARIANTS = st.one_of(
    st.booleans().map(lambda value: Variant("b", value)),
    st.integers(0, 2**32 - 1).map(lambda value: Variant("u", value)),
    st.integers(0, 2**64 - 1).map(lambda value: Variant("t", value)),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=70).map(
        lambda value: Variant("s", value.replace("\0", ""))
    ),
)


@given(st.dictionaries(st.one_of(st.sampled_from([*TYPES]), st.text(max_size=8)), _VARIANTS))
def test_nothing_but_the_errors_of_ours_comes_of_any_options(given: dict[str, Variant]) -> None:
    try:
        options = attach_options(given)
    except LoopError as exc:
        text = str(exc)
    else:
        text = ""
        assert len(options.reference) <= 62
    assert "\n" not in text


# Advice in errors

ADVISED: dict[str, dict[str, Callable[[dict[str, Variant]], object]]] = {
    "lazy": {"Detach": detach_options},
    "force": {"Resize": resize_options},
    "allow-overlap": {"Attach": attach_options, "Resize": resize_options},
}
"""The options that errors advise to pass, and the methods that raise those errors."""
COMMANDS = {
    "Detach": (("detach", "x"),),
    "Resize": (("resize", "x"),),
    "Attach": (("attach", "x"), ("hold", "x"), ("run", "x", "--", "true")),
}


def advised(path: Path) -> Iterator[str]:
    """Return the options that the errors of a module advise to pass."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield from re.findall(r"\bpass ([a-z-]+)", part.value)


def test_there_is_no_advice_but_what_is_tested() -> None:
    daemon = (CHECKOUT / "loopd" / "daemon").rglob("*.py")
    modules = [*(CHECKOUT / "loopd" / "loop").glob("*.py"), *daemon]
    assert {option for path in modules for option in advised(path)} == {*ADVISED}


@pytest.mark.parametrize(
    ("option", "method"), [(option, method) for option in ADVISED for method in ADVISED[option]]
)
def test_an_option_that_an_error_advises_works_there(option: str, method: str) -> None:
    ADVISED[option][method]({option: Variant("b", True)})
    for command, *rest in COMMANDS[method]:
        assert getattr(parse([command, f"--{option}", *rest]), option.replace("-", "_")) is True
    interface = ElementTree.parse(CHECKOUT / "dbus" / "org.example.Loop1.xml")
    described = [
        note.get("value", "")
        for member in interface.iter("method")
        if member.get("name") == method
        for note in member.iter("annotation")
    ]
    assert sum(f"{option} b" in text for text in described) == (1 if method == "Attach" else 2)
