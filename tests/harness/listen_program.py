# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a command as systemd would: `FD... -- COMMAND`, the fds being there from 3 on."""

import os
import sys

split = sys.argv.index("--")
passed = [int(each) for each in sys.argv[1:split]]
high = 3 + len(passed) + max(passed)
# Out of the way first, then to their places.
for index, fd in enumerate(passed):
    os.dup2(fd, high + index, inheritable=False)
for index in range(len(passed)):
    os.dup2(high + index, 3 + index)
for fd in passed:
    if fd >= 3 + len(passed):
        os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[split + 1], sys.argv[split + 1 :])  # noqa: S606 - without a shell, as there
