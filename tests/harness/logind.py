# SPDX-License-Identifier: LGPL-2.1-or-later
"""A double of logind on a private bus: it knows some users, and tells when one has left."""

from tests.harness import wire
from tests.harness.bus import LOGIND, PrivateBus
from tests.harness.double import Double
from tests.harness.raw import RawClient

PATH = "/org/freedesktop/login1"
MANAGER = f"{LOGIND}.Manager"


class LogindDouble(Double):
    """Answers GetUser."""

    name = LOGIND

    def __init__(self, bus: PrivateBus, *users: int) -> None:
        """Know these uids."""
        super().__init__(bus)
        self.users = set(users)
        self.asked: list[int] = []
        """The uids that somebody has asked for."""
        self.error = ""
        """The error that it has for everybody, by name."""

    def remove(self, uid: int, *, tell: bool = True) -> None:
        """Forget a user, and say so."""
        self.users.discard(uid)
        if tell:
            send_user_removed(self._client, uid)

    def _answer(self, message: wire.Message) -> None:
        (uid,) = message.body
        self.asked.append(uid)
        if self.error:
            self._reply_error(message, self.error, "something is wrong")
        elif uid in self.users:
            self._reply(message, "o", f"{PATH}/user/_{uid}")
        else:
            text = f"User ID {uid} is not logged in or lingering"
            self._reply_error(message, f"{LOGIND}.NoSuchUser", text)


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
