# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions to polkit, and what its answers mean: everything but a clear yes is a no.

The subject is the caller's bus name and nothing else: pids can be reused, and a uid that a client
states is worth nothing. No answer is kept: each call asks anew.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import Any

from loopd.bus.codec import Variant
from loopd.daemon.access import ROOT, Action, Caller
from loopd.daemon.quota import Quota
from loopd.daemon.tasks import Tasks
from loopd.errors import (
    AccessDenied,
    BusError,
    Failed,
    InteractiveAuthorizationRequired,
    LimitsExceeded,
    LoopError,
    UntrustedFilesystem,
)

log = logging.getLogger(__name__)

_NAME = "org.freedesktop.PolicyKit1"
_PATH = "/org/freedesktop/PolicyKit1/Authority"
_INTERFACE = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_USER_INTERACTION = 1
# Open questions of all users: dbus-daemon lets 128 calls of a connection's wait for their answers.
# An eighth is left for others than polkit. A person may be asked for minutes, so half of the rest
# is for what is answered at once.
_QUESTIONS = 128
_PROMPTS = 64
_HINT = "try again when one is answered"

Call = Callable[..., Awaitable[list[Any]]]


class Authority:
    """polkit, asked through `call`, which is a connection's method of that name.

    `timeout` and `interactive_timeout` are the deadlines in seconds without and with somebody to
    be asked; `max_questions` bounds the questions of one uid that are open at a time. All uids
    together have a bound, too, and one for those with somebody to be asked.
    """

    def __init__(
        self,
        call: Call,
        *,
        timeout: float,
        interactive_timeout: float,
        max_questions: int,
    ) -> None:
        self._call = call
        self._timeout = timeout
        self._interactive_timeout = interactive_timeout
        self._questions = Quota(
            "open questions to polkit", per_user=max_questions, in_all=_QUESTIONS, hint=_HINT
        )
        self._prompts = Quota(
            "open questions that somebody may be asked",
            per_user=max_questions,
            in_all=_PROMPTS,
            hint=_HINT,
        )
        self._cancellations = itertools.count(1)
        self._tasks = Tasks()
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def stop(self) -> None:
        """Take back every question, and ask no more."""
        if not self._stopped.done():
            self._stopped.set_result(None)

    async def require(self, caller: Caller, action: Action, details: Mapping[str, str]) -> None:
        """Return if the caller may; root always may.

        Raises AccessDenied (UntrustedFilesystem for the action of that name),
        InteractiveAuthorizationRequired, LimitsExceeded.
        """
        if caller.uid == ROOT:
            return
        with ExitStack() as open_questions:
            open_questions.enter_context(self._questions.take(caller.uid))
            interactive, full = caller.interactive, None
            if interactive:
                try:
                    open_questions.enter_context(self._prompts.take(caller.uid))
                except LimitsExceeded as exc:
                    # Who needs not be asked is not to wait for those who are.
                    interactive, full = False, exc
            authorized, challenge = await self._ask(caller, action, details, interactive)
        if authorized is True:
            return
        if challenge is True and full:
            raise full
        if challenge is True and not caller.interactive:
            raise InteractiveAuthorizationRequired(
                f"polkit would have to ask for {action}: call again with interactive "
                "authorization allowed"
            )
        if action is Action.ATTACH_UNTRUSTED_FILESYSTEM:
            raise UntrustedFilesystem(
                "the file is on a filesystem that may hang (FUSE, network or unknown), or on a "
                "device over one, which the administrator does not allow: copy it to a local disk"
            )
        raise AccessDenied(f"polkit does not allow {action}")

    async def _ask(
        self, caller: Caller, action: Action, details: Mapping[str, str], interactive: bool
    ) -> tuple[object, object]:
        cancellation = f"loopd-{next(self._cancellations)}"
        timeout = self._interactive_timeout if interactive else self._timeout
        question = asyncio.ensure_future(
            self._call(
                _NAME,
                _PATH,
                _INTERFACE,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                [
                    ["system-bus-name", {"name": Variant("s", caller.client.name)}],
                    str(action),
                    dict(details),
                    _ALLOW_USER_INTERACTION if interactive else 0,
                    cancellation,
                ],
                timeout=None,
            )
        )
        ends: set[asyncio.Future[Any]] = {question, caller.client.left, self._stopped}
        await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not question.done():
            question.add_done_callback(_forget)
            question.cancel()
            self._cancel(cancellation)
            caller.client.require_present()
            if self._stopped.done():
                raise Failed("loopd is stopping: try again")
            raise AccessDenied(f"polkit did not answer within {timeout:g} s")
        try:
            ((authorized, challenge, _),) = question.result()
        except (LoopError, BusError, ValueError, TypeError) as exc:
            extra = caller.client.fields
            log.warning("polkit could not be asked for %s: %s", action, exc, extra=extra)
            raise AccessDenied("polkit could not be asked, so the answer is no") from exc
        return authorized, challenge

    def _cancel(self, cancellation: str) -> None:
        """Take a question back, so that no prompt stays on anybody's screen."""

        async def cancel() -> None:
            try:
                await self._call(
                    _NAME,
                    _PATH,
                    _INTERFACE,
                    "CancelCheckAuthorization",
                    "s",
                    [cancellation],
                    timeout=self._timeout,
                )
            except (LoopError, BusError) as exc:
                log.debug("polkit did not take a question back: %s", exc)

        self._tasks.start(cancel())


def _forget(question: "asyncio.Future[Any]") -> None:
    """Take the exception of a question that nobody waits for."""
    if not question.cancelled():
        question.exception()
