"""In: a program. Out: how many cycles a second the fast simulator runs, values and all.

    python bench/simulator.py [MODEL.lpu] [--kernels avx512] [--repeat 5]
    python bench/simulator.py [--chip tsp_v1] [--matrices 3] [--rows 1]

With a file of `lpu compile`: its longest step, on whatever its input ports hold. Without: a program
that multiplies rows by matrices of the feed-forward part of Llama-3-8B, 4096 x 14336, as a compiler
would at best: every plane loads a tile in as many cycles as it has groups, on 16 streams, while it
multiplies by the tile before. The sums are compared with numpy's.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openlpu import asm, isa, jit
from openlpu.chip import EAST, Chip, load_chip
from openlpu.program import Issue, Port, Program, Run, Section, Segment, Vector
from openlpu.sim.fast import Fast

INPUT, OUTPUT = 4096, 14336


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tiles of a hemisphere lie. The planes of a hemisphere work side by side: in turn t
    its plane p loads the vectors of one tile from slices(t, p), at word(t)."""

    chip: Chip

    def slices(self, turn: int, plane: int) -> list[int]:
        """Those of a hemisphere in rotation, so that all are filled."""
        chip = self.chip
        width, side = chip.install_streams, chip.planes_per_hemisphere
        first = (turn * side + plane) * width
        return [(first + j) % chip.slices_per_hemisphere for j in range(width)]

    def word(self, turn: int, plane: int, j: int) -> int:
        chip = self.chip
        width, side = chip.install_streams, chip.planes_per_hemisphere
        before = ((turn * side + plane) * width + j) // chip.slices_per_hemisphere
        return before * (chip.lanes // width)


class Builder:
    """The issues, the memory and the expected sums of one section."""

    def __init__(self, chip: Chip, matrices: int, rows: int) -> None:
        self.chip, self.rows = chip, rows
        lanes = chip.lanes
        self.inputs, self.outputs = -(-INPUT // lanes), -(-OUTPUT // lanes) * matrices
        self.groups = lanes // chip.install_streams
        self.turn_cycles = self.groups + rows
        self.start = chip.positions + chip.latency.mem_read
        self.layout = Layout(chip)
        # Tiles by columns first: all inputs of one column tile follow each other on one plane.
        per_plane = -(-self.outputs // chip.planes)
        self.turns = per_plane * self.inputs
        self.issues: list[Issue] = []
        self.memory = np.zeros((chip.slices, chip.words, lanes), np.uint8)
        generator = np.random.default_rng(1)
        self.x = generator.integers(-128, 128, (self.inputs, rows, lanes), np.int8)
        self.sums: dict[tuple[int, int], NDArray[np.int32]] = {}
        self.generator = generator

    def build(self) -> Program:
        for plane in range(self.chip.planes):
            self._plane(plane)
        ports = [self._results(plane) for plane in range(self.chip.planes)]
        self.issues.sort(key=lambda i: (i.queue, i.cycle, i.op, i.args))
        cycles = max(issue.last_cycle for issue in self.issues) + 2 * self.chip.positions
        section = Section("tiles", cycles, tuple(self.issues))
        image = [Segment(s, 0, words, "weights") for s, words in enumerate(self.memory)]
        maps = np.zeros((0, self.chip.lanes), np.int16)
        chip = self.chip.name
        return Program(chip, (section,), (Run(0),), (), maps, tuple(image), tuple(ports))

    def demand_right(self, machine: Fast) -> None:
        """Compare what the ports hold after a step with numpy's sums."""
        for plane in range(self.chip.planes):
            data = machine.read(f"sums{plane}")
            found = np.ascontiguousarray(np.moveaxis(data, 2, 3)).view("<i4")[:, 0, :, 0]
            for column in range(self.turns // self.inputs):
                rows = slice(column * self.rows, (column + 1) * self.rows)
                assert np.array_equal(found[rows], self.sums[plane, column]), (plane, column)

    def _plane(self, plane: int) -> None:
        chip = self.chip
        hemisphere, side = divmod(plane, chip.planes_per_hemisphere)
        queue = isa.units(chip).load + 3 * plane
        first_stream = hemisphere * chip.streams + side * chip.install_streams
        for turn in range(self.turns):
            at = self.start + turn * self.turn_cycles
            tile = self.generator.integers(-128, 128, (chip.lanes, chip.lanes), np.int8)
            for j, s in enumerate(self.layout.slices(turn, side)):
                s += hemisphere * chip.slices_per_hemisphere
                word = self.layout.word(turn, side, j)
                self._bring(s, word, plane, first_stream + j, at, self.groups)
                self.memory[s, word : word + self.groups] = tile[j :: chip.install_streams].view(
                    np.uint8
                )
            args = (0, 1, first_stream, 0, 0)
            self.issues.append(Issue(at, queue, "load", args, self.groups))
            # The last row of the tile before still comes in the cycle of the install.
            self.issues.append(Issue(at + self.turn_cycles - 1, queue, "install", ()))
            # The rows come through where the loads leave a gap, one turn later.
            column, k = divmod(turn, self.inputs)
            slot = column * self.rows
            act = at + self.turn_cycles + self.groups
            s = hemisphere * chip.slices_per_hemisphere + self._spare(turn, plane)
            word = self._input_word(k)
            self.memory[s, word : word + self.rows] = self.x[k].view(np.uint8)
            self._bring(s, word, plane, first_stream, act, self.rows)
            args = (slot, 1, first_stream, 1, int(k > 0))
            self.issues.append(Issue(act, queue + 1, "act", args, self.rows))
            sums = self.x[k].astype(np.int32) @ tile.T.astype(np.int32)
            self.sums[plane, column] = self.sums.get((plane, column), 0) + sums

    def _spare(self, turn: int, plane: int) -> int:
        """A slice that feeds no plane when the rows of a turn are read, which is about a turn
        later, at a time that depends on how far it is from the plane."""
        chip = self.chip
        side = plane % chip.planes_per_hemisphere
        busy = {
            s
            for t in (turn, turn + 1, turn + 2)
            for p in range(chip.planes_per_hemisphere)
            for s in self.layout.slices(t, p)
        }
        free = [s for s in range(chip.slices_per_hemisphere) if s not in busy]
        return free[side] if len(free) > 1 else chip.slices_per_hemisphere - 1 - side

    def _input_word(self, k: int) -> int:
        return self.chip.words - (k + 1) * self.rows

    def _bring(self, s: int, word: int, plane: int, stream: int, at: int, count: int) -> None:
        """Words of a slice, one a cycle, onto a stream that reaches the plane from `at` on."""
        chip = self.chip
        way = abs(chip.mem_position(s) - chip.mxm_position(plane))
        args = (word, 1, 0, stream)
        self.issues.append(Issue(at - way - chip.latency.mem_read, s, "read", args, count))

    def _results(self, plane: int) -> Port:
        """All sums of a plane into the four slices nearest to it, when all is done."""
        chip = self.chip
        hemisphere, side = divmod(plane, chip.planes_per_hemisphere)
        columns = self.turns // self.inputs
        count = columns * self.rows
        begin = (
            self.start + (self.turns + 3) * self.turn_cycles + side * count + chip.latency.mxm_dot
        )
        stream = (0 if hemisphere == EAST else chip.streams) + 4 * side
        queue = isa.units(chip).load + 3 * plane + 2
        self.issues.append(Issue(begin, queue, "out", (0, 1, stream), count))
        last = (hemisphere + 1) * chip.slices_per_hemisphere - 1
        word = self._input_word(self.inputs) - (side + 1) * count
        slices = tuple(last - b for b in range(4))
        for b, s in enumerate(slices):
            way = abs(chip.mem_position(s) - chip.mxm_position(plane))
            args = (word, 1, 0, stream + b, 1)
            self.issues.append(Issue(begin + chip.latency.mxm_out + way, s, "write", args, count))
        vectors = (Vector(slices, word, 1),)
        features = np.arange(chip.lanes, dtype=np.int32)[None]
        return Port(f"sums{plane}", "out", count, vectors, features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--chip", default="")
    parser.add_argument("--matrices", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--kernels", default=None)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    builder = None
    if options.file:
        program = asm.load(options.file)
        chip = load_chip(options.chip or program.chip)
    else:
        chip = load_chip(options.chip or "tsp_v1")
        builder = Builder(chip, options.matrices, options.rows)
        program = builder.build()
    params = {param.name: (param.highest,) * param.values for param in program.params}
    began = time.perf_counter()
    machine = Fast(program, chip, target=jit.select(options.kernels))
    print(f"prepared in {time.perf_counter() - began:.2f} s")
    for _ in range(options.repeat):
        began = time.perf_counter()
        result = machine.run(params)
        seconds = time.perf_counter() - began
        loaded = result.counters.get("issue.load", 0) * chip.install_streams * chip.lanes
        print(
            f"{result.cycles:,} cycles in {1000 * seconds:.1f} ms: "
            f"{result.cycles / seconds:,.0f} cycles a second, {loaded // 10**6} MB loaded"
        )
    if builder is not None:
        builder.demand_right(machine)
        print("all sums are right")


if __name__ == "__main__":
    main()
