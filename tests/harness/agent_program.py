# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs commands in an emulated machine, as they come over a virtio port.

`agent_program.py PORT`.  A line in JSON asks for a command: `argv`, `stdin` (by zlib, in base64),
`timeout` in seconds.  A line answers with its `status` and its `output` (base64).  The first line
says that the agent is there.  Only the standard library is at hand here.
"""

import base64
import json
import os
import subprocess
import sys
import zlib


def main() -> None:
    """Serve until the machine is switched off."""
    port = os.open(sys.argv[1], os.O_RDWR)  # a port can be opened once at a time
    with open(port, "rb") as asked:
        tell(port, {})
        for line in iter(asked.readline, b""):
            tell(port, answer(json.loads(line)))


def tell(port: int, told: dict[str, object]) -> None:
    """Write a line."""
    data = json.dumps(told).encode() + b"\n"
    while data:
        data = data[os.write(port, data) :]


def answer(asked: dict[str, object]) -> dict[str, object]:
    """Run a command, and tell how it ended."""
    try:
        done = subprocess.run(
            asked["argv"],
            check=False,
            cwd="/",
            input=zlib.decompress(base64.b64decode(asked["stdin"])),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=asked["timeout"],
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as exc:
        status, output = -1, (exc.stdout or b"") + b"\nit did not end in time"
    except OSError as exc:
        status, output = 127, str(exc).encode()
    return {"status": status, "output": base64.b64encode(output).decode()}


if __name__ == "__main__":
    main()
