# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests stand on: private buses, true and false authorities, the daemon, its callers.

Every resource is a context manager and every wait has a deadline and an event to end it: a file
descriptor, a signal, a uevent.  The package imports nothing of loopd, so that a fault there cannot
hide itself here.
"""
