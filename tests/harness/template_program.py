# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has modules imported, and becomes one process after the other, each in a child of its own.

Its stdin is a SOCK_SEQPACKET: a request has what the new process is to be told, with its log and
the fds that it inherits; the answer is its pid.  The child is nobody's but the tests', who adopt
orphans.
"""

import array
import importlib
import json
import os
import socket
import sys
from typing import Any

_MAX_FDS = 253


def serve() -> dict[str, Any]:
    """Answer requests until there are no more; returns in a child, as the new process."""
    control = socket.socket(fileno=0)
    while True:
        data, ancillary, _, _ = control.recvmsg(1 << 20, socket.CMSG_SPACE(_MAX_FDS * 4))
        if not data:
            os._exit(0)
        fds = [fd for _, _, payload in ancillary for fd in array.array("i", payload)]
        reading, writing = os.pipe()
        middle = os.fork()
        if not middle:
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os._exit(0)
            request: dict[str, Any] = json.loads(data)
            request["fds"] = fds
            control.detach()  # it is 0, which will be another's
            return request
        for fd in [*fds, writing]:
            os.close(fd)
        os.waitpid(middle, 0)
        with open(reading, "rb") as pid:
            control.send(pid.read())


def become(request: dict[str, Any]) -> None:
    """Be the new process."""
    log, *passed = request["fds"]
    stdin = passed.pop(0) if request["stdin"] else os.open(os.devnull, os.O_RDONLY)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(stdin, 0)
    # Out of the way first, then to their places, and nothing beside them.
    high = 3 + len(passed) + log + max(passed, default=0)
    for index, fd in enumerate(passed):
        os.dup2(fd, high + index)
    for index in range(len(passed)):
        os.dup2(high + index, 3 + index)
    os.closerange(3 + len(passed), 1 << 16)
    if request["user"] and request["user"][0] != os.getuid():
        uid, gid = request["user"]
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if request["anew"]:
        os.environ.clear()
    os.environ.update(request["environment"])
    if "LISTEN_FDS" in os.environ:
        os.environ["LISTEN_PID"] = str(os.getpid())
    sys.argv = request["arguments"]
    exec(request["code"], {"__name__": "__main__"})  # noqa: S102 - the test's own


if __name__ == "__main__":
    wants = json.loads(sys.argv[1])
    for name in wants["hidden"]:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in wants["modules"]:
        importlib.import_module(name)
    become(serve())
