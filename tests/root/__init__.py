# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real loop devices, a real polkitd, callers of other uids: needs root."""
