# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens around the calls of loopd.loop.kernel: errors, what others do in between, and a
record.

It wraps whatever functions are in the module, the real ones or scripted ones.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from loopd.loop import kernel
from tests.harness.scripted import FUNCTIONS


@dataclass(eq=False)
class _Cue:
    name: str
    skip: int
    """So many calls pass before."""
    times: int
    action: Callable[[], None]
    after: bool


class Script:
    """Cues for kernel functions, each for some calls of one of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        """The names of the functions called so far."""
        self.returned: Any = None
        """What the last of them has returned."""
        self._cues: list[_Cue] = []
        self._after_errors: dict[str, Callable[[], None]] = {}

    @contextmanager
    def running(self) -> Iterator["Script"]:
        """Take part in every call until the end of the block."""
        with ExitStack() as stack:
            for name in FUNCTIONS:
                wrapped = self._wrap(name, getattr(kernel, name))
                stack.enter_context(mock.patch.object(kernel, name, wrapped))
            yield self

    def before(
        self, name: str, action: Callable[[], None], *, skip: int = 0, times: int = 1
    ) -> None:
        """Do something before a function is called; what it raises is what the call raises."""
        self._cues.append(_Cue(name, skip, times, action, after=False))

    def after(
        self, name: str, action: Callable[[], None], *, skip: int = 0, times: int = 1
    ) -> None:
        """Do something after a function has done its work, before its caller goes on."""
        self._cues.append(_Cue(name, skip, times, action, after=True))

    def after_error(self, name: str, action: Callable[[], None]) -> None:
        """Do something after the next call of a function that fails."""
        self._after_errors[name] = action

    def fail(self, name: str, code: int = errno.EIO, *, skip: int = 0, times: int = 1) -> None:
        """Have a function fail instead of doing anything."""

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        self.before(name, fail, skip=skip, times=times)

    @property
    def pending(self) -> bool:
        """Whether there are cues that have not come up."""
        return bool(self._cues)

    def clear(self) -> None:
        """Forget all cues."""
        self._cues.clear()
        self._after_errors.clear()

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.calls.append(name)
            before, after = self._due(name)
            for cue in before:
                cue.action()
            try:
                result = function(*args, **named)
            except OSError:
                if action := self._after_errors.pop(name, None):
                    action()
                raise
            self.returned = result
            for cue in after:
                cue.action()
            return result

        return call

    def _due(self, name: str) -> tuple[list[_Cue], list[_Cue]]:
        due = []
        for cue in [each for each in self._cues if each.name == name]:
            if cue.skip:
                cue.skip -= 1
                continue
            cue.times -= 1
            if not cue.times:
                self._cues.remove(cue)
            due.append(cue)
        return [cue for cue in due if not cue.after], [cue for cue in due if cue.after]
