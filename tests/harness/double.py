# SPDX-License-Identifier: LGPL-2.1-or-later
"""A name on a private bus whose calls a thread of the test answers, for what stands behind it."""

import os
import threading
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.bus import PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.raw import DisconnectedError, RawClient

_DO_NOT_QUEUE = 4


class Double:
    """Has the name, and answers, from the start of the `with` block to its end."""

    name: str
    """Of a service on the bus."""

    def __init__(self, bus: PrivateBus) -> None:
        """Prepare."""
        self._bus = bus

    def __enter__(self) -> Self:
        self._client: RawClient = self._bus.connect()
        (result,) = self._client.call_bus("RequestName", "su", [self.name, _DO_NOT_QUEUE])
        assert result == 1
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name=f"double of {self.name}")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.write(self._wake[1], b"x")
        self._thread.join()
        for fd in self._wake:
            os.close(fd)
        self._client.close()

    def _serve(self) -> None:
        try:
            while True:
                for message in self._client.drain():
                    if message.type == wire.METHOD_CALL:
                        self._answer(message)
                fds = [self._client.fileno(), self._wake[0]]
                if self._wake[0] in Deadline(3600).wait_readable(fds, "a question"):
                    return
                self._client.received.append(self._client.receive())
        except DisconnectedError:
            pass  # the bus has gone

    def _answer(self, message: wire.Message) -> None:
        """Send the reply to a call, in the thread."""
        raise NotImplementedError

    def _reply(self, to: wire.Message, signature: str, *args: Any) -> None:
        self._send(to, type=wire.METHOD_RETURN, signature=signature, args=args)

    def _reply_error(self, to: wire.Message, name: str, text: str) -> None:
        self._send(to, type=wire.ERROR, error_name=name, signature="s", args=[text])

    def _send(self, to: wire.Message, **answer: Any) -> None:
        self._client.send(
            None, None, None, destination=to.sender, reply_serial=to.serial, flags=1, **answer
        )
