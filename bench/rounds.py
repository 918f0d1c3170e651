"""In: engines, cases and a text. Out: every figure of every round, in which the engines take turns.

Beside each measurement stands the limit of its work, read just before and after it, because it
moves: the bandwidth of the memory for decode of one sequence, the integer peak for a prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandwidth import MemoryRead
from engines import Side, Timing
from machine import SETTLE_S, busy_cores
from peak import IntegerPeak

TEXT = Path(__file__).with_name("text") / "essays.txt"
MEMORY, PEAK = "memory", "peak"


@dataclass(frozen=True, slots=True)
class Case:
    """Work that is timed: the prompts when there are no steps, else the steps."""

    name: str
    sequences: int
    prompt_tokens: int
    steps: int
    limit: str = ""
    """What bounds it: MEMORY, PEAK, or nothing that is measured."""

    def tokens_per_s(self, timing: Timing) -> float:
        """Of all sequences together."""
        if self.steps:
            return self.sequences * self.steps / timing.decode_s
        return self.sequences * self.prompt_tokens / timing.prefill_s


CASES = {
    case.name: case
    for case in (
        Case("decode", 1, 16, 64, MEMORY),
        Case("prefill 512", 1, 512, 0, PEAK),
        Case("decode 8", 8, 16, 32),
        Case("decode 32", 32, 16, 32),
    )
}


class Rounds:
    """Tokens per second by case and engine, limits per second likewise: one value a round."""

    def __init__(
        self,
        sides: Mapping[str, Side],
        cases: Sequence[Case],
        text: list[int],
        memory: MemoryRead,
        peak: IntegerPeak,
    ) -> None:
        """text: token ids from which the prompts are cut."""
        self._sides, self._cases, self._text = sides, cases, text
        self._limits = {MEMORY: memory.bytes_per_s, PEAK: peak.products_per_s}
        self._idle_cores: list[float] = []  # in use by the engines that should be idle
        self._strangers_cores: list[float] = []  # in use just before, while all engines sleep
        self._first: dict[str, list[int]] = {name: [] for name in sides}
        self._rates = self._lists(cases)
        self._limited = self._lists([case for case in cases if case.limit])

    def warm_up(self) -> None:
        """Run every case once, with one step; nothing is kept."""
        for case in self._cases:
            for side in self._sides.values():
                side.run(self._prompts(case), min(case.steps, 1))

    def run(self, index: int) -> None:
        """One round: each case on each engine; who begins changes from round to round."""
        names = list(self._sides)
        begin = index % len(names)
        for case in self._cases:
            for name in names[begin:] + names[:begin]:
                timing = self._timed(case, name)
                self._rates[case.name][name].append(case.tokens_per_s(timing))
                self._first[name] += [tokens[0] for tokens in timing.tokens]

    def record(self) -> dict[str, Any]:
        """The figures as the report has them."""
        expected = next(iter(self._first.values()))
        return {
            "tokens_per_s": self._rates,
            "limits_per_s": self._limited,
            "busy_cores": {
                "idle engines": max(self._idle_cores),
                "others": statistics.mean(self._strangers_cores),
            },
            "same_first_tokens": {
                name: sum(a == b for a, b in zip(tokens, expected, strict=True)) / len(expected)
                for name, tokens in self._first.items()
            },
        }

    def _timed(self, case: Case, name: str) -> Timing:
        side = self._sides[name]
        # Engines of one process share its time: theirs is known together only.
        others = {other.pid: other for other in self._sides.values() if other.pid != side.pid}
        self._strangers_cores.append(busy_cores(SETTLE_S))
        limit = self._limits.get(case.limit)
        before = limit() if limit else 0.0
        cpu_s = sum(other.cpu_s() for other in others.values())
        started_s = time.perf_counter()
        timing = side.run(self._prompts(case), case.steps)
        took_s = time.perf_counter() - started_s
        used_s = sum(other.cpu_s() for other in others.values()) - cpu_s
        self._idle_cores.append(used_s / took_s)
        if limit:
            # Read on both sides of the work; the faster one, so that the share errs downwards.
            self._limited[case.name][name].append(max(before, limit()))
        return timing

    def _prompts(self, case: Case) -> list[list[int]]:
        n = case.prompt_tokens
        return [self._text[i * n : (i + 1) * n] for i in range(case.sequences)]

    def _lists(self, cases: Sequence[Case]) -> dict[str, dict[str, list[float]]]:
        return {case.name: {name: [] for name in self._sides} for case in cases}
