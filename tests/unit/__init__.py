# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pure logic: no bus, no root, no device."""
