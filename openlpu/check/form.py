"""In: a Program and a Chip. Out: its runs with the bases they can load; or ProgramError.

The form is what can be judged without any instruction: memory contents, ports, lane maps, the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from openlpu.check.table import fail
from openlpu.chip import Chip
from openlpu.program import Base, Loop, Param, Port, Program, Run

Extremes = Mapping[tuple[int, int], tuple[int, int]]  # (slice, register) -> lowest, highest base


@dataclass(frozen=True, slots=True)
class Reached:
    """A run that some legal parameters reach."""

    section: int
    bases: Extremes


class Form:
    """Judges the form of one program."""

    def __init__(self, program: Program, chip: Chip) -> None:
        self.program, self.chip = program, chip
        self.params = {param.name: param for param in program.params}

    def demand(self, condition: bool, what: str) -> None:
        if not condition:
            fail(self.chip, what)

    def judge(self) -> list[Reached]:
        """Raise at the first fault; else every run of the plan that can happen."""
        program = self.program
        made_for = f"the program is made for {program.chip}, not for {self.chip.name}"
        self.demand(program.chip == self.chip.name, made_for)
        self._maps()
        self._contents()
        self.demand(_distinct([port.name for port in program.ports]), "port names repeat")
        for port in program.ports:
            self._port(port)
        self.demand(_distinct([param.name for param in program.params]), "parameter names repeat")
        for param in program.params:
            good = param.values >= 1 and 0 <= param.lowest <= param.highest
            self.demand(good, f"parameter {param.name} can have no value")
        return list(self._walk(program.plan, {}, True))

    def _maps(self) -> None:
        maps, lanes = self.program.maps, self.chip.lanes
        good = maps.dtype == np.int16 and maps.ndim == 2 and maps.shape[1] == lanes
        self.demand(good, f"maps must be int16 [maps, {lanes}]")
        self.demand(len(maps) <= self.chip.sxm_maps, f"more than {self.chip.sxm_maps} maps")
        good = bool(((maps >= -1) & (maps < lanes)).all())
        self.demand(good, f"a map has an entry outside -1 .. {lanes - 1}")

    def _range(self, what: str, slice_index: int, first: int, last: int) -> None:
        words = self.chip.words
        inside = min(first, last) >= 0 and max(first, last) < words
        good = 0 <= slice_index < self.chip.slices and inside
        self.demand(good, f"{what}: slice {slice_index}, words {first} .. {last} are no memory")

    def _contents(self) -> None:
        """Segments inside memory, none on another; memory in use elsewhere, without contents."""
        spans = []
        for segment in self.program.image:
            what = f"segment {segment.what!r} of slice {segment.slice}"
            data = segment.data
            good = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == self.chip.lanes
            self.demand(good and len(data) > 0, f"{what} must be uint8 [n, {self.chip.lanes}]")
            end = segment.word + len(data)
            self._range(what, segment.slice, segment.word, end - 1)
            spans.append((segment.slice, segment.word, end, what))
        spans.sort()
        for one, other in pairwise(spans):
            apart = one[0] != other[0] or one[2] <= other[1]
            self.demand(apart, f"{one[3]} and {other[3]} overlap")
        firsts = np.array([(span[0], span[1]) for span in spans], np.int64).reshape(-1, 2)
        keys = firsts[:, 0] * self.chip.words + firsts[:, 1]
        for name, slice_index, word, count in self.program.used:
            what = f"memory in use for {name!r}"
            self.demand(count > 0, f"{what} has {count} words")
            self._range(what, slice_index, word, word + count - 1)
            # The last segment that begins before its end is the only one that can reach into it.
            at = int(np.searchsorted(keys, slice_index * self.chip.words + word + count)) - 1
            apart = at < 0 or spans[at][0] != slice_index or spans[at][2] <= word
            self.demand(apart, f"{what} overlaps a segment")

    def _port(self, port: Port) -> None:
        what = f"port {port.name!r}"
        self.demand(port.direction in ("in", "out"), f"{what} has no direction")
        self.demand(port.rows >= 1, f"{what} has {port.rows} rows")
        sizes = {len(vector.slices) for vector in port.vectors}
        self.demand(len(sizes) == 1 and 0 not in sizes, f"{what}: vectors differ in bytes, or none")
        shape = (len(port.vectors), self.chip.lanes)
        good = port.features.dtype == np.int32 and port.features.shape == shape
        self.demand(good, f"{what}: features must be int32 {list(shape)}")
        self.demand(bool((port.features >= -1).all()), f"{what}: a feature is below -1")
        for vector in port.vectors:
            last = vector.word + (port.rows - 1) * vector.row_step
            for slice_index in vector.slices:
                self._range(what, slice_index, vector.word, last)

    def _walk(
        self, body: tuple[Run | Loop, ...], most: Mapping[str, int], reached: bool
    ) -> Iterator[Reached]:
        """most: how many values the variables of the loops outside can have."""
        for item in body:
            if isinstance(item, Run):
                bases = self._run(item, most)
                if reached:
                    yield Reached(item.section, bases)
                continue
            self.demand(item.var not in most, f"loop {item.var} is inside a loop of its name")
            count = self._count(item, most)
            yield from self._walk(item.body, {**most, item.var: count}, reached and count > 0)

    def _count(self, loop: Loop, most: Mapping[str, int]) -> int:
        what = f"loop {loop.var}"
        self.demand(not loop.by or loop.by in most, f"{what} counts by {loop.by}, no loop outside")
        if isinstance(loop.count, int):
            self.demand(loop.count >= 0, f"{what} has the count {loop.count}")
            return loop.count
        self.demand(loop.count in self.params, f"{what} counts to an unknown {loop.count}")
        param: Param = self.params[loop.count]
        enough = not loop.by or most[loop.by] <= param.values
        self.demand(enough, f"{what}: {param.name} has fewer values than {loop.by} has")
        return param.highest

    def _run(self, run: Run, most: Mapping[str, int]) -> dict[tuple[int, int], tuple[int, int]]:
        sections = self.program.sections
        known = 0 <= run.section < len(sections)
        self.demand(known, f"the plan runs section {run.section} of {len(sections)}")
        what = f"a run of section {sections[run.section].name!r}"
        found = {}
        for base in run.bases:
            place = f"base register {base.reg} of slice {base.slice}"
            good = 0 <= base.slice < self.chip.slices and 1 <= base.reg < self.chip.base_registers
            self.demand(good, f"{what}: there is no {place} to load")
            self.demand((base.slice, base.reg) not in found, f"{what} loads {place} twice")
            unknown = [var for var, _ in base.strides if var not in most]
            self.demand(not unknown, f"{what}: {place} moves by {unknown}, no loops outside")
            found[base.slice, base.reg] = _extremes(base, most)
        return found


def _distinct(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _extremes(base: Base, most: Mapping[str, int]) -> tuple[int, int]:
    """The lowest and the highest value of a base; the variables of its loops are independent."""
    lowest = highest = base.value
    strides: dict[str, int] = {}
    for var, stride in base.strides:
        strides[var] = strides.get(var, 0) + stride
    for var, stride in strides.items():
        reach = stride * max(most[var] - 1, 0)
        lowest, highest = lowest + min(reach, 0), highest + max(reach, 0)
    return lowest, highest
