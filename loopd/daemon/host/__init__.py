# SPDX-License-Identifier: LGPL-2.1-or-later
"""The others on this machine, one peer a module: systemd, polkit, logind, udev."""
