# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's events about loop devices, through pyudev, as calls of one function.

The kernel's own events, not udevd's: they tell when a device is bound and unbound whether or not
udevd runs, and before it has looked.
"""

import asyncio
import errno
import os
import re
import socket
from collections.abc import Callable

import pyudev

_LOOP = re.compile(r"/block/loop(\d+)(?:/|$)")
_SLICE = 64  # events at a time, some 30 µs each: a fifth of the time, where there are many
# Seconds between the first event and the reading of all. Attach and detach make three events and
# more, and know themselves what they do: looking at a device for each was an eighth of a pair.
_SETTLE = 0.01


def loop_numbers() -> list[int]:
    """The numbers of all loop devices that exist, bound or not; takes 0.2 ms each, so not here.

    Raises OSError.
    """
    devices = pyudev.Context().list_devices(subsystem="block", DEVTYPE="disk")
    try:
        names = (_LOOP.search(device.device_path) for device in devices.match_sys_name("loop*"))
        return sorted(int(found[1]) for found in names if found)
    except ValueError as exc:
        # How pyudev says EINVAL.
        raise OSError(errno.EINVAL, "udev cannot list the loop devices") from exc


class Monitor:
    """Listens from its making on; `on_event` gets the number of a loop device and the event's own.

    It gets None and 0 when events were lost and every device has to be looked at again. `on_block`
    is called when there was anything about any block device.
    """

    def __init__(
        self, on_event: Callable[[int | None, int], None], on_block: Callable[[], None]
    ) -> None:
        self._on_event = on_event
        self._on_block = on_block
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        self._monitor.filter_by("block")
        self._monitor.start()
        # A second handle on the same socket, because pyudev hides the socket's error and polls
        # for ever on it.
        self._socket = socket.socket(fileno=os.dup(self._monitor.fileno()))
        self._loop = asyncio.get_running_loop()
        self._later: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._socket, self._readable)

    def close(self) -> None:
        """Stop listening."""
        if self._later:
            self._later.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _readable(self) -> None:
        self._loop.remove_reader(self._socket)
        self._later = self._loop.call_later(_SETTLE, self._read)

    def _read(self) -> None:
        lost = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        seqnums: dict[int, int] = {}
        came = more = False
        try:
            for _ in range(_SLICE):
                device = self._monitor.poll(timeout=0)
                if device is None:
                    break
                came = True
                if found := _LOOP.search(device.device_path):
                    number = int(found[1])
                    # Not always the last one: the kernel may tell of two in another order.
                    seqnums[number] = max(seqnums.get(number, 0), device.sequence_number)
            else:
                more = True
        # How pyudev says what libudev could not do with an event.
        except (OSError, ValueError, MemoryError, OverflowError):
            lost = True
        finally:
            if more:
                # After others: who has a device open can cause more than we can read.
                self._later = self._loop.call_later(_SETTLE, self._read)
            else:
                self._later = None
                self._loop.add_reader(self._socket, self._readable)
        if lost:
            self._on_event(None, 0)
            return
        for number, seqnum in seqnums.items():
            self._on_event(number, seqnum)
        if came:
            self._on_block()
