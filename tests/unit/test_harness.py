# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness's own codec, images and rules, held against independent implementations."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import images, requirement, wire
from tests.harness.area import CHECKOUT
from tests.harness.asynchronous import run_async
from tests.harness.caller import options
from tests.harness.process import Process
from tests.harness.scheduling import ByFile
from tests.harness.wire import Variant

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
BASIC = {
    "y": st.integers(0, 2**8 - 1),
    "b": st.booleans(),
    "n": st.integers(-(2**15), 2**15 - 1),
    "q": st.integers(0, 2**16 - 1),
    "i": st.integers(-(2**31), 2**31 - 1),
    "u": st.integers(0, 2**32 - 1),
    "x": st.integers(-(2**63), 2**63 - 1),
    "t": st.integers(0, 2**64 - 1),
    "d": st.floats(allow_nan=False),
    "s": TEXT,
    "o": st.sampled_from(["/", "/a", "/org/example/Loop1/device/loop3_41"]),
    "g": st.sampled_from(["", "s", "a{sv}", "(ybn)"]),
}


@st.composite
def typed_values(draw: st.DrawFn, depth: int = 3) -> Variant:
    """Draw a value of any type, with its signature."""
    kind = draw(st.sampled_from([*BASIC, *("av({" if depth else "")]))
    inner = typed_values(depth=depth - 1)
    if kind == "v":
        return Variant("v", draw(inner))
    if kind == "(":
        parts = draw(st.lists(inner, min_size=1, max_size=3))
        signature = "".join(part.signature for part in parts)
        return Variant(f"({signature})", tuple(part.value for part in parts))
    if kind == "a":
        content = draw(inner)
        value = [content.value] * draw(st.integers(0, 3))
        return Variant("a" + content.signature, bytes(value) if content.signature == "y" else value)
    if kind == "{":
        key, content = draw(st.sampled_from("ysu")), draw(inner)
        keys = draw(st.lists(BASIC[key], max_size=3, unique=True))
        return Variant(f"a{{{key}{content.signature}}}", dict.fromkeys(keys, content.value))
    return Variant(kind, draw(BASIC[kind]))


@given(typed_values())
def test_what_was_marshalled_comes_back(variant: Variant) -> None:
    data = wire.marshal(variant.signature, [variant.value])
    assert wire.unmarshal(variant.signature, data) == (variant.value,)


@given(typed_values(), st.integers(1, 2**32 - 1))
def test_glib_reads_the_same_message(variant: Variant, serial: int) -> None:
    gio = pytest.importorskip("gi.repository.Gio")
    data = wire.build(
        serial=serial,
        flags=wire.ALLOW_INTERACTIVE_AUTHORIZATION,
        path="/org/example/Loop1",
        interface="org.example.Loop1",
        member="Attach",
        destination="org.example.Loop1",
        signature=variant.signature,
        body=wire.marshal(variant.signature, [variant.value]),
        unix_fds=3,
    )
    assert wire.frame_length(data[:16]) == len(data)
    message = gio.DBusMessage.new_from_blob(data, gio.DBusCapabilityFlags.UNIX_FD_PASSING)
    assert message.get_serial() == serial
    assert message.get_signature() == variant.signature
    assert message.get_num_unix_fds() == 3
    message.set_num_unix_fds(0)  # or it wants them attached
    blob = bytes(message.to_blob(gio.DBusCapabilityFlags.UNIX_FD_PASSING))
    ours, theirs = wire.parse(data), wire.parse(blob)
    assert theirs.body == ours.body == (variant.value,)
    assert (theirs.path, theirs.member, theirs.flags) == (ours.path, ours.member, ours.flags)


def test_split_finds_the_complete_types() -> None:
    assert wire.split("ha{sv}(a(ii)s)aayv") == ["h", "a{sv}", "(a(ii)s)", "aay", "v"]


def test_plain_drops_the_types_of_variants() -> None:
    typed = ({"a": Variant("(sv)", ("b", Variant("u", 3)))}, [Variant("s", "c")])
    assert wire.plain(typed) == ({"a": ("b", 3)}, ["c"])


def test_options_get_the_types_of_attach_and_a_variant_keeps_its_own() -> None:
    assert options({"reference": "x"}, read_only=True, offset=Variant("s", "0")) == {
        "reference": Variant("s", "x"),
        "read-only": Variant("b", True),
        "offset": Variant("s", "0"),
    }


@given(st.integers(0, 5000), st.integers(0, 100))
def test_a_pattern_is_the_same_wherever_one_starts(offset: int, length: int) -> None:
    assert images.pattern(offset, length) == images.pattern(0, 6000)[offset : offset + length]


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_partx_reads_the_partition_table(tmp_path: Path, sector_size: int) -> None:
    parts = [(64, 64), (128, 16)]
    image = images.make_gpt(tmp_path / "gpt", parts, sector_size=sector_size)
    columns = ["--raw", "--noheadings", "--bytes", "--output", "NR,START,SIZE"]
    shown = subprocess.run(
        ["partx", "--sector-size", str(sector_size), *columns, image],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # partx counts in 512 bytes, whatever the sector.
    assert [list(map(int, line.split())) for line in shown.splitlines()] == [
        [number, start * sector_size // 512, count * sector_size]
        for number, (start, count) in enumerate(parts, 1)
    ]


def test_a_process_is_ended_with_its_block_and_its_output_kept() -> None:
    with Process(["sh", "-c", "echo hello; exec sleep 1000"], name="sleeper") as process:
        pid = process.pid
    assert process.status == -15
    assert process.log.text in ("", "hello\n")  # it may not have got that far
    assert not os.path.exists(f"/proc/{pid}")


def test_a_process_that_will_not_end_is_killed() -> None:
    # The shell says when it has come to ignore the signal; its own input is the way.
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as ready:
        script = "trap '' TERM; echo >&0; while :; do sleep 9; done"
        process = Process(["sh", "-c", script], name="stubborn", stdin=write_end)
        os.close(write_end)
        ready.readline()
        with pytest.raises(TimeoutError):
            process.stop(timeout=0)
        assert process.status == -9


def test_a_task_left_behind_is_noticed() -> None:
    async def forget() -> None:
        # Kept here, or it would be collected at any time.
        forget.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="left behind"):
        run_async(forget())


@pytest.mark.parametrize(
    ("require", "file", "outcome"),
    [
        ("root,bus", "tests/bus/test_x.py", "failed"),
        ("root,bus", "tests/unit/test_x.py", "skipped"),
        ("", "tests/bus/test_x.py", "skipped"),
        ("root", "elsewhere/test_x.py", "skipped"),
    ],
)
def test_a_skip_fails_where_it_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, require: str, file: str, outcome: str
) -> None:
    monkeypatch.setenv("LOOPD_REQUIRE", require)
    node = SimpleNamespace(path=CHECKOUT / file, get_closest_marker=lambda _name: None)
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, "no such tool"))
    requirement.enforce(node, report)  # type: ignore[arg-type]
    assert report.outcome == outcome
    assert (outcome == "skipped") or "no such tool" in str(report.longrepr)


def test_pytest_itself_fails_a_forbidden_skip(tmp_path: Path) -> None:
    file = tmp_path / "test_skips.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.lint\n"
        "def test_lint(): pytest.skip('no linter here')\n"
        "def test_other(): pytest.skip('quite all right')\n"
        "@pytest.mark.lint\n"
        "@pytest.mark.xfail\n"
        "def test_expected(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = lint: needs linters\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", file],
        cwd=tmp_path,
        env=os.environ | {"LOOPD_REQUIRE": "lint", "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 skipped, 1 xfailed" in run.stdout, run.stdout + run.stderr
    assert "not allowed by LOOPD_REQUIRE (lint): " in run.stdout
    assert "no linter here" in run.stdout


class Worker:
    """A process of `pytest -n`, as far as the scheduler sees."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.given: list[int] = []
        """The tests that it has not run yet."""

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


@pytest.mark.parametrize("rest", [2, 6], ids=["both are nearly done", "one is half done"])
def test_machines_are_booted_when_no_other_process_has_tests_to_run_in_company(rest: int) -> None:
    """Else that one would wait for their end, with a file half done."""
    files = {"tests/root/test_a.py": 6, "tests/root/test_b.py": rest, "tests/machine/test_m.py": 4}
    files |= {"tests/machine/test_n.py": 4, **{f"tests/unit/test_{each}.py": 3 for each in "cdef"}}
    tests = [f"{file}::test_{index}" for file, count in files.items() for index in range(count)]
    config = SimpleNamespace(
        getvalue=lambda _: ["popen"] * 2, option=SimpleNamespace(loadscopereorder=False)
    )
    scheduler = ByFile(config, SimpleNamespace(loadscopesched=lambda *_: None))  # type: ignore[arg-type]
    workers: list[Any] = [Worker("first"), Worker("second")]
    for worker in workers:
        scheduler.add_node(worker)
    for worker in workers:
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    ran: list[str] = []
    while scheduler.has_pending:
        # A worker runs a test when it knows the next one. Those of the first take twice as long.
        for worker in [workers[0], workers[1], workers[1]]:
            if len(worker.given) > 1 or (worker.given and worker.shutting_down):
                index = worker.given.pop(0)
                if "machine" in tests[index]:
                    (other,) = (each for each in workers if each is not worker)
                    assert not [tests[each] for each in other.given if "root" in tests[each]]
                ran.append(tests[index])
                scheduler.mark_test_complete(worker, index)
    assert sorted(ran) == sorted(tests)
