# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's settings, from one TOML file whose keys are all optional.

A mistake in the file costs the setting that it is in, which is the default then, and no other.
Whether loopd starts with mistakes is for `daemon` to decide.
"""

import logging
import os
import re
import stat
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from loopd.fd import OwnedFd

log = logging.getLogger(__name__)

DEFAULT_PATH = Path("/etc/loopd.toml")

_MAX_FILE = 64 * 1024
_MAX_SHOWN = 64
"""Characters of a key that a mistake shows."""
# As the kernel has them in a mount table. What follows a dot there is not the type: a FUSE server
# chooses it.
_FILESYSTEM = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_FILESYSTEMS = 64
_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much anybody may have at a time; root is bound by those in all only."""

    most: ClassVar = 65536

    devices_per_user: int = 32
    devices: int = 1024
    holds_per_user: int = 64
    holds: int = 1024
    calls_per_connection: int = 16
    calls_per_user: int = 64
    calls: int = 256
    questions_per_user: int = 4
    """Questions to polkit that are open."""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long something may take, in seconds."""

    most: ClassVar = _DAY

    authorization: int = 10
    interactive_authorization: int = 300
    operation: int = 20
    """One operation on a device; D-Bus libraries wait 25 s for an answer."""
    exclusive_lock: int = 120
    """How long a device stays locked exclusively, but by root; udev gives up after 180 s."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings."""

    most: ClassVar = _DAY

    direct_io: bool = True
    """Whether Attach uses direct I/O unless the caller says."""
    trusted_filesystems: tuple[str, ...] = ()
    """Types to trust beside the built-in ones."""
    idle_timeout: int = 300
    """Seconds without anything to do after which loopd leaves."""
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)


_Settings = TypeVar("_Settings", bound=Config | Limits | Deadlines)


class _Mistake(Exception):
    """The reason, without file and key."""


def load(path: Path) -> tuple[Config, list[str]]:
    """Read the file; the defaults if there is none.

    Returns the settings, and a sentence for each mistake, with the file, the key and the reason.
    """
    mistakes: list[str] = []
    try:
        table = tomllib.loads(_text(path))
    except FileNotFoundError:
        table = {}
    except OSError as exc:
        return Config(), [_sentence(str(path), exc.strerror or str(exc))]
    except (_Mistake, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        return Config(), [_sentence(str(path), str(exc))]
    except RecursionError:
        return Config(), [_sentence(str(path), "is nested too deeply")]
    except ValueError:  # of int, by which tomllib reads them
        return Config(), [_sentence(str(path), "has a number with too many digits")]
    return _fill(Config(), table, str(path), mistakes), mistakes


def _text(path: Path) -> str:
    # Not to wait for somebody to open the other end of a FIFO, or for a terminal.
    with OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Mistake("is no regular file")
        content = os.pread(file.fileno(), _MAX_FILE + 1, 0)
    if len(content) > _MAX_FILE:
        raise _Mistake(f"is larger than {_MAX_FILE} bytes")
    return content.decode()


def _fill(settings: _Settings, table: dict[str, Any], where: str, mistakes: list[str]) -> _Settings:
    known = {item.name for item in fields(settings)}
    changes: dict[str, Any] = {}
    for key, value in table.items():
        place = f"{where}: {key[:_MAX_SHOWN]}"
        try:
            if key not in known:
                raise _Mistake("there is no such setting")
            default = getattr(settings, key)
            if isinstance(default, Limits | Deadlines):
                if not isinstance(value, dict):
                    raise _Mistake("has to be a table")
                changes[key] = _fill(default, value, place, mistakes)
            else:
                changes[key] = _checked(value, default, settings.most)
        except _Mistake as exc:
            mistakes.append(_sentence(place, str(exc)))
    return replace(settings, **changes)


def _checked(value: Any, default: Any, most: int) -> Any:
    """The value of a setting, as the default is kept. Raises _Mistake."""
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _Mistake("has to be a list of strings")
        if len(value) > _MAX_FILESYSTEMS:
            raise _Mistake(f"has to have {_MAX_FILESYSTEMS} names at most")
        for item in value:
            if not _FILESYSTEM.fullmatch(item):
                raise _Mistake(f"{item[:_MAX_SHOWN]!r} is no type of a filesystem, as nfs4 is")
        return tuple(value)
    if type(value) is not type(default):
        kind = "true or false" if isinstance(default, bool) else "a whole number"
        raise _Mistake(f"has to be {kind}")
    if isinstance(default, int) and not isinstance(default, bool) and not 1 <= value <= most:
        raise _Mistake(f"has to be from 1 to {most}")
    return value


def _sentence(place: str, reason: str) -> str:
    """One line, whatever is in the names that the file has for things."""
    return "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in f"{place}: {reason}"
    )


def limited(config: Config, fds: int, fds_per_device: int, what: str) -> Config:
    """The settings with no more devices and Holds than so many fds are enough for."""
    limits = config.limits
    # A Hold is one. Those beyond half of the fds give way to devices, and devices to all others.
    holds = max(min(limits.holds, max(fds - limits.devices * fds_per_device, fds // 2)), 1)
    devices = max(min(limits.devices, (fds - holds) // fds_per_device), 1)
    if (devices, holds) != (limits.devices, limits.holds):
        log.warning("%s enough for %d devices and %d Holds only", what, devices, holds)
    return replace(config, limits=replace(limits, devices=devices, holds=holds))
