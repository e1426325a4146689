# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens at an await: an exception comes out of it, or something else happens meanwhile.

Every task that is made while this is installed is driven step by step.  A point is one suspension of
one task; they are counted over all tasks, in the order in which they come.
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
    """The names of those that came: the function that began to wait, with its line, in which task."""

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
        return asyncio.Task(self._drive(coroutine), loop=loop, **named)

    async def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await _Driven(coroutine, self)

    def due(self, coroutine: Coroutine[Any, Any, Any]) -> bool:
        """Count a point, and say whether it is the one."""
        name = _name(coroutine)
        if name is None or not self.wanted(name):
            return False
        self.points.append(name)
        return len(self.points) - 1 == self.index


class _Driven:
    """Awaits a coroutine, and does what is to be done at its points."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], suspensions: Suspensions) -> None:
        self._coroutine = coroutine
        self._suspensions = suspensions

    def __await__(self) -> Generator[Any, None, Any]:
        coroutine, suspensions = self._coroutine, self._suspensions
        step: Callable[[], Any] = partial(coroutine.send, None)
        while True:
            try:
                waited = step()
            except StopIteration as end:
                return end.value
            due = suspensions.due(coroutine)
            if due and not suspensions.late and (exc := suspensions.action()):
                # Nobody waits for it any more; another may.
                if waited is not None:
                    waited._asyncio_future_blocking = False
                step = partial(coroutine.throw, exc)
                continue
            step = partial(coroutine.send, None)
            try:
                yield waited
            except BaseException as exc:  # noqa: BLE001 - all of them are the coroutine's
                step = partial(coroutine.throw, exc)
            if due and suspensions.late and (exc := suspensions.action()):
                step = partial(coroutine.throw, exc)


def _name(coroutine: Any) -> str | None:
    """The innermost function of loopd's that waits, and what the task is; None if there is none."""
    found, inner = None, coroutine
    while inner is not None and (frame := getattr(inner, "cr_frame", None)):
        if frame.f_globals.get("__name__", "").startswith("loopd."):
            found = f"{inner.__qualname__}:{frame.f_lineno}"
        inner = inner.cr_await
    return found and f"{found} in {coroutine.__qualname__}"
