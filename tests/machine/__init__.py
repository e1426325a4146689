# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole Debian booted in a container with the package installed."""
