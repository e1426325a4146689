# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens to devices, as an iterator that misses nothing while there is a loopd to tell.

What happened while there was none is found by comparing, when the next one is there.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

from .absence import Unavailable
from .link import Disconnected, Link, is_a
from .properties import Properties
from .watch import DEVICE, OBJECT_MANAGER, PATH, Ended, Heard

_D = TypeVar("_D")

_MAX_HEARD = 4096  # of which somebody who does not look for long is told the sum only

Kind = Literal["attached", "changed", "detached"]
"""What happened to a device."""


class Change(NamedTuple, Generic[_D]):
    """Something that happened to one device."""

    kind: Kind
    device: _D
    properties: Properties
    """What it is now; of one that is detached, what it was last."""
    names: tuple[str, ...] = ()
    """Which of the properties have changed."""


class Changes(Generic[_D]):
    """Whatever happens from the start of its `async with` block on; to be iterated over.

    With `only` it is about that object, and ends when that is detached.
    """

    def __init__(
        self,
        link: Link,
        make: Callable[[str, Properties], _D],
        only: str | None = None,
        ended: Callable[[], Coroutine[Any, Any, Ended]] | None = None,
    ) -> None:
        """Prepare; `ended` waits for the end of that object, which may come without any signal."""
        self._link = link
        self._make = make
        self._only = only
        self._ended = ended
        self._heard: deque[Heard | None] = deque()
        self._news = asyncio.Event()
        self._changes: deque[Change[_D]] = deque()
        self._known: dict[str, Properties] = {}
        self._over = False
        self._exit = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._link.watch.listening(self._hear))
            await self._link.subscribe()
            self._known = await self._look()
            self._over = self._only is not None and self._only not in self._known
            if self._ended and not self._over:
                ending = asyncio.ensure_future(self._ended())
                ending.add_done_callback(self._end)
                stack.callback(ending.cancel)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change[_D]:
        while not self._changes:
            if self._over:
                raise StopAsyncIteration
            while not self._heard:
                self._news.clear()
                await self._news.wait()
            await self._take(self._heard.popleft())
        return self._changes.popleft()

    @property
    def devices(self) -> list[tuple[_D, Properties]]:
        """Those that are there, as far as has been told by the iterator."""
        return [(self._make(path, each), each) for path, each in self._known.items()]

    def _hear(self, heard: Heard | None) -> None:
        if len(self._heard) >= _MAX_HEARD:
            self._heard.clear()
            self._heard.append(Heard("NameOwnerChanged", "", ["", "", "?"]))
        self._heard.append(heard)
        self._news.set()

    def _end(self, ending: asyncio.Task[Ended]) -> None:
        # Whatever else it ends by, there is a signal for, or will be.
        if ending.cancelled() or ending.exception():
            return
        if ending.result() is Ended.DAEMON_LEFT:
            self._hear(Heard("InterfacesRemoved", PATH, [self._only, [DEVICE]]))

    async def _take(self, heard: Heard | None) -> None:
        match heard:
            case None:
                self._heard.appendleft(None)  # for whoever asks once more
                raise Disconnected("the connection to the bus is lost")
            case ("NameOwnerChanged", _, [_, _, owner]) if owner:
                # With no loopd, or one that leaves again, the next is waited for.
                with contextlib.suppress(Unavailable):
                    self._compare(await self._look())
            case ("InterfacesAdded", _, [path, interfaces]) if DEVICE in interfaces:
                self._set(path, Properties.decode(interfaces[DEVICE]))
            case ("InterfacesRemoved", _, [path, interfaces]) if DEVICE in interfaces:
                self._remove(path)
            case ("PropertiesChanged", path, [_, changed, _]) if path in self._known:
                self._set(path, self._known[path].updated(changed))

    async def _look(self) -> dict[str, Properties]:
        self._heard.clear()  # which is older than what comes now
        return {
            path: found
            for path, found in (await objects(self._link)).items()
            if self._only in (None, path)
        }

    def _compare(self, now: dict[str, Properties]) -> None:
        for path in self._known.keys() - now.keys():
            self._remove(path)
        for path, found in now.items():
            self._set(path, found)

    def _set(self, path: str, now: Properties) -> None:
        if self._only not in (None, path):
            return
        before = self._known.get(path)
        self._known[path] = now
        if before is None:
            self._changes.append(Change("attached", self._make(path, now), now))
        elif names := before.differences(now):
            self._changes.append(Change("changed", self._make(path, now), now, names))

    def _remove(self, path: str) -> None:
        before = self._known.pop(path, None)
        if before is not None:
            self._changes.append(Change("detached", self._make(path, before), before))
            self._over |= self._only is not None


async def objects(link: Link) -> dict[str, Properties]:
    """All device objects of loopd by their paths, sorted by number."""
    (found,) = await link.call(PATH, OBJECT_MANAGER, "GetManagedObjects", returns=[is_a(dict)])
    told: list[tuple[str, Any]] = [
        (path, Properties.decode(interfaces[DEVICE]))
        for path, interfaces in found.items()
        if isinstance(interfaces, dict) and DEVICE in interfaces
    ]
    return dict(sorted(told, key=lambda pair: pair[1].number))
