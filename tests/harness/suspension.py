# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens at an await: an exception comes out of it, or something else happens meanwhile.

Every task that is made while this is installed is driven step by step.  A point is one suspension
of one task; they are counted over all tasks, in the order in which they come.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Action = Callable[[], BaseException | None]
"""Does something, and returns what is to be raised there, if anything is."""


@dataclass
class Suspensions:
    """The suspensions of loopd's tasks, and what happens at one of them."""

    index: int = -1
    """Of the point where something happens; none does at -1."""
    action: Action = lambda: None
    late: bool = False
    """Whether it happens when the wait is over, instead of when it begins."""
    wanted: Callable[[str], bool] = lambda _: True
    """Which points count, by their names."""
    points: list[str] = field(default_factory=list)
    """The names of those that came: who began to wait, in which line and in which task."""

    @contextmanager
    def installed(self) -> Iterator["Suspensions"]:
        """Drive the tasks of the running event loop that are made until the end of the block."""
        loop = asyncio.get_running_loop()
        former = loop.get_task_factory()
        loop.set_task_factory(self._make_task)
        try:
            yield self
        finally:
            loop.set_task_factory(former)
            self.index = -1

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **named: Any
    ) -> "asyncio.Task[Any]":
        return asyncio.Task(_Driven(coroutine, self), loop=loop, **named)

    def due(self, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Count a point, and say whether it is the one."""
        name = _name(coroutine)
        if name is None or not self.wanted(name):
            return False
        self.points.append(name)
        return len(self.points) - 1 == self.index


class _Driven(Coroutine[Any, Any, Any]):
    """A coroutine, and what is to be done at its points."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], suspensions: Suspensions) -> None:
        self._coroutine = coroutine
        self._suspensions = suspensions
        self._due = False
        """Whether it is to be done when the wait that has begun is over."""

    def send(self, value: Any) -> Any:
        """Go on after a wait, or begin."""
        return self._go_on(partial(self._coroutine.send, value))

    def throw(self, *exc: Any) -> Any:
        """Go on after a wait that failed."""
        return self._go_on(partial(self._coroutine.throw, *exc))

    def close(self) -> None:
        """End it where it is."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("a task's own")

    def _go_on(self, step: Callable[[], Any]) -> Any:
        suspensions = self._suspensions
        if self._due and (exc := suspensions.action()):
            step = partial(self._coroutine.throw, exc)
        self._due = False
        waited = step()
        while suspensions.due(self._coroutine):
            if suspensions.late:
                self._due = True
                break
            if not (exc := suspensions.action()):
                break
            if waited is not None:
                waited._asyncio_future_blocking = False  # nobody waits for it any more
            waited = self._coroutine.throw(exc)
        return waited


def _name(coroutine: Any) -> str | None:
    """The innermost function of loopd's that waits, and what the task is; None if there is none."""
    found, inner = None, coroutine
    while inner is not None and (frame := getattr(inner, "cr_frame", None)):
        if frame.f_globals.get("__name__", "").startswith("loopd."):
            found = f"{inner.__qualname__}:{frame.f_lineno}"
        inner = inner.cr_await
    return found and f"{found} in {coroutine.__qualname__}"
