# SPDX-License-Identifier: LGPL-2.1-or-later
"""A booted Debian with loopd's package: needs root, loop devices, systemd-nspawn and mmdebstrap."""
