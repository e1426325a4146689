# SPDX-License-Identifier: LGPL-2.1-or-later
"""polkit's questions in a text terminal: pkttyagent, which is there while loopd is asked things.

As systemctl does it. Who has an agent already, as on a desktop, is asked by that.
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

# It ends with us, whatever ends us.
_COMMAND = ("setpriv", "--pdeathsig", "TERM", "--", "pkttyagent")
_USERS = Path("/run/systemd/users")
_START = 10.0  # seconds; without an agent somebody else may be there to be asked
_END = 5.0


@contextlib.asynccontextmanager
async def agent(*, wanted: bool) -> AsyncIterator[None]:
    """Have an agent, ready to ask, where somebody sits at a terminal who is not root."""
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
            print(file=sys.stderr)  # most likely behind a question
            raise


def _somebody_types() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and in_foreground()


def _started(writing: OwnedFd) -> subprocess.Popen[bytes] | None:
    options = [f"--process={os.getpid()}", f"--notify-fd={writing.fileno()}"]
    # That of a session goes before ours. polkitd does not ask a fallback where there is no session,
    # where nobody else can be asked either.
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
    """Undo what an old agent that is ended over a question leaves of the terminal: no echo."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            if in_foreground() and termios.tcgetattr(stdin) != before:
                termios.tcsetattr(stdin, termios.TCSADRAIN, before)
