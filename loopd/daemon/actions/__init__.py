# SPDX-License-Identifier: LGPL-2.1-or-later
"""The use cases, one a module: Attach, Detach, changes, a restart."""
