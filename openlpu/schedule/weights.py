"""In: layouts of a linear's input and output. Out: tiles: where its weights lie, and their bytes.

A tile is stored by columns (a word is one output's weights over 16 or more inputs) or by rows (one
input's weights over the outputs), whichever takes fewer words. Columns can be loaded in any order,
so one copy serves several output layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.schedule.layout import Layout
from openlpu.schedule.matrix import Tile
from openlpu.schedule.memory import QUAD, Memory
from openlpu.schedule.section import LAYER_BASE

Bytes = NDArray[np.uint8]
Matrix = NDArray[np.int8]
_Stored = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Fill:
    """Contents of words, once an op's tensors are known: build(op's tensors) -> uint8 [slices, n,
    lanes]. place: the op's index in its layer, or -1 - index among the ops that exist once."""

    place: int
    slices: tuple[int, ...]
    words: tuple[int, ...]
    build: Callable[[object], Bytes]
    what: str


class WeightStore:
    """Decides where weights lie, and remembers how to make their bytes."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.fills: list[Fill] = []
        self.purpose = "weights"  # what new tiles are kept as: those of a tied head go by the table
        # (place, input vector, hemisphere, features) -> where the group lies
        self._known: dict[tuple[int, int, int, tuple[int, ...]], _Stored] = {}

    def allocate(
        self,
        hemisphere: int,
        words: int,
        *,
        layered: bool,
        plane: int | None = None,
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`words` words in each of as many slices as a plane loads at once."""
        chip, purpose = self.memory.chip, self.purpose
        count = chip.install_streams // QUAD
        needed = words * (self.memory.layers if layered else 1)
        for owner in (plane, None):  # a plane's own quads, or where they are full any
            quads = self.memory.emptiest(purpose, hemisphere, count, loads=True, plane=owner)
            slices = tuple(q + b for q in quads for b in range(QUAD))
            if all(self.memory.room(purpose, s) >= needed for s in slices):
                break
        else:  # or those with the most room in one bank, the quiet ones at last
            for loads in (True, False):
                quads = self.memory.emptiest(purpose, hemisphere, count, loads=loads, one_bank=True)
                slices = tuple(q + b for q in quads for b in range(QUAD))
                if all(self.memory.room(purpose, s) >= needed for s in slices):
                    break
        take = self.memory.layered if layered else self.memory.fixed
        return slices, tuple(take(purpose, s, words) for s in slices)

    def places(
        self, hemisphere: int, words: int, *, layered: bool, plane: int
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """The same in as few places as there is room for: slices, first words, how many words of
        each. Where memory is nearly full, no bank may have room for all of them."""
        memory, count = self.memory, self.memory.chip.install_streams // QUAD
        layers = memory.layers if layered else 1
        found = []
        while words:
            quads = memory.emptiest(self.purpose, hemisphere, count, one_bank=True)
            room = min(memory.room(self.purpose, q + b) for q in quads for b in range(QUAD))
            some = min(words, max(room // layers, 1))  # with no room at all, the refusal says so
            slices, at = self.allocate(hemisphere, some, layered=layered, plane=plane)
            found.append((slices, at, some))
            words -= some
        return found

    def room(self, hemisphere: int, *, layered: bool) -> int:
        """How many words `places` can give in all: of each word the slices are different ones."""
        chip, memory = self.memory.chip, self.memory
        count = chip.install_streams // QUAD
        layers = memory.layers if layered else 1
        rooms = memory.quad_rooms(self.purpose, hemisphere, layers)
        most = sum(rooms) // count
        while most and sum(min(room, most) for room in rooms) < count * most:
            most = sum(min(room, most) for room in rooms) // count
        return most

    def has_room(self, hemisphere: int, words: int, *, layered: bool) -> bool:
        """Whether `allocate` can give as many words."""
        count = self.memory.chip.install_streams // QUAD
        needed = words * (self.memory.layers if layered else 1)
        quads = self.memory.emptiest(self.purpose, hemisphere, count, loads=True)
        slices = (q + b for q in quads for b in range(QUAD))
        return all(self.memory.room(self.purpose, s) >= needed for s in slices)

    def by_rows(
        self, place: int, inputs: Layout, outputs: Layout, plane: int, *, layered: bool
    ) -> list[Tile]:
        """One input vector [lanes] times one output vector [lanes], stored by rows. One tile for
        each place that groups come from."""
        width = self.memory.chip.install_streams
        hemisphere = plane // self.memory.chip.planes_per_hemisphere
        groups = [
            g
            for g in range(len(inputs) // width)
            if (inputs[g * width : (g + 1) * width] >= 0).any()
        ]
        tiles: list[Tile] = []
        first = 0
        for slices, words, count in self.places(
            hemisphere, len(groups), layered=layered, plane=plane
        ):
            some = groups[first : first + count]
            rows = np.concatenate([inputs[g * width : (g + 1) * width] for g in some])

            def build(weight: object, rows: Layout = rows) -> Bytes:
                assert isinstance(weight, np.ndarray)
                part = weight.T[np.maximum(rows, 0)][:, np.maximum(outputs, 0)]
                part = np.where((rows >= 0)[:, None] & (outputs >= 0)[None, :], part, 0)
                return striped(part.astype(np.int8), width)

            self.fills.append(Fill(place, slices, words, build, "weights"))
            base = LAYER_BASE if layered else 0
            tiles.append(Tile(slices, words, ranges(some, range(count)), True, base))
            first += count
        return tiles

    def by_columns(
        self, place: int, k: int, inputs: Layout, outputs: Layout, plane: int, *, layered: bool
    ) -> list[Tile]:
        """Input vector number k times one output vector, stored by columns; groups that another
        layout stored already are used again. One tile for each place that groups come from."""
        width = self.memory.chip.install_streams
        hemisphere = plane // self.memory.chip.planes_per_hemisphere
        wanted: list[tuple[int, tuple[int, ...]]] = []
        for g in range(len(outputs) // width):
            part = tuple(int(f) for f in outputs[g * width : (g + 1) * width])
            if max(part) >= 0:
                wanted.append((g, part))
        fresh = [part for _, part in wanted if (place, k, hemisphere, part) not in self._known]
        fresh = list(dict.fromkeys(fresh))
        first = 0
        for slices, words, count in self.places(
            hemisphere, len(fresh), layered=layered, plane=plane
        ):
            some = fresh[first : first + count]
            columns = np.array([f for part in some for f in part])

            def build(weight: object, columns: Layout = columns) -> Bytes:
                assert isinstance(weight, np.ndarray)
                part = weight[np.maximum(columns, 0)][:, np.maximum(inputs, 0)]
                part = np.where((columns >= 0)[:, None] & (inputs >= 0)[None, :], part, 0)
                return striped(part.astype(np.int8), width)

            self.fills.append(Fill(place, slices, words, build, "weights"))
            for i, part in enumerate(some):
                self._known[place, k, hemisphere, part] = (slices, words, i)
            first += count
        by_place: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
        for g, part in wanted:
            slices, words, i = self._known[place, k, hemisphere, part]
            by_place.setdefault((slices, words), []).append((g, i))
        base = LAYER_BASE if layered else 0
        return [
            Tile(slices, words, ranges([g for g, _ in pairs], [i for _, i in pairs]), False, base)
            for (slices, words), pairs in by_place.items()
        ]

    def side_of(self, place: int, k: int, outputs: Layout) -> int | None:
        """The hemisphere that stores the first columns of an output vector over input vector k
        already."""
        width = self.memory.chip.install_streams
        for g in range(len(outputs) // width):
            part = tuple(int(f) for f in outputs[g * width : (g + 1) * width])
            for side in (0, 1):
                if max(part) >= 0 and (place, k, side, part) in self._known:
                    return side
        return None


def ranges(groups: Sequence[int], stored: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(group of the plane, group in memory, how many) for runs in which both go up by one."""
    found: list[list[int]] = []
    for g, i in zip(groups, stored, strict=True):
        if found and found[-1][0] + found[-1][2] == g and found[-1][1] + found[-1][2] == i:
            found[-1][2] += 1
        else:
            found.append([g, i, 1])
    return tuple((g, i, n) for g, i, n in found)


def striped(vectors: Matrix, width: int) -> Bytes:
    """Vectors [groups * width, lanes] as [width slices, groups, lanes]."""
    shaped = vectors.reshape(-1, width, vectors.shape[1])
    return np.ascontiguousarray(shaped.transpose(1, 0, 2)).view(np.uint8)
