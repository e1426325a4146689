# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator's settings, from one TOML file whose keys are all optional."""

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

DEFAULT_PATH = Path("/etc/loopd.toml")


class BadConfig(Exception):
    """The file, the key and the reason, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much anybody may have at a time; root is bound by those in all only."""

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

    authorization: int = 10
    interactive_authorization: int = 300
    operation: int = 20
    """One operation on a device; D-Bus libraries wait 25 s for an answer."""
    exclusive_lock: int = 120
    """How long a device stays locked exclusively, but by root; udev gives up after 180 s."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings."""

    direct_io: bool = True
    """Whether Attach uses direct I/O unless the caller says."""
    trusted_filesystems: tuple[str, ...] = ()
    """Types to trust beside the built-in ones."""
    idle_timeout: int = 300
    """Seconds without anything to do after which loopd leaves."""
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)


_Settings = TypeVar("_Settings", bound=Config | Limits | Deadlines)


def load(path: Path) -> Config:
    """Read the file; the defaults if there is none.

    Raises BadConfig.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise BadConfig(f"{path}: {reason}") from exc
    return _fill(Config(), table, str(path))


def _fill(settings: _Settings, table: dict[str, Any], where: str) -> _Settings:
    known = {item.name for item in fields(settings)}
    changes = {}
    for key, value in table.items():
        place = f"{where}: {key}"
        if key not in known:
            raise BadConfig(f"{place}: there is no such setting")
        default = getattr(settings, key)
        if isinstance(default, Limits | Deadlines):
            if not isinstance(value, dict):
                raise BadConfig(f"{place}: has to be a table")
            value = _fill(default, value, place)
        elif isinstance(default, tuple):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise BadConfig(f"{place}: has to be a list of strings")
            value = tuple(value)
        elif type(value) is not type(default):
            kind = "true or false" if isinstance(default, bool) else "a whole number"
            raise BadConfig(f"{place}: has to be {kind}")
        elif isinstance(default, int) and not isinstance(default, bool) and value < 1:
            raise BadConfig(f"{place}: has to be at least 1")
        changes[key] = value
    return replace(settings, **changes)
