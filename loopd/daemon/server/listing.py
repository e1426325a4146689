# SPDX-License-Identifier: LGPL-2.1-or-later
"""An answer that has something of every device, kept marshalled device by device.

With 512 devices the libraries take up to 150 ms to marshal what GetManagedObjects answers, and
everybody waits meanwhile. So an element is marshalled once for each change of its device, and many
of them in slices.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from loopd.bus import codec

# Seconds of marshalling before others get their turn, and for how long an answer is made like that.
_SLICE = 0.002
_PATIENCE = 0.25


class Listing:
    """An array with an element for each object path."""

    def __init__(self, signature: str, element: Callable[[str], Any]) -> None:
        """`element` makes an array of a path's only element, as the libraries take it."""
        self._signature = signature
        self._element = element
        self._kept: dict[str, bytes] = {}
        self._making = asyncio.Lock()

    def forget(self, path: str) -> None:
        """Note that the element of a path has changed, or is gone."""
        self._kept.pop(path, None)

    async def of(self, paths: Callable[[], Iterable[str]]) -> codec.Array:
        """The array of these paths, as they and their elements are when this returns."""
        # One at a time, so that those who ask together do not each have a slice.
        async with self._making:
            patient_until = time.monotonic() + _PATIENCE
            while True:
                listed = [*paths()]
                now = time.monotonic()
                # Devices may change faster than their elements are made: the rest comes at once.
                end = now + _SLICE if now < patient_until else math.inf
                for path in listed:
                    if path in self._kept:
                        continue
                    self._kept[path] = codec.element(self._signature, self._element(path))
                    if time.monotonic() > end:
                        break
                else:
                    # Not a turn later, when more may have changed, and so for ever.
                    return codec.Array(self._signature, [self._kept[path] for path in listed])
                # What was listed may have changed when the others have had their turn.
                await asyncio.sleep(0)
