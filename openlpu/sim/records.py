"""In: nothing. Out: what an event table of the fast simulator is made of: codes, fields, shapes.

A table is a sequence of int32: a header `code << 24 | count`, then `count` records of that code,
then the next header. A record is one event; its fields name values by the slots they lie in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from openlpu.chip import Chip
from openlpu.errors import ChipError
from openlpu.isa import ALU

HEADER_SHIFT = 24
CHUNK = 64  # bytes of the widest vector; rows are padded to a multiple of it
SUPERLANE = 16


class Code(IntEnum):
    """What an event does. ALU + i is the i-th operation of isa.ALU."""

    READ = 0  # a pointer to a word of memory, nothing is copied
    COPY = 1  # a word of memory that may change before its last use
    WRITE = 2
    GATHER = 3
    SCATTER = 4
    SETBASE = 5
    NIBBLE = 6  # a vector for the columns of a plane, through a Mode
    ROWS = 7  # vectors into a block of rows of a plane, four rows interleaved
    CLONE = 8  # a block's copy, to be stamped
    STAMP = 9  # columns into the rows of a block
    ACT_COLUMNS = 10
    ACT_ROWS = 11
    OUT = 12
    UNPACK1 = 13  # streams to 32-bit words
    UNPACK2 = 14
    UNPACK4 = 15
    SPLIT = 16  # 32-bit words to streams
    SHUFFLE = 17  # inside superlanes
    PERMUTE = 18
    SHIFT = 19
    TRANSPOSE = 20
    MOVE = 21  # a permutation where neighbours of a superlane stay neighbours
    ALU = 22


ALU_CODES = {name: Code.ALU + i for i, name in enumerate(ALU)}
CODES = Code.ALU + len(ALU_CODES)

# A letter per field. b w k: a byte vector, a word vector, a block of rows that is read; B W K: one
# that is made; t: tile; - a plain number. A byte vector 0 is all zeros, a negative one is nobody's;
# a negative word vector is a constant.
_ROLES = {
    Code.READ: "B--",  # row, base
    Code.COPY: "B--",
    Code.WRITE: "b--",
    Code.GATHER: "Bbb---",  # low, high byte of the map; row, base, limit
    Code.SCATTER: "bbb---",
    Code.SETBASE: "-b--",  # base, vector, lane, limit
    Code.NIBBLE: "Bb-",  # mode
    Code.CLONE: "Kk",
    Code.ACT_COLUMNS: "tb--",  # tile, vector, accumulator, add
    Code.ACT_ROWS: "tb--",
    Code.OUT: "W-",
    Code.UNPACK1: "Wb",
    Code.UNPACK2: "Wbb",
    Code.UNPACK4: "Wbbbb",
    Code.SPLIT: "wBBBB",
    Code.SHUFFLE: "Bb-",  # table
    Code.PERMUTE: "Bb-",
    Code.SHIFT: "Bb-",  # amount
    Code.MOVE: "Bb-",
    Code.TRANSPOSE: "B" * 16 + "b" * 16,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What generated code is specialized for."""

    lanes: int
    loads: int  # streams of a load

    @property
    def padded(self) -> int:
        """Bytes of a byte vector; those beyond `lanes` are undefined."""
        return -(-self.lanes // CHUNK) * CHUNK

    @property
    def word_bytes(self) -> int:
        """Bytes of a word vector, or of an accumulator."""
        return 4 * self.padded

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: `loads` rows of a plane, as [rows / 4][columns][4]."""
        return self.loads * self.padded

    def roles(self, code: int) -> str:
        """The letters of a record's fields."""
        if code >= Code.ALU:
            return "Wwww"
        if code == Code.ROWS:
            return "K-" + "b" * self.loads  # mode
        if code == Code.STAMP:
            return "k--" + "b" * self.loads  # first row, first column
        return _ROLES[Code(code)]


class Context(IntEnum):
    """Fields (int64) of what generated code is given: addresses of its arrays."""

    POINTERS = 0  # of byte vectors
    BASES = 1  # int32
    WORDS = 2
    CONSTANTS = 3  # a chunk each
    BLOCKS = 4
    ACCUMULATORS = 5
    TILES = 6  # int32: slots of byte vectors or blocks
    MEMORY = 7
    SHUFFLES = 8  # uint8 [tables][padded]: lane inside the superlane, 128 for zero
    PERMUTES = 9  # int16 [tables][lanes]: lane, -1 for zero
    WINDOW = 10  # three padded vectors of zeros, the middle one for shift to use
    SIZE = 11


def shape(chip: Chip) -> Shape:
    """The shape of a chip; ChipError where the fast simulator has no code for it."""
    if chip.superlane_lanes != SUPERLANE or chip.install_streams % 4:
        raise ChipError(
            f"the fast simulator needs superlanes of {SUPERLANE} lanes and a multiple of 4 install "
            f"streams, not {chip.superlane_lanes} and {chip.install_streams}; use the step one"
        )
    return Shape(chip.lanes, chip.install_streams)
