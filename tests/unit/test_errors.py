# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors and their names on the bus, in both directions."""

import errno

import pytest

from loopd import errors

NAMES = {
    "org.example.Loop1.Error.": "Failed NoSuchDevice DeviceBusy Ambiguous Overlap UnsupportedFile "
    "UntrustedFilesystem NotSupported TimedOut",
    "org.freedesktop.DBus.Error.": "InvalidArgs AccessDenied InteractiveAuthorizationRequired "
    "LimitsExceeded UnknownMethod UnknownObject UnknownInterface UnknownProperty PropertyReadOnly",
}


@pytest.mark.parametrize(
    ("prefix", "name"), [(prefix, name) for prefix in NAMES for name in NAMES[prefix].split()]
)
def test_every_name_leads_to_its_class_and_back(prefix: str, name: str) -> None:
    error = errors.by_name(prefix + name, "why")
    assert type(error) is getattr(errors, name)
    assert error.dbus_name == prefix + name
    assert str(error) == "why"


def test_an_errno_keeps_its_name_and_shows_no_path() -> None:
    told = errors.from_os_error(OSError(errno.ENOSPC, "x", "/etc/shadow"), "Sync")
    assert told.dbus_name == "System.Error.ENOSPC"
    assert str(told) == "Sync: No space left on device"
    back = errors.by_name(told.dbus_name, str(told))
    assert isinstance(back, errors.ErrnoError)
    assert back.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["org.freedesktop.DBus.Error.NoReply", "System.Error.EWHAT", ""])
def test_a_name_of_somebody_elses_is_kept(name: str) -> None:
    error = errors.by_name(name, "why")
    assert isinstance(error, errors.PeerError)
    assert error.dbus_name == name
