"""In: a table in blocks of 32 and token ids as addresses. Out: tasks that bring a token's row to
the stream.

Rows lie as in embed, 4-bit ones with two vectors in a word. The scales of 16 tokens share a word of
halves, one in each lane of a superlane: that of the group to which the superlane's features belong.
A mask chooses the token's lanes, and an OR over each superlane brings its scale to every lane.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import EAST, WEST
from openlpu.errors import DoesNotFit
from openlpu.graph import Op
from openlpu.numerics import GROUP, SUPERLANE
from openlpu.schedule import layout as layouts
from openlpu.schedule.constants import WORD
from openlpu.schedule.embed import (
    SCALE_BASES,
    EmbeddingTable,
    address_vectors,
    one_row,
    place_rows,
    set_bases,
    stored_word,
)
from openlpu.schedule.expression import Expression, Leaf, Node, Operand
from openlpu.schedule.grouped_weights import HALF
from openlpu.schedule.lower import Lowering
from openlpu.schedule.memory import Buffer, Memory
from openlpu.schedule.ports import Ports
from openlpu.schedule.reduce import reduce_lanes
from openlpu.schedule.weights import Fill, WeightStore

_ABS = 0x7FFFFFFF


def place_grouped_table(op: Op, place: int, memory: Memory, store: WeightStore) -> EmbeddingTable:
    """Reserve the table's memory."""
    chip = memory.chip
    param = op.params[0]
    vocabulary, width = param.shape
    flat = layouts.dense(width, chip).reshape(-1)
    vectors = len(flat) // chip.lanes
    packed = param.format != "q8_0"
    kept = -(-vectors // 2) if packed else vectors
    empty = 8 if param.format == "q4_0" else 0
    slices, words, per = place_rows(memory, vocabulary, kept)
    for i, (s, word) in enumerate(zip(slices, words, strict=True)):
        tokens = min(per, vocabulary - i * per)

        def build(tensors: object, first: int = i * per, tokens: int = tokens) -> NDArray[np.uint8]:
            assert isinstance(tensors, dict)
            q = tensors["weight"][first : first + tokens][:, np.maximum(flat, 0)]
            q = np.where(flat >= 0, q, 0).astype(np.int8).reshape(tokens, vectors, chip.lanes)
            if packed:
                q = (q + np.int8(empty)) & 15
                high = q[:, kept:]
                q = q[:, :kept].copy()
                q[:, : high.shape[1]] |= high << 4
            return np.ascontiguousarray(q.reshape(1, tokens * kept, chip.lanes)).view(np.uint8)

        store.fills.append(Fill(place, (s,), (word,), build, "table"))
    names = ("scale", "minimum") if param.format == "q4_1" else ("scale",)
    scales, per_buffer = _place_scales(place, names, vocabulary, flat, memory, store)
    return EmbeddingTable(slices, words, per, kept, scales, SUPERLANE, per_buffer, vocabulary)


def _place_scales(
    place: int,
    names: Sequence[str],
    vocabulary: int,
    flat: NDArray[np.int32],
    memory: Memory,
    store: WeightStore,
) -> tuple[tuple[Buffer, ...], int]:
    """Buffers of two slices, and the words of each that stand for tokens; behind them as many for
    each further vector, then those of the minima."""
    chip = memory.chip
    vectors = len(flat) // chip.lanes
    stacked = vectors * len(names)
    needed = -(-vocabulary // SUPERLANE)
    places = [
        (min(memory.bank_room("table", s, bank) for s in (s, s + 1)), -s, bank)
        for s in range(0, chip.slices, HALF)
        for bank in range(chip.banks)
    ]
    places.sort(reverse=True)
    per = min(needed, places[0][0] // stacked)
    count = -(-needed // per) if per else len(places) + 1
    if count > len(places) or places[count - 1][0] < per * stacked:
        raise DoesNotFit(
            f"the scales of the embedding table in region {memory.region('table').name}",
            needed * stacked * HALF * chip.lanes,
            sum(HALF * room for room, _, _ in places) * chip.lanes,
            "bytes",
            ("--table-region", "a larger chip"),
        )
    features = flat.reshape(vectors, chip.lanes)
    groups = np.where(features >= 0, features // GROUP, -1)[:, None, :]  # [vectors, 1, lanes]
    lane = np.arange(chip.lanes) % SUPERLANE
    found = []
    for i, (_, s, bank) in enumerate(places[:count]):
        slices = (-s, 1 - s)
        words = tuple(memory.fixed("table", s, per * stacked, bank=bank) for s in slices)
        tokens = (i * per + np.arange(per))[:, None] * SUPERLANE + lane  # [per, lanes]

        def build(tensors: object, tokens: NDArray[np.int64] = tokens) -> NDArray[np.uint8]:
            assert isinstance(tensors, dict)
            used = (tokens < vocabulary) & (groups >= 0)  # [vectors, per, lanes]
            at = np.minimum(tokens, vocabulary - 1), np.maximum(groups, 0)
            halves = np.stack([np.where(used, tensors[name][at], 0) for name in names])
            planes = halves.astype("<f2").reshape(-1, chip.lanes).view(np.uint8)
            return np.ascontiguousarray(planes.reshape(-1, chip.lanes, HALF).transpose(2, 0, 1))

        store.fills.append(Fill(place, slices, words, build, "table"))
        base = SCALE_BASES[words[0] // chip.words_per_bank]
        found.append(Buffer(slices, words, stacked, per, base))
    return tuple(found), per


def embed_grouped(
    low: Lowering,
    op: Op,
    table: EmbeddingTable,
    ports: Ports,
    into: list[Buffer],
    top: tuple[Buffer, Buffer],
) -> None:
    """Rows of the table into the stream's buffers, one row after the other."""
    form = op.params[0].format
    address, lanes = ports.embedding(address_vectors(table, low.chip))
    low.b.tag(f"{op.out} embed")
    n = len(into)
    scales = 2 * n if form == "q4_1" else n
    for row in range(low.rows):
        ready = set_bases(low, table, [one_row(a, row) for a in address])
        e = Expression()
        stored = [stored_word(e, low, table, v, ready) for v in range(table.vectors)]
        held = [low.memory.scratch(WORD, 1, hemisphere=None, outer=False) for _ in into]
        for v, buffer in enumerate(held):
            e.write(e.op("itof", _integers(e, stored, v, form)), buffer)
        pairs = []
        for i in range(scales):
            pair = [
                low.memory.scratch(WORD, 1, hemisphere=side, outer=True) for side in (WEST, EAST)
            ]
            half = _stored_half(e, table, i, ready)
            e.write(e.op("and", half, Leaf(one_row(lanes, row))), *pair)
            pairs.append(pair)
        written = low.b.evaluate(e, 1)
        spread: list[Buffer] = []
        for west, east in pairs:
            out = low.memory.scratch(WORD, 1, hemisphere=None, outer=False)
            both = written[west], written[east]
            spread += reduce_lanes(low.b, *both, "or", SUPERLANE, 1, (out,))
        e = Expression()
        largest: Operand | None = None
        for v, (buffer, out) in enumerate(zip(held, into, strict=True)):
            value = e.op("fmul", Leaf(written[buffer]), e.op("htof", Leaf(spread[v])))
            if form == "q4_1":
                value = e.op("fadd", value, e.op("htof", Leaf(spread[n + v])))
            e.write(value, one_row(out, row))
            size = e.op("and", value, _ABS)
            largest = size if largest is None else e.op("max", largest, size)
        assert largest is not None
        e.write(largest, *(one_row(side, row) for side in top))
        low.b.evaluate(e, 1)


def _integers(e: Expression, stored: list[Node], v: int, form: str) -> Node:
    """Vector v of a row as integers."""
    if form == "q8_0":
        return stored[v]
    word = stored[v % len(stored)]
    nibble = e.op("and", word if v < len(stored) else e.op("shr", word, 4), 15)
    return nibble if form == "q4_1" else e.op("sub", nibble, 8)


def _stored_half(e: Expression, table: EmbeddingTable, i: int, ready: int) -> Node:
    """Word i of a token's scales and minima: of the buffer that has it, the others being off."""
    total: Operand | None = None
    for buffer in table.scales:
        words = tuple(word + i * buffer.step for word in buffer.words)
        leaf = Leaf(Buffer(buffer.slices, words, 1, 0, buffer.base, ready))
        total = leaf if total is None else e.op("or", total, leaf)
    assert total is not None
    return total if isinstance(total, Node) else e.op("mov", total)
