# SPDX-License-Identifier: LGPL-2.1-or-later
"""The linters, and what the files of a system must say, on what stands in the checkout."""

import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.harness.area import CHECKOUT

pytestmark = pytest.mark.lint

XML = [
    *sorted(CHECKOUT.glob("dbus/*.xml")),
    *sorted(CHECKOUT.glob("dbus/*.conf")),
    *sorted(CHECKOUT.glob("polkit/*.policy")),
]
SHELL = [
    CHECKOUT / ".ci" / "run",
    CHECKOUT / "polkit" / "image-owner",
    *sorted(CHECKOUT.glob("[!.]*/**/*.sh")),
    *sorted(CHECKOUT.glob("debian/loopd.p*")),
    *sorted(CHECKOUT.glob("loopd/cli/completion/*.bash")),
]


def passes(*command: str | Path) -> None:
    """Run a linter in the checkout, and fail with what it says."""
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


# No caches: these tests may run as root in someone's checkout.


def test_ruff_finds_nothing() -> None:
    passes(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_ruff_would_format_nothing() -> None:
    passes(sys.executable, "-m", "ruff", "format", "--check", "--no-cache", ".")


def test_mypy_finds_nothing() -> None:
    passes(sys.executable, "-m", "mypy", "--cache-dir=/dev/null")


@pytest.mark.parametrize("path", XML, ids=name)
def test_xml_is_well_formed(path: Path) -> None:
    passes("xmllint", "--noout", "--nonet", path)


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    passes("shellcheck", path)


def test_every_file_names_its_licence() -> None:
    tracked = subprocess.run(
        ["git", "-c", f"safe.directory={CHECKOUT}", "ls-files", "-z"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")[:-1]
    # The licence itself, what is read by people as it stands, and what takes no remarks.
    exempt = {"LICENSE", "README.md", "debian/changelog", "debian/source/format"}
    without = [
        file
        for file in tracked
        # What fuzzing has found is bytes of no language, and pictures are, too.
        if file not in exempt
        and not file.startswith("tests/fuzz/corpus/")
        and not file.endswith(".png")
        and (path := CHECKOUT / file).exists()
        if "SPDX-License-Identifier: LGPL-2.1-or-later" not in path.read_text()[:400]
    ]
    assert without == []


def test_polkit_is_asked_for_what_the_interface_promises() -> None:
    """Each action: who is answered how (any, inactive, active), and what it implies."""
    found = {}
    for action in ElementTree.parse(CHECKOUT / "polkit/org.example.loop1.policy").iter("action"):
        defaults = [
            action.findtext(f"defaults/allow_{who}") for who in ("any", "inactive", "active")
        ]
        implied = action.findtext("annotate[@key='org.freedesktop.policykit.imply']")
        found[action.get("id", "").removeprefix("org.example.loop1.")] = (*defaults, implied)
    attach = "org.example.loop1.attach"
    assert found == {
        "attach": ("auth_admin", "auth_admin", "yes", None),
        "attach-block-device": ("auth_admin", "auth_admin", "auth_admin", attach),
        "attach-untrusted-filesystem": ("auth_admin", "auth_admin", "auth_admin", attach),
        "keep": ("auth_admin", "auth_admin", "auth_admin_keep", attach),
        "open-device": ("auth_admin", "auth_admin", "yes", None),
        "open-read-only-device": ("auth_admin", "auth_admin", "auth_admin_keep", None),
        "open-others-device": ("auth_admin", "auth_admin", "auth_admin", None),
        "manage-others": ("auth_admin", "auth_admin", "auth_admin_keep", None),
    }


# Installation below DESTDIR, as a packager does it


def make(target: str, root: Path) -> None:
    # A umask that would keep ordinary users out, had make no will of its own.
    passes("sh", "-c", f"umask 077 && make {target} DESTDIR={root} PREFIX=/usr")


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if not path.is_dir()]


def test_what_is_installed_can_be_read_by_all_and_written_by_its_owner(tmp_path: Path) -> None:
    make("install", tmp_path)
    programs = {"usr/sbin/loopd", "usr/bin/loopctl", "usr/lib/loopd/image-owner"}
    for path in files(tmp_path):
        expected = 0o755 if str(path.relative_to(tmp_path)) in programs else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    for path in (tmp_path / "usr").rglob("*/"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755, path


def test_uninstall_leaves_no_file(tmp_path: Path) -> None:
    make("install", tmp_path)
    assert files(tmp_path)
    make("uninstall", tmp_path)
    assert files(tmp_path) == []


UNITS = {"loopd.service": 18, "loop-attach@.service": 34}
"""Each unit, and ten times the exposure that systemd may find in it."""


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the installed units, which name programs that are on this machine."""
    root = tmp_path_factory.mktemp("installed")
    make("install", root)
    directory = root / "usr/lib/systemd/system"
    for unit in directory.iterdir():
        text = unit.read_text()
        for program in ("/usr/sbin/loopd", "/usr/bin/loopctl"):
            text = text.replace(f"={program}", f"={root}{program}")
        unit.write_text(text)
    return directory


def test_every_unit_is_checked(units: Path) -> None:
    assert {path.name for path in units.iterdir()} == {*UNITS}


@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_the_unit(units: Path, name: str) -> None:
    passes("systemd-analyze", "verify", "--man=no", units / name)


@pytest.mark.parametrize(("name", "exposure"), UNITS.items())
def test_the_unit_gives_up_what_it_can(units: Path, name: str, exposure: int) -> None:
    judge = ("systemd-analyze", "security", "--no-pager", "--offline=yes")
    passes(*judge, f"--threshold={exposure}", units / name)
