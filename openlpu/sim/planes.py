"""In: a Kit and a Shape. Out: generated code for MXM planes: blocks of weights, dot products.

The weights of a plane are a tile: either the byte vectors of its columns, where they lie, or its
blocks of rows, interleaved so that a lane finds four consecutive rows of its column in one int32.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from openlpu.host.emit import BLOCK, I16, I32, I64, LANES, PTR, VI, Kit, Value
from openlpu.sim.kernels import Record, chunks, copy, handler
from openlpu.sim.lanes import joined
from openlpu.sim.records import CHUNK, Code, Context, Shape

_ROWS = 4  # rows that an int32 of a block holds
_SUMS = {"avx512": 20}  # vectors of sums that the registers hold
_FEW_SUMS = 4


def define_planes(kit: Kit, shape: Shape) -> None:
    """NIBBLE, ROWS, CLONE, STAMP, ACT_COLUMNS, ACT_ROWS."""
    for code, body in (
        (Code.NIBBLE, _nibble),
        (Code.ROWS, _rows),
        (Code.CLONE, _clone),
        (Code.STAMP, _stamp),
        (Code.ACT_COLUMNS, _act_columns),
        (Code.ACT_ROWS, _act_rows),
    ):
        with handler(kit, shape, code) as each:
            each(body)


class _Mode:
    """isa.Mode, known when the code runs, on int32 that hold four bytes."""

    def __init__(self, kit: Kit, mode: Value) -> None:
        b = kit.b
        self.kit = kit
        mode = b.trunc(mode, I32)
        self.whole = b.icmp_signed("==", mode, kit.i32(0))
        high = b.icmp_signed("==", b.and_(mode, kit.i32(1)), kit.i32(0))
        signed = b.icmp_signed(">", mode, kit.i32(2))
        self.shift = kit.splat(b.select(high, kit.i32(4), kit.i32(0)))
        self.less = kit.splat(b.select(signed, kit.i32(0x08080808), kit.i32(0)))

    def apply(self, word: Value) -> Value:
        kit, b = self.kit, self.kit.b
        top = kit.vi(-0x7F7F7F80)  # 0x80 in each byte keeps the borrow of minus 8 inside it
        nibbles = b.and_(b.lshr(word, self.shift), kit.vi(0x0F0F0F0F))
        moved = b.xor(b.sub(b.or_(nibbles, top), self.less), top)
        return b.select(self.whole, word, moved)


def _nibble(r: Record) -> None:
    kit = r.kit
    target, source, mode = r.vector(0), r.vector(1), _Mode(kit, r.field(2))

    def chunk(offset: Value) -> None:
        word = kit.load(kit.at(source, offset), VI, align=1)
        kit.store(mode.apply(word), kit.at(target, offset), align=1)

    chunks(kit, r.shape.padded, chunk)


def _block(r: Record, index: int) -> Value:
    return r.part(Context.BLOCKS, r.field(index), r.shape.block_bytes)


def _rows(r: Record) -> None:
    kit, shape = r.kit, r.shape
    block, mode = _block(r, 0), _Mode(kit, r.field(1))
    for quad in range(shape.loads // _ROWS):
        sources = [r.vector(2 + _ROWS * quad + i) for i in range(_ROWS)]
        target = kit.at(block, quad * shape.word_bytes)

        def group(lane: Value, sources: list[Value] = sources, target: Value = target) -> None:
            word = joined(kit, [kit.at(source, lane) for source in sources])
            kit.store(mode.apply(word), kit.item(target, lane, I32))

        kit.each(kit.i64(0), kit.i64(shape.padded), group, step=LANES)


def _clone(r: Record) -> None:
    copy(r.kit, _block(r, 0), _block(r, 1), r.shape.block_bytes)


def _stamp(r: Record) -> None:
    kit, shape = r.kit, r.shape
    block, row, column = _block(r, 0), r.field(1), r.field(2)
    for j in range(shape.loads):
        source = kit.at(r.vector(3 + j), row)
        target = kit.item(block, kit.b.add(column, kit.i64(j)), I32)
        for quad in range(shape.loads // _ROWS):
            rows = kit.load(kit.at(source, quad * _ROWS), I32, align=1)
            kit.store(rows, kit.at(target, quad * shape.word_bytes))


def _dot(kit: Kit, sums: Value, weights: Value, x: Value) -> Value:
    """sums[i] += the products of bytes 4i .. 4i+3, all signed; see _excess."""
    b = kit.b
    if kit.target.vectors == "avx512":
        moved = b.xor(weights, ir.Constant(BLOCK, [-128] * CHUNK))
        return kit.intrinsic("llvm.x86.avx512.vpdpbusd.512", VI, [sums, moved, x])
    # Pairs of products do not fit 16 bits: (-128 * -128) * 2 = 2**15.
    wide, pairs = ir.VectorType(I16, CHUNK), ir.VectorType(I32, CHUNK // 2)
    w, v = b.sext(weights, wide), b.sext(x, wide)
    products = []
    for odd in range(2):
        half = range(odd, CHUNK, 2)
        products.append(b.mul(*(b.sext(kit.shuffle(s, half), pairs) for s in (w, v))))
    both = b.add(*products)
    even, odd_pairs = (kit.shuffle(both, range(i, CHUNK // 2, 2)) for i in range(2))
    return b.add(sums, b.add(even, odd_pairs))


def _excess(kit: Kit, x: Sequence[Value]) -> Value | None:
    """What _dot adds too much to every column, in all lanes: 128 * sum(x) where it takes weights as
    unsigned bytes, weight + 128. x: chunks of the activations, zero beyond the lanes."""
    if kit.target.vectors != "avx512":
        return None
    total = kit.vi(0)
    ones = ir.Constant(BLOCK, [1] * CHUNK)
    for chunk in x:
        total = kit.intrinsic("llvm.x86.avx512.vpdpbusd.512", VI, [total, ones, chunk])
    return kit.splat(kit.b.shl(kit.reduce_add(total), kit.i32(7)))


def _activations(r: Record) -> list[Value]:
    """The chunks of the vector that field 1 names; zero beyond the lanes."""
    kit, shape = r.kit, r.shape
    source = r.vector(1)
    x = [kit.load(kit.at(source, i), BLOCK) for i in range(0, shape.padded, CHUNK)]
    rest = shape.lanes % CHUNK
    if rest:
        inside = [-1] * rest + [0] * (CHUNK - rest)
        x[-1] = kit.b.and_(x[-1], ir.Constant(BLOCK, inside))
    return x


class _Accumulator:
    """Where the sums of an act go: slot = (add ? slot : 0) + sums."""

    def __init__(self, r: Record, excess: Value | None) -> None:
        kit = r.kit
        self.kit, self.excess = kit, excess
        self.at = r.part(Context.ACCUMULATORS, r.field(2), r.shape.word_bytes)
        keep = kit.b.icmp_signed("!=", r.field(3), kit.i64(0))
        self.keep = kit.splat(kit.b.select(keep, kit.i32(-1), kit.i32(0)))

    def take(self, column: Value, sums: Value) -> None:
        kit, b = self.kit, self.kit.b
        slot = kit.item(self.at, column, I32)
        if self.excess is not None:
            sums = b.sub(sums, self.excess)
        kit.store(b.add(b.and_(kit.load(slot, VI), self.keep), sums), slot)


def _tile(r: Record) -> Value:
    return r.kit.item(r.array(Context.TILES), r.field(0), I32)


def _act_columns(r: Record) -> None:
    """A dot product for each column; 16 columns' sums are then added up together."""
    kit, shape = r.kit, r.shape
    x = _activations(r)
    accumulator = _Accumulator(r, _excess(kit, x))
    tile, pointers = _tile(r), r.array(Context.POINTERS)

    def columns(first: Value) -> None:
        sums = []
        for j in range(LANES):
            entry = kit.item(tile, kit.b.add(first, kit.i64(j)), I32)
            slot = kit.b.sext(kit.load(entry, I32), I64)
            vector = kit.load(kit.item(pointers, slot, I64), PTR, align=8)
            total = kit.vi(0)
            for i, chunk in enumerate(x):
                total = _dot(kit, total, kit.load(kit.at(vector, i * CHUNK), BLOCK), chunk)
            sums.append(total)
        accumulator.take(first, _sums(kit, sums))

    kit.each(kit.i64(0), kit.i64(shape.lanes), columns, step=LANES)


def _pick(kit: Kit, a: Value, c: Value, lanes: Sequence[int]) -> Value:
    """Lanes 0 .. 15 of a, 16 .. 31 of c."""
    return kit.b.shuffle_vector(a, c, ir.Constant(VI, list(lanes)))


def _sums(kit: Kit, vectors: list[Value]) -> Value:
    """Lane i: the sum of the lanes of vectors[i]. Each round adds two halves of two vectors."""
    rounds = (
        # (where the first half lies, the second), within 16 lanes of a and then of c
        ([0, 16, 1, 17], [2, 18, 3, 19], 4),
        ([0, 1, 16, 17], [2, 3, 18, 19], 4),
    )
    for low, high, size in rounds:
        picks = [[p + size * q for q in range(LANES // size) for p in part] for part in (low, high)]
        vectors = [
            kit.b.add(*(_pick(kit, vectors[i], vectors[i + 1], pick) for pick in picks))
            for i in range(0, len(vectors), 2)
        ]
    quads = [list(range(4 * q, 4 * q + 4)) for q in range(8)]  # 0 .. 3 of a, 4 .. 7 of c
    for low_quads, high_quads in (((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))):
        picks = [[lane for q in part for lane in quads[q]] for part in (low_quads, high_quads)]
        vectors = [
            kit.b.add(*(_pick(kit, vectors[i], vectors[i + 1], pick) for pick in picks))
            for i in range(0, len(vectors), 2)
        ]
    return vectors[0]


def _act_rows(r: Record) -> None:
    """Four rows at a time, for as many columns as there are registers for."""
    kit, shape = r.kit, r.shape
    accumulator = _Accumulator(r, _excess(kit, _activations(r)))
    tile, source, blocks = _tile(r), r.vector(1), r.array(Context.BLOCKS)
    vectors = shape.padded // LANES
    most = _SUMS.get(kit.target.vectors, _FEW_SUMS)
    width = next(n for n in range(min(most, vectors), 0, -1) if vectors % n == 0)
    quads = shape.loads // _ROWS

    def columns(first: Value) -> None:
        def group(g: Value, sums: list[Value]) -> list[Value]:
            slot = kit.b.sext(kit.load(kit.item(tile, g, I32), I32), I64)
            block = kit.at(blocks, kit.b.mul(slot, kit.i64(shape.block_bytes)))
            x = kit.at(source, kit.b.mul(g, kit.i64(shape.loads)))
            for q in range(quads):
                spread = kit.bits(kit.splat(kit.load(kit.at(x, q * _ROWS), I32, align=1)), BLOCK)
                row = kit.item(kit.at(block, q * shape.word_bytes), first, I32)
                sums = [
                    _dot(kit, total, kit.load(kit.at(row, i * CHUNK), BLOCK), spread)
                    for i, total in enumerate(sums)
                ]
            return sums

        groups = kit.i64(shape.lanes // shape.loads)
        zeros = [kit.vi(0)] * width
        for i, total in enumerate(kit.loop(kit.i64(0), groups, 1, zeros, group)):
            accumulator.take(kit.b.add(first, kit.i64(i * LANES)), total)

    kit.each(kit.i64(0), kit.i64(shape.padded), columns, step=width * LANES)
