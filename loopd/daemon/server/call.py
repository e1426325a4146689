# SPDX-License-Identifier: LGPL-2.1-or-later
"""A method call as it came, and its arguments as the method's signature has them, fds matched."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from loopd.bus import codec, frame
from loopd.daemon.access import Caller
from loopd.errors import InvalidArgs, LimitsExceeded
from loopd.fd import OwnedFd

log = logging.getLogger(__name__)


class Authorization(Enum):
    """Who decides whether a method may be called. There is no default."""

    FREE = "anyone may: it only tells what is public"
    MANAGER = "the manager asks for what the table in `access` demands"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method as it is served; the handler gets the caller, the object and the arguments."""

    name: str
    in_signature: str
    out_signature: str
    authorization: Authorization
    handler: Callable[..., Awaitable[tuple[Any, ...]]]


@dataclass(slots=True, eq=False)
class Call:
    """A call that is under way, and what came with it."""

    header: frame.Header
    data: bytes
    fds: list[OwnedFd]
    fds_lost: bool

    def arguments(self, method: Method) -> list[Any]:
        """Its arguments for this method, the fds in the places of their indices.

        Raises InvalidArgs unless all is as the method's signature says, and each fd used once;
        LimitsExceeded if they found no room in our table.
        """
        header = self.header
        if header.signature != method.in_signature:
            raise InvalidArgs(
                f"{method.name} takes arguments of the signature '{method.in_signature}', "
                f"not '{header.signature}'"
            )
        if self.fds_lost:
            raise LimitsExceeded("the file descriptors did not arrive: try again later")
        # Checked before parsing: a variant may hold a handle too, and no option of ours does.
        wanted = method.in_signature.count("h")
        if not len(self.fds) == header.unix_fds == wanted:
            raise InvalidArgs(
                f"{method.name} takes {wanted} file descriptors, and {len(self.fds)} came"
            )
        try:
            arguments: list[Any] = codec.parse(self.data).body
        except codec.MalformedMessage as exc:
            log.debug("a message of %s cannot be read: %s", header.sender, exc)
            raise InvalidArgs("the message cannot be read") from exc
        # A handle is always an argument of its own in our signatures, so its place is known.
        places = [
            place
            for place, kind in enumerate(codec.argument_types(method.in_signature))
            if kind == "h"
        ]
        if sorted(arguments[place] for place in places) != [*range(len(self.fds))]:
            raise InvalidArgs(f"{method.name} got a handle that is no file descriptor it passed")
        for place in places:
            arguments[place] = self.fds[arguments[place]]
        return arguments


def note_end(caller: Caller, method: Method, result: str) -> None:
    """Log how a call ended, unless it is one that everybody may make.

    Of what the client said there is nothing in it, not even in the text of an error.
    """
    if method.authorization is Authorization.FREE:
        return
    log.info(
        "%s%s for uid %d, %s: %s",
        method.name,
        f" of {node}" if (node := caller.concerns.get("DEVICE")) else "",
        caller.uid,
        caller.client.name,
        result,
        extra={
            "ACTION": method.name,
            "RESULT": result,
            **caller.client.fields,
            **caller.concerns,
        },
    )
