# SPDX-License-Identifier: LGPL-2.1-or-later
"""Has loopd imported, and becomes one after the other of it, each in a child of its own.

Its stdin is a SOCK_SEQPACKET: a request has what the new process is to be told, with its log and
the fds that it inherits from 3 on; the answer is its pid.  The child is nobody's but the tests',
who adopt orphans.
"""

import array
import json
import os
import runpy
import socket
import sys
from typing import Any

import loopd.daemon  # noqa: F401 - this is what takes the time

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
    """Be loopd."""
    log, *passed = request["fds"]
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Out of the way first, then to their places, and nothing beside them.
    high = 3 + len(passed) + log + max(passed, default=0)
    for index, fd in enumerate(passed):
        os.dup2(fd, high + index)
    for index in range(len(passed)):
        os.dup2(high + index, 3 + index)
    os.closerange(3 + len(passed), 1 << 16)
    os.environ.update(request["environment"])
    if "LISTEN_FDS" in os.environ:
        os.environ["LISTEN_PID"] = str(os.getpid())
    sys.argv = ["loopd", *request["arguments"]]
    exec(request["prelude"], {"__name__": "prelude"})  # noqa: S102 - the test's own
    runpy.run_module("loopd", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    become(serve())
