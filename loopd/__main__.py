# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m loopd."""

from .daemon import main

main()
