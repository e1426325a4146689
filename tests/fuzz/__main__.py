# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m tests.fuzz TARGET [SECONDS]: run a target under atheris, and keep what it found.

New inputs that reach something new are put into tests/fuzz/corpus/TARGET.  One that fails is left
where it says, and the exit status is not 0.  Wants the extra `fuzz`.
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.seeds import SEEDS
from tests.harness.area import CHECKOUT
from tests.harness.daemon import LIBRARIES

CORPUS = Path(__file__).with_name("corpus")
MAX_FILES = 60
MAX_SIZE = 4096
_OURS = str(CHECKOUT / "loopd")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("seconds", nargs="?", type=int, default=60)
    parser.add_argument("--library", choices=LIBRARIES, help="the D-Bus library to use")
    parser.add_argument("--replay", action="store_true", help="only replay the corpus")
    parser.add_argument("--into", metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for library in LIBRARIES:
        if arguments.library and library != arguments.library:
            sys.modules[library] = None  # type: ignore[assignment]
    if arguments.into:
        _run(arguments.target, arguments.seconds, Path(arguments.into))
    target = _target(arguments.target)
    if arguments.replay:
        for data in known(arguments.target):
            target(data)
        return
    sys.exit(_fuzz(arguments.target, target))


def known(name: str) -> list[bytes]:
    """The seeds and the corpus of a target."""
    return [*SEEDS[name], *(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))]


def _target(name: str) -> Callable[[bytes], None]:
    from tests.fuzz.targets import TARGETS

    if name not in TARGETS:
        sys.exit(f"no such target: {name}, but {', '.join(TARGETS)}")
    return TARGETS[name]


def _fuzz(name: str, target: Callable[[bytes], None]) -> int:
    """Have a child fuzz, and keep of what there is now as little as reaches all of it."""
    corpus = CORPUS / name
    corpus.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as found:
        for number, data in enumerate(SEEDS[name]):
            Path(found, f"seed{number}").write_bytes(data)
        # libFuzzer ends the process that it runs in.
        status = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--into", found], check=False
        ).returncode
        candidates = {path.read_bytes() for path in [*corpus.iterdir(), *Path(found).iterdir()]}
    candidates -= set(SEEDS[name])
    if status == 0:
        chosen = smallest(target, (each for each in candidates if len(each) <= MAX_SIZE))
        for path in corpus.iterdir():
            path.unlink()
        for data in chosen:
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        print(f"{name}: {len(candidates)} inputs, {len(chosen)} kept")
    return status


def _run(name: str, seconds: int, found: Path) -> None:
    """Fuzz, in this process, to its end."""
    import atheris

    with atheris.instrument_imports(include=["loopd", "dbus_next"]):
        target = _target(name)
    atheris.Setup(
        [
            *(sys.argv[0], str(found), str(CORPUS / name)),
            *(f"-max_total_time={seconds}", f"-max_len={MAX_SIZE}", "-print_final_stats=1"),
            *(f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{name}-", "-timeout=10"),
        ],
        target,
    )
    atheris.Fuzz()


def smallest(target: Callable[[bytes], None], inputs: Iterable[bytes]) -> list[bytes]:
    """Choose inputs that together reach what all of them do, the short ones first.

    Others fill the rest: what libFuzzer sees is finer than this.
    """
    reached: set[Any] = set()
    chosen: list[bytes] = []
    others: list[bytes] = []
    for data in sorted(inputs, key=lambda each: (len(each), each)):
        new = arcs(target, data)
        (others if new <= reached else chosen).append(data)
        reached |= new
    return [*chosen, *others][:MAX_FILES]


def arcs(target: Callable[[bytes], None], data: bytes) -> set[Any]:
    """The steps from line to line of loopd that an input causes, and about how often each."""
    counts: dict[tuple[str, int, int], int] = {}

    def enter(entered: FrameType, event: str, argument: object) -> Any:
        name = entered.f_code.co_filename
        if not name.startswith(_OURS):
            return None
        before = 0

        def step(at: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            arc = (name, before, -at.f_lineno if event == "return" else at.f_lineno)
            counts[arc] = counts.get(arc, 0) + 1
            before = at.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        with contextlib.suppress(Exception):
            target(data)
    finally:
        sys.settrace(None)
    return {(arc, min(count.bit_length(), 3)) for arc, count in counts.items()}


if __name__ == "__main__":
    os.chdir(CHECKOUT)
    main()
