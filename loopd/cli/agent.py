# SPDX-License-Identifier: LGPL-2.1-or-later
"""polkit's questions in a text terminal: runs pkttyagent during calls to loopd, as systemctl does.

An agent of the session, as on a desktop, asks in its place.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from loopd.fd import OwnedFd

from .stream import in_foreground

# The kernel ends it with loopctl, also if loopctl is killed.
_COMMAND = ("setpriv", "--pdeathsig", "TERM", "--", "pkttyagent")
_USERS = Path("/run/systemd/users")
_START = 10.0  # seconds; polkit may have another agent if this one does not start
_END = 5.0


@contextlib.asynccontextmanager
async def agent(*, wanted: bool) -> AsyncIterator[None]:
    """Run an agent during the block, for a user at a terminal who is not root."""
    if not (wanted and os.geteuid() != 0 and _somebody_types()):
        yield
        return
    with contextlib.ExitStack() as stack:
        reading, writing = map(OwnedFd, os.pipe2(os.O_CLOEXEC))
        stack.enter_context(reading)
        stack.enter_context(_terminal_restored())
        with writing:
            process = _started(writing)
        if process:
            stack.callback(_end, process)
            await _closed(reading)
        try:
            yield
        except asyncio.CancelledError:
            print(file=sys.stderr)  # the cursor is most likely behind a question
            raise


def _somebody_types() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and in_foreground()


def _started(writing: OwnedFd) -> subprocess.Popen[bytes] | None:
    options = [f"--process={os.getpid()}", f"--notify-fd={writing.fileno()}"]
    # The agent of a session goes before ours. Without a session polkitd asks no fallback, and there
    # is no other agent.
    if (_USERS / str(os.getuid())).exists():
        options.append("--fallback")
    try:
        return subprocess.Popen(
            [*_COMMAND, *options],
            pass_fds=[writing.fileno()],
            stdin=subprocess.DEVNULL,  # it opens the terminal itself
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:  # it is not installed
        return None


async def _closed(reading: OwnedFd) -> None:
    """Wait until the other end is closed: the agent is registered, or has given up."""
    loop = asyncio.get_running_loop()
    closed = asyncio.Event()
    loop.add_reader(reading.fileno(), closed.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START):
                await closed.wait()
    finally:
        loop.remove_reader(reading.fileno())


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _terminal_restored() -> Iterator[None]:
    """Switch the echo on again: an older agent that is ended during a question leaves it off."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            if in_foreground() and termios.tcgetattr(stdin) != before:
                termios.tcsetattr(stdin, termios.TCSADRAIN, before)
