# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests of loopd: unit, bus, root and machine, each a directory and a category."""
