# SPDX-License-Identifier: LGPL-2.1-or-later
"""AppArmor's profile: the parser takes it, it names loop devices alone, and loopd needs no more.

Few kernels that the tests run on have AppArmor, so its rules are applied here to a trace.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT, area
from tests.harness.deadline import Deadline
from tests.harness.images import MIB, make_gpt
from tests.harness.world import USER, make_world

PROFILE = CHECKOUT / "debian" / "usr.sbin.loopd"
_VARIABLES = {"PROC": "/proc/", "sys": "/sys/", "run": "/run/", "pid": "[0-9]*", "etc_ro": "/etc/"}
_RULE = re.compile(r"^ *(?:owner )?(/\S+) +([a-zA-Z]+),", re.MULTILINE)
_GLOB = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", ",": "|", "}": ")"}
_TRACED = re.compile(
    r"^\d+ +(?:openat\(.*, (?P<flags>O_[A-Z_|]+).* = \d+<(?P<opened>/[^>]+)>"
    r"|execve\(\"(?P<executed>[^\"]+)\".* = 0"
    r"|mmap\(.*PROT_EXEC.*, \d+<(?P<mapped>/[^>]+)>.* = 0x)",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def rules() -> list[tuple[re.Pattern[str], set[str]]]:
    """The rules on files, with those that are included: which paths, and what may be done."""
    if shutil.which("apparmor_parser") is None:
        pytest.skip("apparmor is not installed")
    text = subprocess.run(
        ["apparmor_parser", "--preprocess", PROFILE], check=True, capture_output=True, text=True
    ).stdout
    for name, value in _VARIABLES.items():
        text = text.replace(f"@{{{name}}}", value)
    return [
        (re.compile(_expression(path.replace("//", "/"))), {*permissions})
        for path, permissions in _RULE.findall(text)
        if "@" not in path
    ]


def _expression(glob: str) -> str:
    """A path of AppArmor's as a regular expression."""
    parts = re.findall(r"\[[^]]*\]|\*\*|.", glob)
    return "".join(each if each[0] == "[" else _GLOB.get(each, re.escape(each)) for each in parts)


def allowed(rules: list[tuple[re.Pattern[str], set[str]]], path: str) -> set[str]:
    return set().union(*(each for pattern, each in rules if pattern.fullmatch(path)))


@pytest.mark.parametrize("option", ["--skip-kernel-load", "--names"])
def test_the_parser_takes_it(option: str) -> None:
    if shutil.which("apparmor_parser") is None:
        pytest.skip("apparmor is not installed")
    done = subprocess.run(
        ["apparmor_parser", "--skip-cache", option, PROFILE],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("loopd\n" if option == "--names" else "")


@pytest.mark.parametrize(
    "path",
    [
        *("/dev/sda", "/dev/sda1", "/dev/nvme0n1", "/dev/nvme0n1p1", "/dev/vda", "/dev/dm-0"),
        *("/dev/mapper/home", "/dev/md0", "/dev/mem", "/dev/block/259:0", "/dev/fuse"),
        *("/dev/disk/by-id/x", "/dev/bus/usb/001/001", "/dev/kvm"),
    ],
)
def test_it_names_no_other_device(rules: list[tuple[re.Pattern[str], set[str]]], path: str) -> None:
    """Disks behind 259."""
    assert allowed(rules, path) == set()


@pytest.mark.parametrize("path", ["/usr/bin/sh", "/usr/bin/mount", "/bin/dash", "/tmp/x"])
def test_it_lets_nothing_else_be_run(
    rules: list[tuple[re.Pattern[str], set[str]]], path: str
) -> None:
    assert "x" not in allowed(rules, path)


@pytest.fixture(scope="module")
def trace() -> Iterator[tuple[str, str]]:
    """What loopd calls from its start to its end, with a table that is read by a child; a node."""
    with area("trace") as directory:
        file = directory / "trace"
        calls = "trace=openat,execve,mmap"
        with make_world(
            within=["strace", "-DDD", "-f", "-y", "-e", calls, "-o", str(file)]
        ) as world:
            caller = world.caller(USER)
            image = make_gpt(world.new_path(), size=16 * MIB, owner=USER)
            attached = caller.attach(image, partition_scan=True, sector_size=0, lock="shared")
            caller.open_device(attached.path, "rw", {"partition": 1}).close()
            caller.resize(attached.path)
            caller.detach(attached.path)
            pid = world.daemon.pid
        deadline = Deadline()
        while f"\n{pid} +++ exited" not in (text := file.read_text(errors="replace")):
            assert deadline.remaining, "strace does not end"
        yield text, attached.node


def test_loopd_does_nothing_that_it_does_not_name(
    rules: list[tuple[re.Pattern[str], set[str]]], trace: tuple[str, str]
) -> None:
    text, node = trace
    needed: dict[str, set[str]] = {}
    for each in _TRACED.finditer(text):
        path = each["opened"] or each["executed"] or each["mapped"]
        what = "x" if each["executed"] else "m" if each["mapped"] else "r"
        if each["flags"] and not each["flags"].startswith("O_RDONLY"):
            what = "w"
        # Of a process's own names for what it has.
        needed.setdefault(re.sub("^/proc/self/", "/proc/1/", path), set()).add(what)
    # The tests' own interpreter and modules are elsewhere than an installed loopd's.
    python = str(Path("/usr/bin/python3").resolve())
    own = re.compile(rf"{re.escape(str(CHECKOUT))}/|.*/python[0-9.]*$|.*/site-packages/")
    missing = {
        path: what - allowed(rules, path)
        for path, what in needed.items()
        if not own.match(path) and what - allowed(rules, path)
    }
    assert missing == {}
    assert allowed(rules, python) >= {"r", "x", "m"}
    assert needed[node] <= {"r", "w"}
    assert any(path.startswith("/dev/loop-control") for path in needed)
