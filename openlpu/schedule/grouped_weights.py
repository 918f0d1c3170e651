"""In: layouts of a grouped linear's input and output. Out: where its weights and scales lie, their
bytes.

4-bit integers lie two in a byte: the low nibbles of a word are one group of vectors of a plane, the
high nibbles another, so a word is read once for each and unpacked by the plane's load. Scales and
minima stay halves: for each output vector and each group a vector of two bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.isa import Mode
from openlpu.schedule.layout import Layout
from openlpu.schedule.matrix import Tile
from openlpu.schedule.memory import QUAD, Buffer
from openlpu.schedule.section import LAYER_BASE
from openlpu.schedule.weights import Fill, WeightStore, ranges, striped

HALF = 2
_Part = tuple[int, ...]  # the features of one group of a plane's vectors
_SCALES_AT_ONCE = 16  # groups whose scales lie together: large pieces leave gaps in the memory
_NIBBLES = {"q4_0": (Mode.S4_LOW, Mode.S4_HIGH), "q4_1": (Mode.U4_LOW, Mode.U4_HIGH)}
_SIGNED_ZERO = 8  # the nibble that means 0 in q4_0


@dataclass(frozen=True, slots=True)
class Stored:
    """A group of vectors as it lies: word `index` from words on, read by `mode`."""

    slices: tuple[int, ...]
    words: tuple[int, ...]
    index: int
    mode: Mode


class GroupedStore:
    """Places tiles and scales in a WeightStore's memory."""

    def __init__(self, store: WeightStore) -> None:
        self.store = store
        self.chip = store.memory.chip
        # (place, input vector, output vector's features) -> its tiles and their plane
        self.tiles: dict[tuple[int, int, bytes], tuple[list[Tile], int]] = {}
        self._columns: dict[tuple[int, int, int, _Part], Stored] = {}
        self._scales: dict[tuple[int, str, bytes], list[Buffer]] = {}
        self._constants: dict[tuple[str, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._turn = 0

    def constant(
        self, name: str, side: int, data: NDArray[np.uint8]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Slices and words of data [slices, words, lanes] that a plane of `side` loads."""
        key = (name, side)
        if key not in self._constants:
            slices, words = self.store.allocate(side, data.shape[1], layered=False)
            for vectors, s, word in zip(data, slices, words, strict=True):
                self.store.memory.put(s, word, np.ascontiguousarray(vectors), "constants")
            self._constants[key] = slices, words
        return self._constants[key]

    # -- integers -------------------------------------------------------------------------------

    def by_rows(
        self, place: int, inputs: Layout, outputs: Layout, plane: int, form: str, *, layered: bool
    ) -> list[Tile]:
        """One input vector [lanes] times one output vector [lanes]; a word is a row."""
        width = self.chip.install_streams
        parts = [(g, part) for g, part in enumerate(_parts(inputs, width)) if max(part) >= 0]
        kept = self._keep(place, [part for _, part in parts], outputs, plane, form, True, layered)
        found = [(g, kept[part]) for g, part in parts]
        return _tiles(found, row=True, base=LAYER_BASE if layered else 0)

    def by_columns(
        self,
        place: int,
        k: int,
        inputs: Layout,
        outputs: Layout,
        plane: int,
        form: str,
        *,
        layered: bool,
    ) -> list[Tile]:
        """Input vector number k times one output vector; a word is a column. Columns that another
        layout stored already are used again."""
        side = plane // self.chip.planes_per_hemisphere
        parts = list(enumerate(_parts(outputs, self.chip.install_streams)))
        wanted = [(g, part) for g, part in parts if max(part) >= 0]
        fresh = [part for _, part in wanted if (place, k, side, part) not in self._columns]
        if fresh:
            fresh = list(dict.fromkeys(fresh))
            kept = self._keep(place, fresh, inputs, plane, form, False, layered)
            for part, stored in kept.items():
                self._columns[place, k, side, part] = stored
        found = [(g, self._columns[place, k, side, part]) for g, part in wanted]
        return _tiles(found, row=False, base=LAYER_BASE if layered else 0)

    def side_of(self, place: int, outputs: Layout) -> int | None:
        """The hemisphere that stores the first columns of an output vector already."""
        for part in _parts(outputs, self.chip.install_streams):
            for side in (0, 1):
                if max(part) >= 0 and (place, 0, side, part) in self._columns:
                    return side
        return None

    def _keep(
        self,
        place: int,
        parts: list[_Part],
        across: Layout,
        plane: int,
        form: str,
        rows: bool,
        layered: bool,
    ) -> dict[_Part, Stored]:
        """Reserve the vectors of `parts` (features of one side of the matrix) over the features
        `across` of its other side, in several places where no place has room for all."""
        count = -(-len(parts) // 2) if form in _NIBBLES else len(parts)
        side = plane // self.chip.planes_per_hemisphere
        if len(parts) > 1 and not self.store.has_room(side, count, layered=layered):
            middle = len(parts) // 2
            rest = (across, plane, form, rows, layered)
            return {
                **self._keep(place, parts[:middle], *rest),
                **self._keep(place, parts[middle:], *rest),
            }
        slices, words = self.store.allocate(side, count, layered=layered, plane=plane)
        along = np.array([feature for part in parts for feature in part])
        empty = _SIGNED_ZERO if form == "q4_0" else 0
        width = self.chip.install_streams

        def build(weight: object) -> NDArray[np.uint8]:
            assert isinstance(weight, np.ndarray)
            n, k = (across, along) if rows else (along, across)
            picked = weight[np.maximum(n, 0)][:, np.maximum(k, 0)].astype(np.int8) + np.int8(empty)
            picked = np.where((n >= 0)[:, None] & (k >= 0)[None, :], picked, empty)
            vectors = (picked.T if rows else picked).astype(np.int8)
            if form in _NIBBLES:
                low, high = vectors[: count * width], vectors[count * width :]
                vectors = low & 15
                vectors[: len(high)] |= high << 4
            return striped(vectors, width)

        self.store.fills.append(Fill(place, slices, words, build, "weights"))
        low, high = _NIBBLES.get(form, (Mode.I8, Mode.I8))
        return {
            part: Stored(slices, words, i % count, low if i < count else high)
            for i, part in enumerate(parts)
        }

    # -- scales ---------------------------------------------------------------------------------

    def scales(
        self, place: int, name: str, outputs: Layout, groups: int, *, layered: bool
    ) -> list[Buffer]:
        """Halves `name` (scale or minimum) of an output vector, a vector for each group."""
        key = (place, name, outputs.tobytes())
        if key not in self._scales:
            found: list[Buffer] = []
            for first in range(0, groups, _SCALES_AT_ONCE):
                count = min(_SCALES_AT_ONCE, groups - first)
                found += self._place_scales(place, name, outputs, first, count, layered)
            self._scales[key] = found
        return self._scales[key]

    def _place_scales(
        self, place: int, name: str, outputs: Layout, first: int, count: int, layered: bool
    ) -> list[Buffer]:
        memory, purpose = self.store.memory, self.store.purpose
        slices = self._pair(purpose, count * (memory.layers if layered else 1))
        take = memory.layered if layered else memory.fixed
        words = tuple(take(purpose, s, count) for s in slices)

        def build(tensors: object) -> NDArray[np.uint8]:
            assert isinstance(tensors, dict)
            part = tensors[name][:, first : first + count].astype("<f2")
            table = part[np.maximum(outputs, 0)].T
            table = np.ascontiguousarray(np.where(outputs >= 0, table, 0).astype("<f2"))
            planes = table.view(np.uint8).reshape(count, len(outputs), HALF)
            return np.ascontiguousarray(planes.transpose(2, 0, 1))

        self.store.fills.append(Fill(place, slices, words, build, "scales"))
        base = LAYER_BASE if layered else 0
        return [Buffer(slices, tuple(word + g for word in words), 1, 0, base) for g in range(count)]

    def _pair(self, purpose: str, words: int) -> tuple[int, int]:
        """Two slices for halves: by turns on each side, where no plane loads if there is room; else
        where another pair of the quad is fuller anyway, or at least the emptiest."""
        memory, half = self.store.memory, self.chip.slices_per_hemisphere
        self._turn += 1
        quiet = memory.quiet_quad

        def merit(s: int) -> tuple[bool, bool, bool, int, int]:
            room = [memory.room(purpose, s // QUAD * QUAD + b) for b in range(QUAD)]
            mine = min(room[s % QUAD : s % QUAD + HALF])
            apart = quiet is not None and s % half // QUAD == quiet and mine >= words
            own_side = apart and s // half == self._turn % 2
            return mine >= words, own_side, apart, min(0, mine - words - min(room)), mine

        best = max(range(0, self.chip.slices, HALF), key=merit)
        return best, best + 1


def _parts(layout: Layout, width: int) -> list[_Part]:
    """The features of each group of `width` lanes."""
    return [
        tuple(int(f) for f in layout[first : first + width])
        for first in range(0, len(layout), width)
    ]


def _tiles(found: list[tuple[int, Stored]], *, row: bool, base: int) -> list[Tile]:
    """Groups of a plane, joined where they lie beside each other and are read alike."""
    by_place: dict[tuple[tuple[int, ...], tuple[int, ...], Mode], list[tuple[int, int]]] = {}
    for g, at in found:
        by_place.setdefault((at.slices, at.words, at.mode), []).append((g, at.index))
    return [
        Tile(
            slices,
            words,
            ranges([g for g, _ in pairs], [i for _, i in pairs]),
            row,
            base,
            mode=int(mode),
        )
        for (slices, words, mode), pairs in by_place.items()
    ]
