# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fuzzing of what reads bytes that others wrote: targets, a runner, and the corpus it found.

A target is a function of bytes that returns, whatever they are, and fails an assertion or lets an
exception out when the code behind it breaks a promise.  `python -m tests.fuzz TARGET [SECONDS]`
runs one under atheris, guided by coverage; tests/unit/test_fuzz.py replays what that has kept.
"""
