# SPDX-License-Identifier: LGPL-2.1-or-later
"""Timings: what loopd costs beside what a user might take instead."""
