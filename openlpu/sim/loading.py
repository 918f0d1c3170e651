"""In: a Program and a Chip. Out: the chip's memory before the first step; or MachineError.

What a machine can refuse before any cycle: a program of another chip, contents outside memory or
twice in one word, ports outside memory, lane maps that are none, a plan that cannot be walked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.program import Loop, Port, Program, Run
from openlpu.sim.result import Where


def load(program: Program, chip: Chip) -> NDArray[np.uint8]:
    """Memory [slices, words, lanes]: the image, zeros elsewhere."""
    loader = _Loader(program, chip)
    loader.maps()
    loader.params()
    loader.plan(program.plan, {})
    names = [port.name for port in program.ports]
    loader.demand(len(set(names)) == len(names), "two ports have the same name")
    for port in program.ports:
        loader.port(port)
    return loader.memory()


class _Loader:
    def __init__(self, program: Program, chip: Chip) -> None:
        self.program, self.chip = program, chip
        self.demand(program.chip == chip.name, f"made for {program.chip}, not {chip.name}")

    def demand(self, condition: bool, what: str) -> None:
        if not condition:
            raise Where().fault(self.chip, what)

    def words(self, what: str, slice_index: int, first: int, last: int) -> None:
        """Both words, whichever is the higher, are in memory."""
        self.demand(0 <= slice_index < self.chip.slices, f"{what}: no slice {slice_index}")
        for word in (first, last):
            self.demand(0 <= word < self.chip.words, f"{what}: no word {word}")

    def memory(self) -> NDArray[np.uint8]:
        chip = self.chip
        memory = np.zeros((chip.slices, chip.words, chip.lanes), np.uint8)
        full = np.zeros((chip.slices, chip.words), np.bool_)
        for segment in self.program.image:
            what = f"segment {segment.what!r}"
            shaped = segment.data.ndim == 2 and segment.data.shape[1] == chip.lanes
            self.demand(shaped and segment.data.dtype == np.uint8, f"{what} holds no words")
            count = len(segment.data)
            self.demand(count > 0, f"{what} is empty")
            self.words(what, segment.slice, segment.word, segment.word + count - 1)
            place = segment.slice, slice(segment.word, segment.word + count)
            self.demand(not full[place].any(), f"{what} lies on another")
            memory[place] = segment.data
            full[place] = True
        for name, slice_index, word, count in self.program.used:
            what = f"memory of {name!r}"
            self.demand(count > 0, f"{what} is empty")
            self.words(what, slice_index, word, word + count - 1)
            taken = full[slice_index, word : word + count].any()
            self.demand(not taken, f"{what} has contents")
        return memory

    def maps(self) -> None:
        maps, chip = self.program.maps, self.chip
        shaped = maps.dtype == np.int16 and maps.ndim == 2 and maps.shape[1] == chip.lanes
        self.demand(shaped, f"maps are no int16 rows of {chip.lanes} lanes")
        self.demand(len(maps) <= chip.sxm_maps, f"{len(maps)} maps, the chip has {chip.sxm_maps}")
        inside = bool(np.all((maps >= -1) & (maps < chip.lanes)))
        self.demand(inside, "a map names a lane that the chip lacks")

    def port(self, port: Port) -> None:
        what = f"port {port.name!r}"
        self.demand(port.direction in ("in", "out"), f"{what} is neither in nor out")
        self.demand(port.rows >= 1, f"{what} has no rows")
        counts = {len(vector.slices) for vector in port.vectors}
        self.demand(len(counts) == 1 and min(counts) > 0, f"{what}: vectors of {counts} bytes")
        shape = (len(port.vectors), self.chip.lanes)
        good = port.features.shape == shape and port.features.dtype == np.int32
        self.demand(good, f"{what}: features are no int32 {list(shape)}")
        self.demand(int(port.features.min()) >= -1, f"{what}: an element below -1")
        for vector in port.vectors:
            last = vector.word + (port.rows - 1) * vector.row_step
            for slice_index in vector.slices:
                self.words(what, slice_index, vector.word, last)

    def params(self) -> None:
        params = self.program.params
        names = {param.name for param in params}
        self.demand(len(names) == len(params), "two parameters have the same name")
        for param in params:
            what = f"parameter {param.name}"
            self.demand(param.values >= 1, f"{what} has no values")
            self.demand(0 <= param.lowest <= param.highest, f"{what} has no range")

    def plan(self, body: tuple[Run | Loop, ...], around: Mapping[str, int]) -> None:
        """around: the most values of each loop variable outside."""
        for item in body:
            if isinstance(item, Run):
                self.run(item, around)
                continue
            most = self.most(item, around)
            self.demand(item.var not in around, f"loop {item.var} stands in a loop of that name")
            self.plan(item.body, {**around, item.var: most})

    def most(self, loop: Loop, around: Mapping[str, int]) -> int:
        what = f"loop {loop.var}"
        self.demand(not loop.by or loop.by in around, f"{what}: no loop {loop.by} around it")
        if isinstance(loop.count, int):
            self.demand(loop.count >= 0, f"{what} runs {loop.count} times")
            return loop.count
        params = {param.name: param for param in self.program.params}
        self.demand(loop.count in params, f"{what}: no parameter {loop.count}")
        param = params[loop.count]
        indexed = not loop.by or around[loop.by] <= param.values
        self.demand(indexed, f"{what}: {param.name} has {param.values} values, {loop.by} more")
        return param.highest

    def run(self, run: Run, around: Mapping[str, int]) -> None:
        """The registers that a run loads; their values are checked when it begins."""
        known = 0 <= run.section < len(self.program.sections)
        self.demand(known, f"the plan runs section {run.section}, which is not there")
        what = f"a run of {self.program.sections[run.section].name!r}"
        places = [(base.slice, base.reg) for base in run.bases]
        self.demand(len(set(places)) == len(places), f"{what} loads a base register twice")
        for base in run.bases:
            self.demand(0 <= base.slice < self.chip.slices, f"{what}: no slice {base.slice}")
            real = 1 <= base.reg < self.chip.base_registers
            self.demand(real, f"{what}: no base register {base.reg} to load")
            for var, _ in base.strides:
                self.demand(var in around, f"{what}: no loop {var} around it")
