"""In: what a section issues. Out: Bases, which value of which base register each access adds.

A register's values are numbered: 0 is register 0, then one for each `setbase`, then one for each
register as the section's run loads it. So an access names its base once and for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.program import Base, Loop, Program, Run
from openlpu.sim.events import I64, Issued

_REGISTERS = 16  # at most, of a slice
Extremes = dict[tuple[int, int], tuple[int, int]]  # (slice, register) -> lowest, highest value


class Bases:
    """The numbered base values of a section."""

    def __init__(self, chip: Chip, issued: Mapping[str, Issued]) -> None:
        self._chip = chip
        none = np.zeros(0, np.int64)
        sets = issued.get("setbase")
        self.set_slots = 1 + np.arange(len(sets)) if sets else none
        self._set_limits = sets.arg("limit") if sets else none
        register = sets.index * _REGISTERS + sets.arg("reg") if sets else none
        usable = sets.cycle + chip.latency.base_load if sets else none
        self._span = 1 + max((int(e.cycle.max()) for e in issued.values()), default=0)
        self._span = max(self._span, 1 + int(usable.max(initial=0)))
        order = np.argsort(register * self._span + usable)
        self._keys = (register * self._span + usable)[order]
        self._sorted_slots = self.set_slots[order]
        self._loaded: dict[int, int] = {}  # register -> number
        self._room: dict[int, int] = {}  # register -> highest value that stays in the bank

    def of(self, e: Issued) -> tuple[I64, I64]:
        """Of each access: its word among all words of the chip, and the number of its base."""
        chip = self._chip
        word, number = e.arg("word"), e.arg("base")
        register = e.index * _REGISTERS + number
        at = np.searchsorted(self._keys, register * self._span + e.cycle, "right") - 1
        known = at >= 0
        at = np.where(known, at, 0)
        if len(self._keys):
            known &= self._keys[at] // self._span == register
        slots = self._sorted_slots[at] if len(self._keys) else np.zeros(len(e), np.int64)
        loaded = ~known & (number > 0)
        distinct, inverse = np.unique(register[loaded], return_inverse=True)
        first = 1 + len(self.set_slots)
        of_distinct = [first + self._loaded.setdefault(int(r), len(self._loaded)) for r in distinct]
        slots = np.where(number == 0, 0, slots)
        slots[loaded] = np.array(of_distinct, np.int64)[inverse] if of_distinct else 0
        reach = e.arg("limit") if e.op in ("gather", "scatter") else 0
        room = chip.words_per_bank - 1 - word % chip.words_per_bank - reach
        for r, most in zip(distinct, _least(room[loaded], inverse, len(distinct)), strict=True):
            self._room[int(r)] = min(int(most), self._room.get(int(r), chip.words))
        return e.index * chip.words + word, slots

    def registers(self) -> list[tuple[int, int]]:
        """(slice, register) of the values that a run must load, in the order of their numbers."""
        return [(r // _REGISTERS, r % _REGISTERS) for r in self._loaded]

    def ranges(self, planned: Extremes) -> tuple[I64, I64]:
        """Lowest and highest value of every number: as set, or as the plan loads it where that
        stays in the bank. Raises MachineError for a register that no run loads."""
        low, high = [0, *(-1 for _ in self.set_slots)], [0, *map(int, self._set_limits)]
        for (slice_index, reg), room in zip(self.registers(), self._rooms(), strict=True):
            if (slice_index, reg) not in planned:
                raise MachineError(f"slice {slice_index}: base register {reg} holds nothing")
            lowest, highest = planned[slice_index, reg]
            low.append(max(lowest, -1))
            high.append(max(min(highest, room), -1))
        return np.array(low, np.int64), np.array(high, np.int64)

    def _rooms(self) -> list[int]:
        return [self._room[r] for r in self._loaded]


def _least(values: I64, group: I64, groups: int) -> I64:
    """The least value of each group."""
    least = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(least, group, values)
    return least


@dataclass(frozen=True, slots=True)
class Loads:
    """How a run fills the registers that its section needs: value + sum of stride * variable."""

    values: I64
    strides: tuple[tuple[str, I64], ...]

    def at(self, around: Mapping[str, int]) -> I64:
        """The values, for these loop variables."""
        total = self.values
        for variable, stride in self.strides:
            total = total + stride * around[variable]
        return total


def loads(bases: Sequence[Base], registers: Sequence[tuple[int, int]]) -> Loads:
    """Raises MachineError where a register is not loaded."""
    by_register = {(base.slice, base.reg): base for base in bases}
    missing = [register for register in registers if register not in by_register]
    if missing:
        raise MachineError(f"slice {missing[0][0]}: base register {missing[0][1]} holds nothing")
    needed = [by_register[register] for register in registers]
    variables = sorted({variable for base in needed for variable, _ in base.strides})
    strides = []
    for variable in variables:
        column = [sum(s for v, s in base.strides if v == variable) for base in needed]
        strides.append((variable, np.array(column, np.int64)))
    return Loads(np.array([base.value for base in needed], np.int64), tuple(strides))


def extremes(program: Program) -> dict[int, Extremes]:
    """Of each section that the plan runs: the range of what it loads into each register."""
    found: dict[int, Extremes] = {}
    highest = {param.name: param.highest for param in program.params}

    def visit(body: Sequence[Run | Loop], around: dict[str, int]) -> None:
        for item in body:
            if isinstance(item, Loop):
                count = item.count if isinstance(item.count, int) else highest[item.count]
                if count > 0:
                    visit(item.body, {**around, item.var: count - 1})
                continue
            known = found.setdefault(item.section, {})
            for base in item.bases:
                moves = [stride * around[variable] for variable, stride in base.strides]
                low = base.value + sum(min(move, 0) for move in moves)
                high = base.value + sum(max(move, 0) for move in moves)
                old = known.get((base.slice, base.reg), (low, high))
                known[base.slice, base.reg] = (min(low, old[0]), max(high, old[1]))

    visit(program.plan, {})
    return found
