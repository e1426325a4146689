# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make deb`: the package, what is in it, and what lintian says. tests/machine installs it."""

import io
import os
import pwd
import re
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import loopd
from tests.harness.area import CHECKOUT, area

pytestmark = pytest.mark.lint

OTHER_VERSION = f"{loopd.__version__}+test1"
RELATIONS = re.compile(r"\s*[,|]\s*")


@dataclass(frozen=True)
class Tree:
    """A copy of what is tracked, or would be, and the directories of the user who builds there."""

    top: Path
    user: str | None

    @property
    def checkout(self) -> Path:
        return self.top / "checkout"

    @classmethod
    def copy(cls, top: Path, user: str | None) -> "Tree":
        tree = cls(top, user)
        for directory in (tree.checkout, top / "home", top / "tmp"):
            directory.mkdir(parents=True)
        for name in listed():
            (tree.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, tree.checkout / name)
        if user:
            entry = pwd.getpwnam(user)
            for path in (top, *top.rglob("*")):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        return tree

    def run(self, *command: str | Path, umask: int = 0o022, **variables: str) -> str:
        """Run a program that must succeed; return what it printed to its standard output."""
        done = subprocess.run(
            command,
            cwd=self.checkout,
            user=self.user,
            umask=umask,
            # As in a shell of that user's, not in that of who runs these tests.
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": str(self.top / "home"),
                "TMPDIR": str(self.top / "tmp"),
                "LC_ALL": "C.UTF-8",
            }
            | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def files(self) -> dict[str, tuple[int, int]]:
        """All that is there but below build/, with size and time."""
        return {
            str(path.relative_to(self.top)): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.top.rglob("*")
            if not path.is_relative_to(self.checkout / "build") and not path.is_dir()
        }


@dataclass(frozen=True)
class Package:
    """A package that was built, and the tree that it was built from."""

    tree: Tree
    path: Path

    def fields(self) -> dict[str, str]:
        lines = self.tree.run("dpkg-deb", "--field", self.path).splitlines()
        pairs = (line.partition(": ") for line in lines if not line.startswith(" "))
        return {name: value for name, _, value in pairs}

    def members(self) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
        """What it installs, by names without the first slash."""
        data = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", self.path], check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return {
                member.name.removeprefix("./"): (
                    member,
                    file.read() if (file := archive.extractfile(member)) else b"",
                )
                for member in archive
            }


def listed() -> list[str]:
    names = subprocess.run(
        ["git", "-c", f"safe.directory={CHECKOUT}", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")[:-1]
    return [name for name in names if (CHECKOUT / name).exists()]


def build(tree: Tree, *arguments: str, umask: int = 0o022, **variables: str) -> Package:
    printed = tree.run("make", "--silent", "deb", *arguments, umask=umask, **variables)
    (line,) = printed.splitlines()
    return Package(tree, tree.checkout / line)


@pytest.fixture(scope="module")
def package() -> Iterator[Package]:
    """Built by an ordinary user, among what work leaves in a checkout."""
    if missing := [
        each for each in ("dh", "dh_apparmor", "dh_python3", "lintian") if not shutil.which(each)
    ]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with area("package") as directory:
        tree = Tree.copy(directory / "one", "nobody" if os.geteuid() == 0 else None)
        for name in ("loopd/__pycache__/x.pyc", ".venv/x", "build/old"):
            (tree.checkout / name).parent.mkdir(exist_ok=True, mode=0o777)
            (tree.checkout / name).touch()
        (tree.checkout / "build").chmod(0o777)
        before = tree.files()
        built = build(tree, umask=0o077)
        assert tree.files() == before, "written elsewhere than below build/"
        copied = tree.checkout / "build" / "deb" / "loopd"
        assert not [*copied.rglob("*.pyc"), *copied.rglob(".venv"), *copied.glob("build")]
        yield built


@pytest.fixture(scope="module")
def other(package: Package) -> Iterator[Package]:
    """Another version, built elsewhere, at another time, in other circumstances."""
    with area("package") as directory:
        tree = Tree.copy(directory / "another", None)
        for path in tree.checkout.rglob("*"):
            os.utime(path, (1_600_000_000, 1_600_000_000))
        yield build(tree, f"VERSION={OTHER_VERSION}", TZ="Asia/Tokyo", LC_ALL="C")


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (CHECKOUT / "debian" / "changelog").read_text()
    changes = re.findall(r"^## (\S+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project == loopd.__version__
    assert changelog.startswith(f"loopd ({loopd.__version__}) ")
    assert changes[0] == loopd.__version__
    # Where its name is for people to copy.
    assert f"/loopd_{loopd.__version__}_all.deb" in (CHECKOUT / "README.md").read_text()


def test_what_make_says_is_the_package(package: Package, other: Package) -> None:
    for each, version in ((package, loopd.__version__), (other, OTHER_VERSION)):
        assert each.path.name == f"loopd_{version}_all.deb"
        fields = each.fields()
        assert (fields["Package"], fields["Version"]) == ("loopd", version)
        assert fields["Architecture"] == "all"
        _, source = each.members()["usr/lib/loopd/loopd/__init__.py"]
        assert f'__version__ = "{version}"' in source.decode()


def test_it_depends_on_what_loopd_needs(package: Package) -> None:
    fields = package.fields()
    found = set(RELATIONS.split(fields["Depends"]))
    assert found == {
        "default-dbus-system-bus",
        "dbus-system-bus",
        "libblkid1",
        "polkitd",
        "python3-dbus-next",
        "python3-rich",
        "python3-systemd",
        "python3:any (>= 3.11~)",
    }
    assert set(RELATIONS.split(fields["Recommends"])) == {"libseccomp2", "udev"}


def test_it_holds_what_is_installed_and_nothing_compiled(package: Package) -> None:
    members = package.members()
    files = {name for name, (member, _) in members.items() if not member.isdir()}
    modules = {
        f"usr/lib/loopd/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "loopd").rglob("*.py")
    }
    documentation = {name for name in files if name.startswith("usr/share/doc/loopd/")}
    pages = list((CHECKOUT / "docs" / "man").glob("*.rst"))
    assert files - documentation == modules | {
        "etc/apparmor.d/usr.sbin.loopd",
        "usr/bin/loopctl",
        "usr/lib/loopd/image-owner",
        "usr/lib/loopd/loopd/org.example.Loop1.xml",
        "usr/lib/loopd/loopd/py.typed",
        *(f"usr/lib/systemd/system/{name}" for name in ("loopd.service", "loop-attach@.service")),
        *(f"usr/lib/udev/rules.d/{path.name}" for path in (CHECKOUT / "systemd").glob("*.rules")),
        "usr/sbin/loopd",
        "usr/share/bash-completion/completions/loopctl",
        "usr/share/dbus-1/interfaces/org.example.Loop1.xml",
        "usr/share/dbus-1/system-services/org.example.Loop1.service",
        "usr/share/dbus-1/system.d/org.example.Loop1.conf",
        "usr/share/fish/vendor_completions.d/loopctl.fish",
        *(f"usr/share/man/man{page.stem[-1]}/{page.stem}.gz" for page in pages),
        "usr/share/polkit-1/actions/org.example.loop1.policy",
        "usr/share/polkit-1/rules.d/org.example.loop1.rules",
        "usr/share/zsh/vendor-completions/_loopctl",
        # So that a new version of Python finds it compiled.
        "usr/share/python3/runtime.d/loopd.rtupdate",
    }
    for name, (member, _) in members.items():
        executable = member.isdir() or name in ("usr/bin/loopctl", "usr/sbin/loopd")
        executable |= name.endswith((".rtupdate", "/image-owner"))
        assert member.mode == (0o755 if executable else 0o644), name
        assert (member.uid, member.gid) == (0, 0), name


def test_it_says_how_and_by_what_it_is_started(package: Package) -> None:
    members = package.members()
    assert b"\nExecStart=/usr/sbin/loopd\n" in members["usr/lib/systemd/system/loopd.service"][1]
    activation = members["usr/share/dbus-1/system-services/org.example.Loop1.service"][1]
    assert b"\nExec=/usr/sbin/loopd\n" in activation
    for name in ("usr/sbin/loopd", "usr/bin/loopctl"):
        program = members[name][1].decode().splitlines()
        assert program[0] == "#!/usr/bin/python3 -I"
        assert 'sys.path.insert(0, "/usr/lib/loopd")' in program
    rules = members["usr/share/polkit-1/rules.d/org.example.loop1.rules"][1]
    assert b'"/usr/lib/loopd/image-owner"' in rules


def test_circumstances_are_not_in_it(package: Package, other: Package) -> None:
    """But for the version, two builds are the same to the last bit."""
    changed = {"usr/lib/loopd/loopd/__init__.py", "usr/share/doc/loopd/changelog.gz"}
    one, another = (
        [
            (name, member.mode, member.uid, member.gid, member.uname, member.gname, member.mtime)
            + (() if name in changed else (content,))
            for name, (member, content) in each.members().items()
        ]
        for each in (package, other)
    )
    assert one == another


def test_lintian_finds_nothing(package: Package) -> None:
    """Neither in the package nor in its source; what is overridden counts, too."""
    tree = Tree.copy(package.tree.top.with_name("source"), package.tree.user)
    tree.run("dpkg-source", "--build", ".")
    (source,) = tree.top.glob("*.dsc")
    arguments = ["--no-cfg", "--show-overrides", "--tag-display-limit=0"]
    assert package.tree.run("lintian", *arguments, "--fail-on=none", source, package.path) == ""
