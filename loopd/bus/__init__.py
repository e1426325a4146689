# SPDX-License-Identifier: LGPL-2.1-or-later
"""The transport to the message bus, for daemon, client and loopctl alike."""
