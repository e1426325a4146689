# SPDX-License-Identifier: LGPL-2.1-or-later
"""loopd on the kernels that Debian ships, emulated."""
