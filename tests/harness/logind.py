# SPDX-License-Identifier: LGPL-2.1-or-later
"""A double of logind on a private bus: it knows some users, and tells when one has left."""

import os
import threading
from types import TracebackType
from typing import Any, Self

from tests.harness import wire
from tests.harness.bus import LOGIND, PrivateBus
from tests.harness.deadline import Deadline
from tests.harness.raw import DisconnectedError, RawClient

PATH = "/org/freedesktop/login1"
MANAGER = f"{LOGIND}.Manager"


class LogindDouble:
    """Answers GetUser from a thread, from the start of the `with` block."""

    def __init__(self, bus: PrivateBus, *users: int) -> None:
        """Know these uids."""
        self._bus = bus
        self.users = set(users)
        self.asked: list[int] = []
        """The uids that somebody has asked for."""

    def __enter__(self) -> Self:
        self._client = self._bus.connect()
        (result,) = self._client.call_bus("RequestName", "su", [LOGIND, 4])
        assert result == 1
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="logind double")
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

    def remove(self, uid: int, *, tell: bool = True) -> None:
        """Forget a user, and say so."""
        self.users.discard(uid)
        if tell:
            send_user_removed(self._client, uid)

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
        (uid,) = message.body
        self.asked.append(uid)
        answer: dict[str, Any] = {
            "type": wire.METHOD_RETURN,
            "signature": "o",
            "args": [f"{PATH}/user/_{uid}"],
        }
        if uid not in self.users:
            answer = {
                "type": wire.ERROR,
                "error_name": f"{LOGIND}.NoSuchUser",
                "signature": "s",
                "args": [f"User ID {uid} is not logged in or lingering"],
            }
        self._client.send(
            None,
            None,
            None,
            destination=message.sender,
            reply_serial=message.serial,
            flags=1,
            **answer,
        )


def send_user_removed(client: RawClient, uid: int, destination: str | None = None) -> None:
    """Send the signal, as logind or as somebody who is not."""
    client.send(
        PATH,
        MANAGER,
        "UserRemoved",
        "uo",
        [uid, f"{PATH}/user/_{uid}"],
        type=wire.SIGNAL,
        destination=destination,
    )
