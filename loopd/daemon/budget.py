# SPDX-License-Identifier: LGPL-2.1-or-later
"""A token bucket: how much somebody may have at once, and how much more with each second."""

import time


class Bucket:
    """Holds `burst` at most, and gets `rate` a second. Who has emptied it waits for a `step`.

    What is taken need not be there: it may go below zero, by `burst` at most.
    """

    def __init__(self, *, burst: float, rate: float, step: float) -> None:
        self._burst = burst
        self._rate = rate
        self._step = step
        self._left = burst
        self._filled = time.monotonic()

    def take(self, amount: float) -> None:
        """Take so much out; a negative amount is given back."""
        self._fill()
        self._left = min(max(self._left - amount, -self._burst), self._burst)

    def wait(self) -> float:
        """The seconds until something may be taken; 0 if it may now."""
        self._fill()
        return 0.0 if self._left > 0 else (self._step - self._left) / self._rate

    @property
    def full(self) -> bool:
        """Whether there is nothing to remember."""
        self._fill()
        return self._left >= self._burst

    def _fill(self) -> None:
        now = time.monotonic()
        self._left = min(self._left + (now - self._filled) * self._rate, self._burst)
        self._filled = now
