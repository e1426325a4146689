# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real service on a private bus, with what is below and beside it replaced by doubles."""
