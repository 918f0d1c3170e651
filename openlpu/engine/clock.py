"""In: nothing, or cycles. Out: the time that an engine lives in.

The host engine lives in real time, a simulated chip in the time its cycles take. The engine reads a
Clock and does not know which it is.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds from an arbitrary beginning; never goes back."""

    def __call__(self) -> float: ...


wall_clock: Clock = time.perf_counter


class ChipClock:
    """The time of a chip: it moves by the cycles that the chip ran, and by waiting."""

    def __init__(self, clock_hz: int) -> None:
        self._clock_hz = clock_hz
        self._cycles = 0
        self._waited_s = 0.0

    def __call__(self) -> float:
        return self._cycles / self._clock_hz + self._waited_s

    def ran(self, cycles: int) -> None:
        """The chip ran so many cycles more."""
        self._cycles += cycles

    def wait_until(self, time_s: float) -> None:
        """Nothing happens until then; a time that has passed changes nothing."""
        self._waited_s += max(0.0, time_s - self())
