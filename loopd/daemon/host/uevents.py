# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's events about loop devices, as calls of one function.

The kernel's own events, not udevd's: they tell when a device is bound and unbound whether or not
udevd runs, and before it has looked. pyudev opens the socket. The events are parsed here: loopd has
caused most of them itself and needs two numbers of each, and pyudev's Device objects took an eighth
of the event loop's time.
"""

import asyncio
import os
import re
import socket
from collections.abc import Callable

import pyudev

_KERNEL = 0
"""The port that it sends from."""
_LONGEST = 16 << 10  # several times as much as the kernel makes of one
_ROOM = 4 << 20
_BLOCK = b"\0SUBSYSTEM=block\0"
_LOOP = re.compile(rb"[a-z]+@[^\0]*/block/loop(\d+)[/\0]")
_SEQNUM = re.compile(rb"\0SEQNUM=(\d+)\0")
_SLICE = 64  # events at a time
# Seconds between the first event and the reading of all. Attach and detach make three events and
# more, and know themselves what they do: looking at a device for each was an eighth of a pair.
_SETTLE = 0.01


def listen() -> socket.socket:
    """A socket that gets every event of the kernel's from now on."""
    monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
    monitor.start()
    sock = socket.socket(fileno=os.dup(monitor.fileno()))
    sock.setblocking(False)
    # The kernel may grant less. Events without room are lost, and then all devices are looked at.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
    return sock


class Monitor:
    """Hears what comes from a socket of `listen`'s, which it takes over.

    `on_event` gets the number of a loop device and the event's own. It gets None and 0 when events
    were lost and every device has to be looked at again. `on_block` is called when there was
    anything about any block device.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_event: Callable[[int | None, int], None],
        on_block: Callable[[], None],
    ) -> None:
        self._socket = sock
        # Its number, because asyncio makes a text of a socket that it does not know yet.
        self._fd = sock.fileno()
        self._on_event = on_event
        self._on_block = on_block
        self._loop = asyncio.get_running_loop()
        self._later: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stop listening."""
        if self._later:
            self._later.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _readable(self) -> None:
        self._loop.remove_reader(self._fd)
        self._later = self._loop.call_later(_SETTLE, self._read)

    def _read(self) -> None:
        seqnums: dict[int, int] = {}
        came = more = lost = False
        try:
            for _ in range(_SLICE):
                event, (sender, _) = self._socket.recvfrom(_LONGEST)
                if sender != _KERNEL or _BLOCK not in event:
                    continue
                came = True
                seqnum = _SEQNUM.search(event)
                if (found := _LOOP.match(event)) and seqnum:
                    number = int(found[1])
                    # Not always the last one: the kernel may tell of two in another order.
                    seqnums[number] = max(seqnums.get(number, 0), int(seqnum[1]))
            more = True
        except BlockingIOError:
            pass
        except OSError:  # ENOBUFS: there was no room for one
            lost = True
        if more:
            # After others: who has a device open can cause more than we can read.
            self._later = self._loop.call_later(_SETTLE, self._read)
        else:
            self._later = None
            self._loop.add_reader(self._fd, self._readable)
        if lost:
            self._on_event(None, 0)
            return
        for number, newest in seqnums.items():
            self._on_event(number, newest)
        if came:
            self._on_block()
