# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: what all of it uses; above that `host`, `devices`, `actions`, `server`."""
