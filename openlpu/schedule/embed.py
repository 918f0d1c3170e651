"""In: a table and token ids as addresses. Out: tasks that bring a token's row to the stream.

The table lies in as many slices as it needs, whole rows in each. Every one of them reads at a base
of its own; all but one are off and give zeros, so the row is the OR of what they read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import EAST, WEST, Chip
from openlpu.errors import DoesNotFit
from openlpu.graph import Op
from openlpu.schedule import layout as layouts
from openlpu.schedule.constants import WORD
from openlpu.schedule.deliver import Send, Visit, deliver
from openlpu.schedule.expression import Expression, Leaf, Node, Operand
from openlpu.schedule.lower import Lowering
from openlpu.schedule.memory import QUAD, Buffer, Memory
from openlpu.schedule.ports import Ports
from openlpu.schedule.weights import Fill, WeightStore

_BASES = (7, 9)  # base registers of the table, per bank
SCALE_BASES = (10, 11)  # and of its scales

_KEPT_WORDS = 1024


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """rows_per_slice tokens lie in each of `slices`, `vectors` words a token from words[i] on. A
    word of a scales buffer holds those of scale_tokens tokens; each buffer has scale_words of them
    (and, for scales of groups, as many again for each further vector)."""

    slices: tuple[int, ...]
    words: tuple[int, ...]
    rows_per_slice: int
    vectors: int
    scales: tuple[Buffer, ...]
    scale_tokens: int
    scale_words: int
    vocabulary: int


def place_rows(
    memory: Memory, vocabulary: int, vectors: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Reserve `vectors` words for each token, slices of both hemispheres by turns, inner ones
    first: slices, first words, tokens a slice."""
    chip = memory.chip
    half = chip.slices_per_hemisphere
    quiet = (
        range(half, half) if memory.quiet_quad is None else range(memory.quiet_quad * QUAD, half)
    )
    order = [
        (side * half + i, bank)
        for bank in range(chip.banks)
        for i in range(half)
        for side in (0, 1)
    ]
    order = [(s, bank) for s, bank in order if memory.bank_room("table", s, bank)]
    order.sort(key=lambda place: place[0] % half not in quiet)  # what no load needs comes first
    # Some room stays for constants, which the VXM reads while planes load.
    shared = memory.region("table") == memory.region("weights")
    kept = min(_KEPT_WORDS, chip.words_per_bank // 4)
    kept = kept if shared and memory.quiet_quad is not None else 0
    most = chip.words_per_bank - kept  # what was placed before is among what is kept
    rooms = {place: min(memory.bank_room("table", *place), most) // vectors for place in order}
    sizes = sorted(set(rooms.values()) - {0}, reverse=True)
    if not shared:  # evenly, so that each plane finds quads of its own for a tied head's tiles
        sizes.insert(0, -(-vocabulary // chip.slices))
    per, count = 0, 0
    for per in sizes:  # all slices keep as many tokens
        fitting = [place for place in order if rooms[place] >= per]
        count = -(-vocabulary // per)
        if count <= len(fitting):
            order = fitting[:count]
            break
    else:
        raise DoesNotFit(
            f"the embedding table in region {memory.region('table').name} of {chip.name}",
            vocabulary * vectors * chip.lanes,
            sum(rooms.values()) * vectors * chip.lanes,
            "bytes",
            ("--table-region", "--precision w4", "a larger chip"),
        )
    slices = tuple(s for s, _ in order)
    words = tuple(
        memory.fixed("table", s, min(per, vocabulary - i * per) * vectors, bank=bank)
        for i, (s, bank) in enumerate(order)
    )
    return slices, words, per


def place_table(op: Op, place: int, memory: Memory, store: WeightStore) -> EmbeddingTable:
    """Reserve the table's memory, slices of both hemispheres by turns, inner ones first."""
    chip = memory.chip
    vocabulary, width = op.params[0].shape
    layout = layouts.dense(width, chip)
    vectors = len(layout)
    slices, words, per = place_rows(memory, vocabulary, vectors)
    for i, (s, word) in enumerate(zip(slices, words, strict=True)):
        first = i * per
        tokens = min(per, vocabulary - first)

        def build(tensors: object, first: int = first, tokens: int = tokens) -> NDArray[np.uint8]:
            assert isinstance(tensors, dict)
            part = tensors["weight"][first : first + tokens][:, np.maximum(layout.reshape(-1), 0)]
            part = np.where(layout.reshape(-1) >= 0, part, 0).astype(np.int8)
            return np.ascontiguousarray(
                part.reshape(1, tokens * vectors, chip.lanes).view(np.uint8)
            )

        store.fills.append(Fill(place, (s,), (word,), build, "table"))
    scale_words = -(-vocabulary // chip.lanes)
    quad = memory.emptiest("table", EAST, 1)[0]
    quad_slices = tuple(range(quad, quad + WORD))
    at = memory.aligned("table", quad_slices, scale_words)

    def build_scales(tensors: object) -> NDArray[np.uint8]:
        assert isinstance(tensors, dict)
        padded = np.zeros(scale_words * chip.lanes, "<f4")
        padded[:vocabulary] = tensors["scale"]
        planes = padded.view(np.uint8).reshape(scale_words, chip.lanes, 4)
        return np.ascontiguousarray(planes.transpose(2, 0, 1))

    store.fills.append(Fill(place, quad_slices, (at,) * WORD, build_scales, "table"))
    scales = Buffer(quad_slices, (at,) * WORD, 1, 0, SCALE_BASES[at // chip.words_per_bank])
    return EmbeddingTable(
        slices, words, per, vectors, (scales,), chip.lanes, scale_words, vocabulary
    )


def embed(
    low: Lowering,
    op: Op,
    table: EmbeddingTable,
    ports: Ports,
    into: list[Buffer],
    top: tuple[Buffer, Buffer],
) -> None:
    """Rows of the table into the stream's buffers, one row after the other."""
    address, lane = ports.embedding(address_vectors(table, low.chip))
    low.b.tag(f"{op.out} embed")
    rows = low.rows
    for row in range(rows):
        ready = set_bases(low, table, [one_row(a, row) for a in address])
        e = Expression()
        vectors = [stored_word(e, low, table, v, ready) for v in range(table.vectors)]
        mine = e.op("and", Leaf(replace(table.scales[0], ready=ready)), Leaf(one_row(lane, row)))
        pair = [low.memory.scratch(WORD, 1, hemisphere=side, outer=True) for side in (WEST, EAST)]
        e.write(mine, *pair)
        held = [low.memory.scratch(WORD, 1, hemisphere=None, outer=False) for _ in vectors]
        for value, buffer in zip(vectors, held, strict=True):
            e.write(e.op("itof", value), buffer)
        written = low.b.evaluate(e, 1)
        low.rows = 1
        scale = low.over_lanes(written[pair[0]], written[pair[1]], "max")
        low.rows = rows
        e = Expression()
        largest: Operand | None = None
        for buffer, out in zip(held, into, strict=True):
            value = e.op("fmul", Leaf(written[buffer]), Leaf(scale))
            e.write(value, one_row(out, row))
            size = e.op("and", value, 0x7FFFFFFF)
            largest = size if largest is None else e.op("max", largest, size)
        assert largest is not None
        e.write(largest, *(one_row(side, row) for side in top))
        low.b.evaluate(e, 1)


def stored_word(e: Expression, low: Lowering, table: EmbeddingTable, v: int, ready: int) -> Node:
    """Word v of a token's row: what the slice that has it reads, the others being off."""
    bank = low.chip.words_per_bank
    total: Operand | None = None
    for s, word in zip(table.slices, table.words, strict=True):
        leaf = Leaf(Buffer((s,), (word + v,), 1, 0, _BASES[word // bank], ready))
        total = leaf if total is None else e.op("or", total, leaf)
    assert total is not None
    return total if isinstance(total, Node) else e.op("mov", total)


def one_row(buffer: Buffer, row: int) -> Buffer:
    """One row of a lasting buffer."""
    words = tuple(word + row * buffer.step for word in buffer.words)
    return replace(buffer, words=words, count=1, step=0)


def address_vectors(table: EmbeddingTable, chip: Chip) -> int:
    """Vectors that hold the int16 bases of all slices."""
    entries = len(table.slices) + sum(buffer.width for buffer in table.scales)
    return -(-entries // (chip.lanes // 2))


def set_bases(low: Lowering, table: EmbeddingTable, address: list[Buffer]) -> int:
    """Load the base of every slice of the table, when all earlier reads are over; the cycle from
    which the bases hold."""
    chip = low.chip
    per, bank_words = chip.lanes // 2, chip.words_per_bank
    earliest, done = low.b.end, 0
    limit = table.rows_per_slice * table.vectors
    # (slice, registers, the last word that the base is added to, the largest base)
    entries = [
        (s, _BASES, word + table.vectors - 1, limit)
        for s, word in zip(table.slices, table.words, strict=True)
    ]
    entries += [
        (s, SCALE_BASES, word + (buffer.count - 1) * buffer.step, table.scale_words)
        for buffer in table.scales
        for s, word in zip(buffer.slices, buffer.words, strict=True)
    ]
    for side in (0, 1):
        for number, buffer in enumerate(address):
            visits: dict[int, list[Visit]] = {}
            for i, (s, registers, last, most) in enumerate(entries):
                if i // per == number and int(s >= chip.slices_per_hemisphere) == side:
                    bank, inside = divmod(last, bank_words)
                    top = min(most, bank_words - 1 - inside)
                    register = registers[bank]
                    visit = Visit(s, "setbase", base=register, lane=i % per * 2, limit=top)
                    visits.setdefault(register, []).append(visit)
            for part in visits.values():
                begin = deliver(low.b, [Send(0, buffer, part)], 1, 1, earliest=earliest)
                done = max(done, begin + chip.positions + chip.latency.base_load)
    return done
