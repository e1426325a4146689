# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `loopd`, and `python -m loopd`: without what it does not need, and starts sooner.

asyncio loads OpenSSL, and dbus-next loads GLib's bindings: together a fifth of the time until loopd
answers, and memory. Only here, where nobody else's program can miss them.
"""

import sys
from types import ModuleType

sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # asyncio does without it then
sys.modules.setdefault("dbus_next.glib", ModuleType("dbus_next.glib"))

from loopd.daemon.main import main  # noqa: E402  after the above

if __name__ == "__main__":
    main()
