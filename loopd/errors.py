# SPDX-License-Identifier: LGPL-2.1-or-later
"""The family of errors a caller can be told, each with its D-Bus name declared once.

Everything else that is raised in the daemon is a bug or an errno nobody can say more about;
`from_os_error` names the latter. The client rebuilds the same classes with `by_name`.
"""

import errno
import os

_LOOP1 = "org.example.Loop1.Error."
_BUS = "org.freedesktop.DBus.Error."
_ERRNO = "System.Error."


class LoopError(Exception):
    """Base of all errors with a name on the bus; the text is one sentence for people."""

    dbus_name: str


class BusError(Exception):
    """The bus cannot be reached or was lost: there is nobody to tell, or to be told by."""


class Failed(LoopError):
    """Something went wrong inside the daemon; its log says what."""

    dbus_name = _LOOP1 + "Failed"


class NoSuchDevice(LoopError):
    """No bound loop device is meant by what was passed."""

    dbus_name = _LOOP1 + "NoSuchDevice"


class DeviceBusy(LoopError):
    """The device is mounted, exclusively open or otherwise in use."""

    dbus_name = _LOOP1 + "DeviceBusy"


class Ambiguous(LoopError):
    """More than one device is meant by what was passed."""

    dbus_name = _LOOP1 + "Ambiguous"


class Overlap(LoopError):
    """Another device maps the same bytes and one can write, or a program has locked the file."""

    dbus_name = _LOOP1 + "Overlap"


class UnsupportedFile(LoopError):
    """The passed fd is of a kind, or opened in a way, that loopd does not accept."""

    dbus_name = _LOOP1 + "UnsupportedFile"


class UntrustedFilesystem(LoopError):
    """The administrator does not allow files from this filesystem, or from what it stands on."""

    dbus_name = _LOOP1 + "UntrustedFilesystem"


class NotSupported(LoopError):
    """This kernel, system or version of loopd cannot do it."""

    dbus_name = _LOOP1 + "NotSupported"


class TimedOut(LoopError):
    """The kernel did not finish within the deadline."""

    dbus_name = _LOOP1 + "TimedOut"


class InvalidArgs(LoopError):
    """An argument or option is malformed or out of range; the text names it."""

    dbus_name = _BUS + "InvalidArgs"


class AccessDenied(LoopError):
    """Neither ownership nor polkit allows the operation."""

    dbus_name = _BUS + "AccessDenied"


class InteractiveAuthorizationRequired(LoopError):
    """polkit would have to ask somebody, and the caller did not allow that."""

    dbus_name = _BUS + "InteractiveAuthorizationRequired"


class LimitsExceeded(LoopError):
    """A quota is used up; the text says which."""

    dbus_name = _BUS + "LimitsExceeded"


class RefusedByBus(LimitsExceeded):
    """The bus did not pass a call on: too much, or too many fds, are on their way already."""


class UnknownObject(LoopError):
    """There is no object at this path."""

    dbus_name = _BUS + "UnknownObject"


class UnknownInterface(LoopError):
    """The object does not have this interface."""

    dbus_name = _BUS + "UnknownInterface"


class UnknownMethod(LoopError):
    """The interface does not have this method."""

    dbus_name = _BUS + "UnknownMethod"


class UnknownProperty(LoopError):
    """The interface does not have this property."""

    dbus_name = _BUS + "UnknownProperty"


class PropertyReadOnly(LoopError):
    """The property cannot be set."""

    dbus_name = _BUS + "PropertyReadOnly"


class ErrnoError(LoopError):
    """An errno of the kernel that has no meaning of its own here, such as ENOSPC or EIO."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.errno = code
        self.dbus_name = _ERRNO + errno.errorcode.get(code, str(code))


class PeerError(LoopError):
    """An error of another service on the bus, under the name it gave."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.dbus_name = name


_BY_NAME = {
    cls.dbus_name: cls
    for cls in LoopError.__subclasses__()
    if cls is not ErrnoError and cls is not PeerError
}
_BY_ERRNO_NAME = {name: code for code, name in errno.errorcode.items()}


def from_os_error(exc: OSError, doing: str) -> ErrnoError:
    """Name an errno that reached the caller, after what was being done (`doing`, a gerund)."""
    code = exc.errno or errno.EIO
    # The C library's text alone: str(exc) would add the path of a file.
    return ErrnoError(f"{doing}: {os.strerror(code)}", code)


def by_name(name: str, text: str) -> LoopError:
    """Rebuild the error that a reply names, as the class the daemon raised where there is one."""
    if cls := _BY_NAME.get(name):
        return cls(text)
    if name.startswith(_ERRNO):
        code = _BY_ERRNO_NAME.get(name.removeprefix(_ERRNO))
        if code is not None:
            return ErrnoError(text, code)
    return PeerError(text, name)
