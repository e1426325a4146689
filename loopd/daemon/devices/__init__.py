# SPDX-License-Identifier: LGPL-2.1-or-later
"""The devices that there are, and what is known of each."""
