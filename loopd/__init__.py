# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loop devices for programs: attached from a passed file, gone when their client is gone."""

__version__ = "0.1.0"
