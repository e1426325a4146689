# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopctl."""

from .app import main

__all__ = ["main"]
