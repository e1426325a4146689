# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in loopd's interpreter before loopd: counts its steps, and tells the sums at the end."""

import atexit
import json
import os
from collections import Counter
from functools import wraps
from pathlib import Path

from loopd.bus import transport
from loopd.daemon import tasks, threads
from loopd.daemon.devices import records, registry
from loopd.loop import kernel

counts = Counter()


def counted(owner, name, what):
    """Have calls of a method counted, as what the call itself says it is."""
    method = getattr(owner, name)

    @wraps(method)
    def count(*args, **kwargs):
        counts[what(*args, **kwargs)] += 1
        return method(*args, **kwargs)

    setattr(owner, name, count)


def pool_name(pools, pool, *_, **__):
    """What the threads of a pool are for."""
    names = {id(each): name for name, each in vars(pools).items()}
    return f"handed to a thread: {names[id(pool)].strip('_')}"


counted(registry, "_sight", lambda *_: "look at sysfs")
counted(registry.Registry, "heard", lambda *_: "events of a device that are taken up")
counted(threads.Threads, "_submit", pool_name)
counted(threads.Threads, "turn", lambda _, uid, work, *__: f"turn of {uid}: {work.name}")
counted(tasks.Tasks, "start", lambda *_: "task")
counted(kernel, "statx", lambda *_, **__: "look at a file")
counted(
    transport.Connection, "emit", lambda _, path, interface, member, *__, **___: f"signal: {member}"
)
counted(
    transport.Connection,
    "call",
    lambda _, to, path, interface, member, *__, **___: f"question: {member}",
)
counted(records.os, "replace", lambda *_, **__: "file written")
counted(records.os, "symlink", lambda *_, **__: "link made")
atexit.register(lambda: Path(os.environ["STEPS"]).write_text(json.dumps(counts)))
