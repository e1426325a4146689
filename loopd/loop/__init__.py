# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's loop devices: synchronous, without asyncio and D-Bus, usable on its own."""
