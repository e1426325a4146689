# SPDX-License-Identifier: LGPL-2.1-or-later
"""How loopctl ends: every expected problem as an exit code and one sentence for people.

The sentence says what was wrong, in loopd's own words where they serve, and what to do next.
"""

import errno
import os
from enum import IntEnum

from loopd import errors
from loopd.errors import BusError

from .output import name, printable


class ExitCode(IntEnum):
    """The exit codes of all commands but `run` and `open`, which have RunExitCode."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    DENIED = 4
    NO_DEVICE = 5
    BUSY = 6
    FILE = 7
    LIMIT = 8
    NOT_SUPPORTED = 9


class RunExitCode(IntEnum):
    """Those of `run` and `open` beside their command's, as env(1) and timeout(1) have them."""

    FAILED = 125
    CANNOT_EXECUTE = 126
    NOT_FOUND = 127


SIGNALLED = 128
"""To be added to the number of the signal that ended a command."""

MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "failed for a reason that none of the others is",
    ExitCode.USAGE: "wrong arguments or options, or values that loopd does not take",
    ExitCode.UNAVAILABLE: "no bus, or no loopd on it",
    ExitCode.DENIED: "not allowed, or nobody was there to be asked",
    ExitCode.NO_DEVICE: "no such device, or more than one",
    ExitCode.BUSY: "the device, or that part of the file, is in use",
    ExitCode.FILE: "the file cannot be opened, or not be attached",
    ExitCode.LIMIT: "a limit is reached",
    ExitCode.NOT_SUPPORTED: "this loopd or this kernel cannot do that",
}

_CODES: dict[type[Exception], ExitCode] = {
    BusError: ExitCode.UNAVAILABLE,
    errors.InvalidArgs: ExitCode.USAGE,
    errors.AccessDenied: ExitCode.DENIED,
    errors.InteractiveAuthorizationRequired: ExitCode.DENIED,
    errors.UntrustedFilesystem: ExitCode.DENIED,
    errors.NoSuchDevice: ExitCode.NO_DEVICE,
    errors.UnknownObject: ExitCode.NO_DEVICE,
    errors.Ambiguous: ExitCode.NO_DEVICE,
    errors.DeviceBusy: ExitCode.BUSY,
    errors.Overlap: ExitCode.BUSY,
    errors.UnsupportedFile: ExitCode.FILE,
    errors.LimitsExceeded: ExitCode.LIMIT,
    errors.NotSupported: ExitCode.NOT_SUPPORTED,
    errors.UnknownMethod: ExitCode.NOT_SUPPORTED,
    errors.UnknownInterface: ExitCode.NOT_SUPPORTED,
}

# What loopd cannot know to advise: how loopctl is used.
_ADVICE: dict[type[Exception], str] = {
    errors.AccessDenied: "ask the administrator, or run loopctl as root",
    errors.NoSuchDevice: "'loopctl list' shows those that are there",
    errors.UnknownObject: "'loopctl list' shows those that are there",
    errors.Failed: "its log says more",
}
_FILE_ADVICE = {
    errno.ENOENT: "check the path",
    errno.EACCES: "it takes the right to read the file and to enter its directories",
    errno.EISDIR: "pass an image file or a block device",
    errno.ENXIO: "pass an image file or a block device",
    errno.ETXTBSY: "it is a program that runs: -r attaches it read-only",
    errno.EAGAIN: "another program, such as a file server, has a lease on it: try again",
}


def exit_code(exc: Exception) -> ExitCode:
    """The exit code for an error; that of a file carries its name, as os.open makes it."""
    if isinstance(exc, OSError):
        return ExitCode.FAILED if exc.filename is None else ExitCode.FILE
    return next((_CODES[cls] for cls in type(exc).__mro__ if cls in _CODES), ExitCode.FAILED)


def sentence(exc: Exception) -> str:
    """What to tell a person about an error."""
    if isinstance(exc, OSError):
        return _about_file(exc) if exc.filename is not None else f"cannot write: {exc.strerror}"
    if isinstance(exc, errors.InteractiveAuthorizationRequired):
        return "a password is needed: leave out --no-ask-password, or run loopctl as root"
    text = printable(str(exc)) or f"loopd answered {printable(getattr(exc, 'dbus_name', ''))}"
    if type(exc) is BusError:
        return f"{text}; is it running, and DBUS_SYSTEM_BUS_ADDRESS right?"
    advice = _ADVICE.get(type(exc))
    return f"{text}; {advice}" if advice else text


def about(target: str, exc: Exception) -> str:
    """As `sentence`, and what was named on the command line, where that does not say it."""
    shown, text = name(target), sentence(exc)
    return text if shown in text or isinstance(exc, OSError | BusError) else f"{shown}: {text}"


def _about_file(exc: OSError) -> str:
    name = printable(os.fsencode(exc.filename))
    text = f"cannot open {name}: {os.strerror(exc.errno or errno.EIO)}"
    advice = _FILE_ADVICE.get(exc.errno or 0)
    return f"{text}; {advice}" if advice else text
