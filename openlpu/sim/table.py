"""In: the events of a section. Out: Table, in the order they happen, each value in a slot.

Slots are used again as soon as a value's last reader is done, so what is at work stays in the
cache. A word that is read from memory is not copied where no write can reach it in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.sim.events import I64
from openlpu.sim.records import HEADER_SHIFT, Code, Shape
from openlpu.sim.tiles import Planes
from openlpu.sim.values import AFTER, Batch, Made

_PHASES = 8
_CODES = 64
_MOST_WRITES = 64  # to a slice while a value is in use, for it to be looked at more closely
# Their only effect is the one byte vector they make.
_PURE = (
    Code.READ,
    Code.GATHER,
    Code.NIBBLE,
    Code.SHUFFLE,
    Code.PERMUTE,
    Code.MOVE,
    Code.SHIFT,
)


@dataclass(frozen=True, slots=True)
class Table:
    """What generated code walks, and how many slots it needs. A byte vector's slot is a pointer: 0
    to zeros, `pointers` that reads set, then one for each of `vectors` that are made."""

    code: NDArray[np.int32]
    tiles: NDArray[np.int32]
    pointers: int
    vectors: int
    words: int
    blocks: int


def assemble(
    chip: Chip, shape: Shape, made: Made, planes: Planes, ranges: tuple[I64, I64]
) -> Table:
    """ranges: lowest and highest value of each base."""
    return _Assembler(chip, shape, made, planes, ranges).table()


class _Lives:
    """When the values of one kind are made and last used, as positions in the order of events."""

    def __init__(self, count: int) -> None:
        self.first = np.full(count, -1, np.int64)
        self.last = np.full(count, -1, np.int64)

    def make(self, values: I64, position: I64) -> None:
        self.first[values] = position
        np.maximum.at(self.last, values, position)

    def use(self, values: I64, position: I64) -> None:
        np.maximum.at(self.last, values, position)

    def slots(self, which: NDArray[np.bool_], first: int) -> tuple[I64, int]:
        """A slot for each of these values, from `first` on (others 0); how many slots there are.

        Values of like length take turns in a ring just large enough for all that live at once.
        """
        slots = np.zeros(len(self.first), np.int64)
        values = np.flatnonzero(which & (self.first >= 0))
        values = values[np.argsort(self.first[values], kind="stable")]
        length = np.frexp((self.last - self.first)[values])[1]
        count = 0
        for kind in np.unique(length):
            these = values[length == kind]
            number = np.arange(len(these))
            after = np.searchsorted(self.first[these], self.last[these], "right")
            ring = int((after - number).max())
            slots[these] = first + count + number % ring
            count += ring
        return slots, count


class _Assembler:
    def __init__(
        self, chip: Chip, shape: Shape, made: Made, planes: Planes, ranges: tuple[I64, I64]
    ) -> None:
        self.chip, self.shape, self.made, self.ranges = chip, shape, made, ranges
        lanes, groups = chip.lanes, chip.lanes // chip.install_streams
        self.columns = np.array(planes.columns, np.int64).reshape(-1, lanes)
        self.rows = np.array(planes.rows, np.int64).reshape(-1, groups)

    def table(self) -> Table:
        self._drop_unused()
        self._order()
        self._live()
        self._borrow()
        byte, pointers, vectors = self._byte_slots()
        block, blocks = self.blocks.slots(np.ones(self.made.blocks_made, np.bool_), 1)
        word, words = self.words.slots(np.ones(len(self.words.first), np.bool_), 0)
        tiles = np.concatenate([byte[self.columns].ravel(), block[self.rows].ravel()])
        code = self._emit({"b": byte, "w": word, "k": block})
        return Table(code, tiles.astype(np.int32), pointers, vectors, words, blocks + 1)

    def _fields(self, batch: Batch, letters: str) -> Iterator[I64]:
        for i, letter in enumerate(self.shape.roles(batch.code)):
            if letter in letters:
                yield batch.fields[:, i]

    def _drop_unused(self) -> None:
        """Split words where their bytes are wanted; leave out what nobody reads."""
        used = np.zeros(self.made.bytes_made, np.bool_)
        for batch in self.made.batches:
            for values in self._fields(batch, "b"):
                used[values] = True
            if batch.code == Code.ACT_COLUMNS:
                used[self.columns[np.unique(batch.fields[:, 0])]] = True
        if self.made.word_cycle:
            cycle = np.concatenate(self.made.word_cycle)
            first = np.concatenate(self.made.word_bytes)
            of_word = first[:, None] + np.arange(4)
            wanted = used[of_word] & (first > 0)[:, None]
            split = wanted.any(axis=1)
            values = np.where(wanted, of_word, -1)[split]
            self.made.emit(Code.SPLIT, AFTER, cycle[split], np.flatnonzero(split), values)
        kept = []
        for batch in self.made.batches:
            keep = used[batch.fields[:, 0]] if batch.code in _PURE else np.ones(1, np.bool_)
            if keep.all():
                kept.append(batch)
            elif keep.any():
                kept.append(Batch(batch.code, batch.phase, batch.cycle[keep], batch.fields[keep]))
        self.batches = kept

    def _order(self) -> None:
        """positions: of each batch's events in the order in which they happen."""
        none = np.zeros(0, np.int64)
        keys = [(b.cycle * _PHASES + b.phase) * _CODES + b.code for b in self.batches]
        key = np.concatenate([none, *keys])
        order = np.argsort(key, kind="stable")
        self.cycles = key[order] // (_PHASES * _CODES)
        position = np.empty(len(order), np.int64)
        position[order] = np.arange(len(order))
        ends = np.cumsum([len(b.cycle) for b in self.batches])
        self.positions = np.split(position, ends[:-1]) if self.batches else []

    def _live(self) -> None:
        self.bytes = _Lives(self.made.bytes_made)
        self.words = _Lives(max(1, self.made.words_made))  # number 0 is looked up in any case
        self.blocks = _Lives(self.made.blocks_made)
        last = {
            Code.ACT_COLUMNS: np.full(len(self.columns), -1, np.int64),
            Code.ACT_ROWS: np.full(len(self.rows), -1, np.int64),
        }
        kinds = (("b", self.bytes), ("w", self.words), ("k", self.blocks))
        for batch, position in zip(self.batches, self.positions, strict=True):
            for letter, lives in kinds:
                for values in self._fields(batch, letter.upper()):
                    lives.make(values[values >= 0], position[values >= 0])
                for values in self._fields(batch, letter):
                    lives.use(values[values >= 0], position[values >= 0])
            if batch.code in (Code.ACT_COLUMNS, Code.ACT_ROWS):
                np.maximum.at(last[Code(batch.code)], batch.fields[:, 0], position)
        for code, members, lives in (
            (Code.ACT_COLUMNS, self.columns, self.bytes),
            (Code.ACT_ROWS, self.rows, self.blocks),
        ):
            if len(members):
                lives.use(members.ravel(), np.repeat(last[code], members.shape[1]))

    def _borrow(self) -> None:
        """borrowed: of each byte vector, whether it stays in memory, where a read finds it."""
        self.borrowed = np.zeros(self.made.bytes_made, np.bool_)
        writes = self._writes()
        for i, batch in list(enumerate(self.batches)):
            if batch.code != Code.READ:
                continue
            value, row, base = batch.fields.T
            until = self.cycles[self.bytes.last[value]]
            safe = ~writes.reach(row, base, batch.cycle, until)
            self.borrowed[value[safe]] = True
            if not safe.all():
                self._copied(i, ~safe)

    def _copied(self, index: int, which: NDArray[np.bool_]) -> None:
        """Some of a batch's reads become copies."""
        batch, position = self.batches[index], self.positions[index]
        for code, these in ((Code.READ, ~which), (Code.COPY, which)):
            part = Batch(code, batch.phase, batch.cycle[these], batch.fields[these])
            self.batches.append(part)
            self.positions.append(position[these])
        nothing = np.zeros(0, np.int64)
        self.batches[index] = Batch(batch.code, batch.phase, nothing, batch.fields[:0])
        self.positions[index] = nothing

    def _writes(self) -> _Writes:
        none = np.zeros((0, 4), np.int64)
        parts = [none]
        for batch in self.batches:
            if batch.code == Code.WRITE:
                reach = np.zeros(len(batch.cycle), np.int64)
                parts.append(np.stack([batch.cycle, *batch.fields[:, 1:3].T, reach], axis=1))
            elif batch.code == Code.SCATTER:
                parts.append(np.stack([batch.cycle, *batch.fields[:, 3:6].T], axis=1))
        return _Writes(np.concatenate(parts), self.chip.words, self.ranges)

    def _byte_slots(self) -> tuple[I64, int, int]:
        borrowed, pointers = self.bytes.slots(self.borrowed, 1)
        copied, vectors = self.bytes.slots(~self.borrowed, 1 + pointers)
        return np.where(self.borrowed, borrowed, copied), pointers, vectors

    def _emit(self, slots: dict[str, I64]) -> NDArray[np.int32]:
        """The records in order, a header before each run of equal codes."""
        total = len(self.cycles)
        code = np.zeros(total, np.int64)
        for batch, position in zip(self.batches, self.positions, strict=True):
            code[position] = batch.code
        if not total:
            return np.zeros(0, np.int32)
        begins = np.flatnonzero(np.diff(code, prepend=-1))
        longest = (1 << HEADER_SHIFT) - 1
        assert total <= longest, "a section has more events than a header counts"
        sizes = np.array([len(self.shape.roles(c)) for c in range(int(code.max()) + 1)])
        headers = np.zeros(total, np.int64)
        headers[begins] = 1
        length = sizes[code] + headers
        offset = np.cumsum(length) - length
        table = np.zeros(int(length.sum()), np.int32)
        counts = np.diff(np.append(begins, total))
        table[offset[begins]] = (code[begins] << HEADER_SHIFT | counts).astype(np.int32)
        offset += headers
        for batch, position in zip(self.batches, self.positions, strict=True):
            for i, letter in enumerate(self.shape.roles(batch.code)):
                values = batch.fields[:, i]
                if letter == "t":
                    values = self._tile_offset(batch.code, values)
                elif letter != "-" and len(values):
                    known = slots[letter.lower()][np.maximum(values, 0)]
                    values = np.where(values < 0, values, known)
                table[offset[position] + i] = values
        return table

    def _tile_offset(self, code: int, tile: I64) -> I64:
        if code == Code.ACT_COLUMNS:
            return tile * self.columns.shape[1]
        return self.columns.size + tile * self.rows.shape[1]


class _Writes:
    """What is written to memory: [cycle, word, base, reach]; word counts through all slices."""

    def __init__(self, writes: I64, words: int, ranges: tuple[I64, I64]) -> None:
        self._words = words
        self._low, self._high = np.maximum(ranges[0], 0), np.maximum(ranges[1], 0)
        self._span = 1 + int(writes[:, 0].max(initial=0))
        key = writes[:, 1] // words * self._span + writes[:, 0]
        order = np.argsort(key)
        self._keys, self._writes = key[order], writes[order]

    def reach(self, row: I64, base: I64, since: I64, until: I64) -> NDArray[np.bool_]:
        """Whether a write may change the word that is read at `since` before `until` is over."""
        at = row // self._words * self._span
        last = self._span - 1
        first = np.searchsorted(self._keys, at + np.minimum(since, last), "right")
        end = np.searchsorted(self._keys, at + np.minimum(until, last), "right")
        reached: NDArray[np.bool_] = end - first > _MOST_WRITES
        open_ = np.flatnonzero(~reached & (end > first))
        low, high = row + self._low[base], row + self._high[base]
        for i in range(int((end - first)[open_].max(initial=0))):
            open_ = open_[(first[open_] + i < end[open_]) & ~reached[open_]]
            _, word, other, width = self._writes[first[open_] + i].T
            moved = row[open_]
            same = (word <= moved) & (moved <= word + width)
            meets = (word + self._low[other] <= high[open_]) & (
                low[open_] <= word + self._high[other] + width
            )
            reached[open_] = np.where(other == base[open_], same, meets)
        return reached
