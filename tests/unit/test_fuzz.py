# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fuzz targets on their seeds, on what atheris has kept, and on what hypothesis makes of it."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import CORPUS, MAX_FILES, MAX_SIZE, known
from tests.fuzz.targets import TARGETS
from tests.harness.area import CHECKOUT
from tests.harness.daemon import LIBRARIES

targets = pytest.mark.parametrize("name", TARGETS)


@st.composite
def changed(draw: st.DrawFn, inputs: list[bytes]) -> bytes:
    """Some of an input that was kept, with other bytes in a place or two, or with another's end."""
    data = draw(st.sampled_from(inputs))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(start + 16, len(data))))
        data = data[:start] + draw(st.binary(max_size=16)) + data[end:]
    if draw(st.booleans()):
        other = draw(st.sampled_from(inputs))
        data = data[: draw(st.integers(0, len(data)))] + other[draw(st.integers(0, len(other))) :]
    return data


@pytest.mark.parametrize(
    ("name", "library"),
    # One of them reads whole messages, and another library may read them otherwise.
    [*((name, LIBRARIES[0]) for name in TARGETS), ("options", LIBRARIES[1])],
)
def test_what_is_known_breaks_nothing(name: str, library: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--replay", "--library", library],
        cwd=CHECKOUT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@targets
def test_nothing_near_what_is_known_breaks_anything(name: str) -> None:
    @settings(max_examples=300)
    @given(changed(known(name)) | st.binary(max_size=600))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()


@targets
def test_what_is_kept_is_small(name: str) -> None:
    sizes = [path.stat().st_size for path in (CORPUS / name).iterdir()]
    assert 0 < len(sizes) <= MAX_FILES
    assert max(sizes) <= MAX_SIZE
