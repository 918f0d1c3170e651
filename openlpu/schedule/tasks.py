"""In: vectors of the rows of a step. Out: tasks that several ops share: maxima, sums, squares.

The vocabulary of the lowering: buffers for all rows, expressions over them, and what crosses lanes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import EAST, WEST, Chip
from openlpu.numerics.functions import NORM_LEVELS
from openlpu.schedule.constants import BYTE, WORD, Constants
from openlpu.schedule.expression import Accumulator, Expression, Leaf, Operand
from openlpu.schedule.functions import MAGNITUDE, inverse_root, quantization_step
from openlpu.schedule.matrix import Tile, accumulators, act, install, load
from openlpu.schedule.maxima import group_sizes, reduce_group
from openlpu.schedule.memory import Buffer, Memory
from openlpu.schedule.reduce import reduce_lanes
from openlpu.schedule.section import SectionBuilder
from openlpu.schedule.weights import WeightStore


class Tasks:
    """Places tasks over `rows` rows in one section."""

    def __init__(
        self, builder: SectionBuilder, constants: Constants, store: WeightStore, rows: int
    ) -> None:
        self.b = builder
        self.chip: Chip = builder.chip
        self.memory: Memory = builder.memory
        self.constants = constants
        self.store = store
        self.rows = rows
        self._turn = 0

    def next_turn(self) -> int:
        """0, 1, 2, ...: products go to the planes by turns."""
        self._turn += 1
        return self._turn - 1

    def next_plane(self) -> int:
        """Planes in turn, west and east by turns."""
        turn, half = self.next_turn(), self.chip.planes_per_hemisphere
        return (turn % 2) * half + (turn // 2) % half

    def scratch(
        self,
        width: int = WORD,
        *,
        side: int | None = None,
        outer: bool = False,
        nearest: bool = False,
    ) -> Buffer:
        return self.memory.scratch(width, self.rows, hemisphere=side, outer=outer, nearest=nearest)

    def both_sides(self, width: int = WORD) -> tuple[Buffer, Buffer]:
        """Buffers near the edge of both hemispheres."""
        return self.scratch(width, side=WEST, outer=True), self.scratch(
            width, side=EAST, outer=True
        )

    def evaluate(self, expression: Expression, *buffers: Buffer) -> list[Buffer]:
        """Place an expression; the buffers, with their times."""
        written = self.b.evaluate(expression, self.rows)
        return [written[buffer] for buffer in buffers]

    def largest(self, words: list[Buffer], mask: Buffer | None = None) -> Buffer:
        """The bits of the largest magnitude over all lanes of all vectors, in every lane."""
        e = Expression()
        top: Operand | None = None
        for word in words:
            size = e.op("and", Leaf(word), MAGNITUDE)
            top = size if top is None else e.op("max", top, size)
        assert top is not None
        if mask is not None:
            top = e.op("and", top, Leaf(mask))
        pair = self.both_sides()
        e.write(top, *pair)
        west, east = self.evaluate(e, *pair)
        return self.over_lanes(west, east, "max")

    def over_lanes(self, west: Buffer, east: Buffer, op: str, *, last_read: bool = False) -> Buffer:
        """The maximum over all lanes, in every lane."""
        out = self.scratch(nearest=True)
        found = reduce_lanes(self.b, west, east, op, self.chip.lanes, self.rows, (out,))[0]
        for side in (west, east):
            if last_read:
                self.memory.give_back(side, found.ready + (self.rows - 1) * found.period)
        return found

    def places_for_maxima(self, n: int, *, alone: bool) -> list[tuple[Buffer, ...]]:
        """Where to write each of n vectors whose maxima over lanes are wanted at the same time.

        alone: one row is reduced vector by vector all the same, which takes more of the VXM, but
        one trip less. Bursts of rows keep the VXM full, so they never are where groups can be."""
        sizes = [1] * n if alone and self.rows == 1 else group_sizes(n, self.chip)
        found: list[tuple[Buffer, ...]] = []
        for size in sizes:
            if size == 1:
                found.append(self.both_sides())
            else:
                apart = self.memory.scratch_apart(size, self.rows, self.next_turn() % 2)
                found += [(buffer,) for buffer in apart]
        return found

    def maxima(self, written: list[tuple[Buffer, ...]], op: str) -> list[Buffer]:
        """The maximum over all lanes of each vector, in every lane, which is what reads it last.
        written: all of `places_for_maxima`."""
        if len(written[0]) == 2:
            return [self.over_lanes(w, e, op, last_read=True) for w, e in written]
        found: list[Buffer] = []
        for size in group_sizes(len(written), self.chip):
            sources = [buffer for (buffer,) in written[len(found) : len(found) + size]]
            found += reduce_group(self.b, sources, op, self.chip.lanes, self.rows)
        return found

    def mask(self, lanes: NDArray[np.bool_]) -> Buffer:
        """-1 in some lanes, 0 in the others, as a byte."""
        return self.constants.lanes(np.where(lanes, -1, 0).astype(np.int32), BYTE)

    def _inverse(
        self, words: list[Buffer], width: int, eps: float, mask: Buffer | None
    ) -> tuple[Buffer, Buffer]:
        """amax and 1 / sqrt(mean of squares + eps) over all vectors, in every lane."""
        amax, sums = self.squares(words, self.largest(words, mask), mask)
        e = Expression()
        inverse = self.scratch()
        e.write(inverse_root(e, sums, Leaf(amax), width, eps), inverse)
        return amax, self.evaluate(e, inverse)[0]

    def squares(
        self, words: list[Buffer], bits_of_amax: Buffer, mask: Buffer | None
    ) -> tuple[Buffer, list[Accumulator]]:
        """amax as float32, and the six limb sums of numerics section 4: hi*hi, hi*lo, lo*lo."""
        e = Expression()
        amax, step = quantization_step(e, Leaf(bits_of_amax), float(NORM_LEVELS))
        plane = self.next_plane()
        side = int(plane >= self.chip.planes_per_hemisphere)
        limbs: list[Buffer] = []
        for word in words:
            value = e.op("ftoi", e.op("fmul", Leaf(word), step))
            if mask is not None:
                value = e.op("and", value, Leaf(mask))
            high = e.op("shr", e.op("add", value, 128), 8)
            low = e.op("sub", value, e.op("shl", high, 8))
            for a, b in ((high, high), (high, low), (low, low)):
                product = e.op("mul", a, b)
                upper = e.op("shr", e.op("add", product, 128), 8)
                for limb in (upper, product):
                    limbs.append(self.scratch(BYTE, side=side, outer=True))
                    e.write(limb, limbs[-1])
        amax_out = self.scratch()
        e.write(amax, amax_out)
        *limbs, amax_word = self.evaluate(e, *limbs, amax_out)
        return amax_word, self.sum_lanes(plane, [limbs[i::6] for i in range(6)])

    def sum_lanes(self, plane: int, values: list[list[Buffer]]) -> list[Accumulator]:
        """For each list of byte vectors: their sum over lanes and vectors, in every lane."""
        load(self.b, plane, self.ones(plane))
        install(self.b, plane)
        sums = []
        for vectors in values:
            into = accumulators(self.b, plane, self.rows)
            for i, vector in enumerate(vectors):
                into = act(self.b, into, vector, self.rows, add=i > 0)
            sums.append(into)
        return sums

    def ones(self, plane: int) -> Tile:
        """Weights of 1 everywhere."""
        side = int(plane >= self.chip.planes_per_hemisphere)
        return self._ones(side)

    def _ones(self, side: int) -> Tile:
        key = ("ones", side)
        if key not in self.constants._known:
            slices, words = self.store.allocate(side, 1, layered=False)
            one = np.ones((1, self.chip.lanes), np.uint8)
            for s, word in zip(slices, words, strict=True):
                self.memory.put(s, word, one, "constants")
            self.constants._known[key] = Buffer(slices, words, 1, 0)
        buffer = self.constants._known[key]
        count = self.chip.lanes // self.chip.install_streams
        return Tile(buffer.slices, buffer.words, tuple((g, 0, 1) for g in range(count)), True)
