# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root directories of Debian releases, made by mmdebstrap once and kept outside of the checkout.

A root is never booted as it stands: machines lay a file system of their own over it, so that any
number of test runs may use it at once.  It is made under another name and then renamed, so what has
the right name is whole.  Run as a program, this module makes those that are missing.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.harness.leaks import adopt_orphans

CACHE = Path("/var/cache/loopd-tests")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"
USERS = {"root": 0, "alice": 1000, "bob": 1001, "carol": 1002}
"""Ordinary users that each root has, and their uids."""

_PACKAGES = (
    "systemd systemd-sysv udev polkitd libpam-systemd dbus-user-session kmod mount util-linux "
    "fdisk e2fsprogs udisks2 python3 python3-dbus-next python3-gi python3-pyudev python3-rich "
    "python3-systemd"
).split()

_OPTIONS = (
    "--variant=minbase",
    "--skip=cleanup/apt/lists,check/empty",
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=force-unsafe-io",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)

# What nobody needs who is there for a minute, and what would take its time.
_MASKED = (
    "apt-daily.timer apt-daily-upgrade.timer console-getty.service dpkg-db-backup.timer "
    "e2scrub_all.timer e2scrub_reap.service fstrim.timer getty.target systemd-firstboot.service "
    "systemd-networkd.service systemd-resolved.service systemd-timesyncd.service "
    "systemd-tmpfiles-clean.timer systemd-update-utmp.service systemd-update-utmp-runlevel.service"
)

# UserRemoved comes that long after the last session, and nobody wants to wait for it.
_CUSTOMIZE = (
    *(
        f'chroot "$1" useradd --uid={uid} -m -s /bin/sh {user}'
        for user, uid in USERS.items()
        if uid != 0
    ),
    'mkdir -p "$1/etc/systemd/logind.conf.d"',
    'printf "[Login]\\nUserStopDelaySec=0\\n" >"$1/etc/systemd/logind.conf.d/tests.conf"',
    f'for unit in {_MASKED}; do ln -sf /dev/null "$1/etc/systemd/system/$unit"; done',
    # Started before udevd it would hear nothing from it; the bus starts it when it is needed.
    'rm "$1/etc/systemd/system/graphical.target.wants/udisks2.service"',
    ': >"$1/etc/machine-id"',
)


@dataclass(frozen=True, kw_only=True)
class Release:
    """A release of Debian, and what makes its root differ from the others'."""

    name: str
    bus: str
    python: str
    systemd: int
    packages: tuple[str, ...] = ()
    """Beside those that all have."""
    hooks: tuple[str, ...] = ()
    """Options of mmdebstrap's, beside those that all have."""

    @property
    def command(self) -> list[str]:
        """What makes the root, but for where."""
        include = ",".join(sorted((*_PACKAGES, *self.packages, self.bus)))
        hooks = [f"--customize-hook={hook}" for hook in _CUSTOMIZE]
        return ["mmdebstrap", *_OPTIONS, f"--include={include}", *hooks, *self.hooks, self.name]

    @property
    def path(self) -> Path:
        """Where its root is, or will be; another way of making it is another path."""
        digest = hashlib.sha256("\0".join(self.command).encode()).hexdigest()[:12]
        return CACHE / f"{self.name}-{digest}"


RELEASES = {
    release.name: release
    for release in (
        Release(name="bookworm", bus="dbus-daemon", python="3.11", systemd=252),
        Release(name="trixie", bus="dbus-broker", python="3.13", systemd=257),
    )
}

# With its own kernel, with what assembles things from disks, and with what runs tests; by an initrd
# for the disk of `emulated` alone, which is half as large as one for all.
_KERNEL_PACKAGES = (
    "btrfs-progs busybox cryptsetup-bin initramfs-tools linux-image-cloud-amd64 lvm2 mdadm "
    "python3-pytest xfsprogs zstd"
).split()
_AGENT = Path(__file__).with_name("agent_program.py").read_text()
_AGENT_UNIT = """[Unit]
Requires=dev-virtio\\x2dports-%N.device
After=dev-virtio\\x2dports-%N.device systemd-logind.service dbus.service polkit.service
[Service]
ExecStart=/usr/bin/python3 -I /usr/local/lib/agent.py /dev/virtio-ports/%N
"""
# A session is active for polkit where it has a seat and a virtual terminal of its own.
_SESSION = """PAMName=login
User=alice
Environment=XDG_SEAT=seat0 XDG_VTNR=1 XDG_SESSION_CLASS=user XDG_SESSION_TYPE=tty
ExecStartPre=+chown alice /dev/virtio-ports/%N
"""
_UNITS = "$1/etc/systemd/system"
_KERNEL_HOOKS = (
    '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d"',
    '--essential-hook=echo MODULES=list >"$1/etc/initramfs-tools/conf.d/tests"',
    '--essential-hook=printf "virtio_pci\nvirtio_blk\next4\n" >"$1/etc/initramfs-tools/modules"',
    f"--customize-hook=cat >$1/usr/local/lib/agent.py <<'END'\n{_AGENT}END",
    f"--customize-hook=cat >{_UNITS}/root.service <<'END'\n{_AGENT_UNIT}END",
    f"--customize-hook=cat >{_UNITS}/alice.service <<'END'\n{_AGENT_UNIT}{_SESSION}END",
    f"--customize-hook=ln -s ../root.service {_UNITS}/multi-user.target.wants/root.service",
)

KERNELS = {
    name: replace(release, packages=tuple(_KERNEL_PACKAGES), hooks=_KERNEL_HOOKS)
    for name, release in RELEASES.items()
}
"""The releases as `emulated` boots them."""


class CannotMakeError(Exception):
    """There is no root, and none can be made here."""


def make(release: Release) -> Path:
    """Return the root of a release, made now if there is none."""
    if release.path.is_dir():
        return release.path
    CACHE.mkdir(exist_ok=True)
    with _locked(CACHE / f"{release.name}.lock"):
        # Whoever had the lock has made it, or was killed at it.
        if not release.path.is_dir():
            unfinished = CACHE / f"{release.name}.unfinished"
            _remove(unfinished)
            try:
                _mmdebstrap(release, unfinished)
                unfinished.rename(release.path)
            finally:
                _remove(unfinished)
    return release.path


def _mmdebstrap(release: Release, target: Path) -> None:
    keyring = [f"--keyring={KEYRING}"]
    try:
        done = subprocess.run(
            [*release.command, *keyring, str(target), MIRROR],
            check=False,
            # mmdebstrap does not like a relative one, and a virtual environment is none of its own.
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError as exc:
        raise CannotMakeError(f"no {exc.filename}") from exc
    if done.returncode != 0:
        raise CannotMakeError(f"mmdebstrap could not make {release.name}: {done.stdout[-2000:]}")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


if __name__ == "__main__":
    os.nice(19)
    # What they leave is not for the tests to wait for.
    adopt_orphans()
    for name in sys.argv[1:] or RELEASES:
        print(make(RELEASES[name]), flush=True)
