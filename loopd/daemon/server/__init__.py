# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus face: it admits calls, decodes them, and encodes their answers."""
