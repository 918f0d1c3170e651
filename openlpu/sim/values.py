"""In: events of a section, one kind after the other. Out: Made, all of them, and what they make.

Values are made once and named by numbers: byte vectors, word vectors, blocks of a plane's rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from openlpu.sim.events import I64

FIRST, READS, OPERANDS, WORK, AFTER, LAST = range(6)  # phases of a cycle


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one code: when, and the fields of their records with values by number [n, k]."""

    code: int
    phase: int
    cycle: I64
    fields: I64


@dataclass(slots=True)
class Made:
    """Events of a section and how many values they make. words: made in which cycle, and the number
    of the first of the four byte vectors that hold the word's bytes (0: none)."""

    batches: list[Batch] = field(default_factory=list)
    bytes_made: int = 1  # 0 is all zeros
    blocks_made: int = 1  # 0 too
    word_cycle: list[I64] = field(default_factory=list)
    word_bytes: list[I64] = field(default_factory=list)
    words_made: int = 0
    hops: int = 0

    def emit(self, code: int, phase: int, cycle: I64, *columns: I64 | int) -> None:
        """Add events; a column is an array [n] or [n, several], or the same number for all."""
        parts = [
            np.broadcast_to(np.asarray(c, np.int64).reshape(-1, 1), (len(cycle), 1))
            if np.ndim(c) < 2
            else np.asarray(c, np.int64)
            for c in columns
        ]
        if len(cycle):
            self.batches.append(Batch(code, phase, cycle, np.concatenate(parts, axis=1)))

    def new_bytes(self, count: int) -> I64:
        """Numbers for so many byte vectors."""
        first, self.bytes_made = self.bytes_made, self.bytes_made + count
        return np.arange(first, first + count)

    def new_blocks(self, count: int) -> I64:
        """Numbers for so many blocks."""
        first, self.blocks_made = self.blocks_made, self.blocks_made + count
        return np.arange(first, first + count)

    def new_words(self, cycle: I64, *, split: bool) -> tuple[I64, I64]:
        """Numbers for a word vector in each of these cycles, and for the first byte of each."""
        count = len(cycle)
        words = np.arange(self.words_made, self.words_made + count)
        self.words_made += count
        first = self.new_bytes(4 * count)[::4] if split else np.zeros(count, np.int64)
        self.word_cycle.append(cycle)
        self.word_bytes.append(first)
        return words, first
