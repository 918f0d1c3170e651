"""In: a Kit and a Shape. Out: generated code for the events of memory, streams and the SXM.

A handler runs `count` records of one code and returns where the next header stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from openlpu.host.emit import BLOCK, I8, I16, I32, I64, LANES, PTR, VB, Kit, Value
from openlpu.sim.records import CHUNK, SUPERLANE, Code, Context, Shape

HANDLER = ir.FunctionType(PTR, [PTR, I64, PTR])  # first record, count, context
_UNROLLED = 8  # chunks of a row that are written out, not looped over


@dataclass(frozen=True, slots=True)
class Record:
    """The record that a handler works on, and the context around it."""

    kit: Kit
    shape: Shape
    at: Value
    context: Value

    def field(self, index: int) -> Value:
        """A field as it stands, sign-extended to 64 bits."""
        kit = self.kit
        return kit.b.sext(kit.load(kit.item(self.at, index, I32), I32), I64)

    def array(self, which: Context) -> Value:
        return self.kit.pointer(self.context, which)

    def vector(self, index: int) -> Value:
        """Address of the byte vector that a field names."""
        slot = self.kit.item(self.array(Context.POINTERS), self.field(index), I64)
        return self.kit.load(slot, PTR, align=8)

    def word(self, index: int) -> Value:
        """Address of the word vector that a field names; not of a constant."""
        return self.part(Context.WORDS, self.field(index), self.shape.word_bytes)

    def part(self, which: Context, index: Value, size_bytes: int) -> Value:
        """Element `index` of an array of parts of so many bytes."""
        kit = self.kit
        return kit.at(self.array(which), kit.b.mul(index, kit.i64(size_bytes)))

    def base(self, index: int) -> tuple[Value, Value]:
        """A base's value, and whether it turns the access off."""
        b = self.kit.b
        entry = self.kit.item(self.array(Context.BASES), self.field(index), I32)
        value = b.sext(self.kit.load(entry, I32), I64)
        return value, b.icmp_signed("<", value, self.kit.i64(0))

    def row(self, index: int, base: Value) -> Value:
        """Address of the word of memory that a field names, moved by `base`."""
        at = self.kit.b.add(self.field(index), base)
        return self.part(Context.MEMORY, at, self.shape.lanes)

    def zeros(self) -> Value:
        """Byte vector 0."""
        return self.kit.load(self.array(Context.POINTERS), PTR, align=8)


@contextmanager
def handler(kit: Kit, shape: Shape, code: int) -> Iterator[Callable[[Callable[..., None]], None]]:
    """Define the handler of a code; the block calls what it is given with the body of a record."""
    size_bytes = 4 * len(shape.roles(code))
    with kit.function(f"event{int(code)}", HANDLER, internal=True) as (first, count, context):

        def each(body: Callable[[Record], None]) -> None:
            def one(i: Value) -> None:
                at = kit.at(first, kit.b.mul(i, kit.i64(size_bytes)))
                body(Record(kit, shape, at, context))

            kit.each(kit.i64(0), count, one)

        yield each
        kit.b.ret(kit.at(first, kit.b.mul(count, kit.i64(size_bytes))))


def chunks(kit: Kit, size_bytes: int, body: Callable[[Value], None]) -> None:
    """body(offset) for every whole chunk of so many bytes."""
    count = size_bytes // CHUNK
    if count <= _UNROLLED:
        for i in range(count):
            body(kit.i64(i * CHUNK))
    else:
        kit.each(kit.i64(0), kit.i64(count * CHUNK), body, step=CHUNK)


def copy(kit: Kit, target: Value, source: Value, size_bytes: int) -> None:
    """Copy a multiple of 16 bytes."""

    def chunk(offset: Value) -> None:
        kit.store(kit.load(kit.at(source, offset), BLOCK), kit.at(target, offset))

    chunks(kit, size_bytes, chunk)
    for offset in range(size_bytes // CHUNK * CHUNK, size_bytes, LANES):
        kit.store(kit.load(kit.at(source, offset), VB), kit.at(target, offset))


def define_memory(kit: Kit, shape: Shape) -> None:
    """READ, COPY, WRITE, GATHER, SCATTER, SETBASE."""

    def source(r: Record) -> Value:
        base, off = r.base(2)
        return kit.select(off, r.zeros(), r.row(1, base))

    def read(r: Record) -> None:
        row = source(r)
        kit.store(row, kit.item(r.array(Context.POINTERS), r.field(0), I64), align=8)
        chunks(kit, shape.padded, lambda offset: kit.prefetch(kit.at(row, offset)))

    def copied(r: Record) -> None:
        copy(kit, r.vector(0), source(r), shape.padded)

    def write(r: Record) -> None:
        base, off = r.base(2)
        with kit.b.if_then(kit.b.not_(off)):
            copy(kit, r.row(1, base), r.vector(0), shape.lanes)

    def setbase(r: Record) -> None:
        b = kit.b
        value = kit.load(kit.at(r.vector(1), r.field(2)), I16, align=1)
        value = b.sext(value, I64)
        limit, least = r.field(3), kit.i64(-1)
        value = b.select(b.icmp_signed(">", value, limit), limit, value)
        value = b.select(b.icmp_signed("<", value, least), least, value)
        kit.store(b.trunc(value, I32), kit.item(r.array(Context.BASES), r.field(0), I32))

    for code, body in (
        (Code.READ, read),
        (Code.COPY, copied),
        (Code.WRITE, write),
        (Code.SETBASE, setbase),
    ):
        with handler(kit, shape, code) as each:
            each(body)
    _define_indexed(kit, shape)


def _define_indexed(kit: Kit, shape: Shape) -> None:
    """GATHER and SCATTER: a word for each lane."""

    def lane_byte(r: Record, lane: Value) -> tuple[Value, Value]:
        """Address of a lane's byte in its word, and whether its map is negative."""
        b = kit.b
        low = b.zext(kit.load(kit.at(r.vector(1), lane), I8), I64)
        high = b.sext(kit.load(kit.at(r.vector(2), lane), I8), I64)
        entry = b.or_(b.shl(high, kit.i64(8)), low)
        limit, zero = r.field(5), kit.i64(0)
        negative = b.icmp_signed("<", entry, zero)
        entry = b.select(b.icmp_signed(">", entry, limit), limit, entry)
        entry = b.select(negative, zero, entry)
        word = b.add(r.base(4)[0], entry)
        return kit.at(r.row(3, word), lane), negative

    def gather(r: Record) -> None:
        off = r.base(4)[1]
        target = r.vector(0)
        with kit.b.if_else(off) as (then, otherwise):
            with then:
                copy(kit, target, r.zeros(), shape.padded)
            with otherwise:

                def lane(l: Value) -> None:
                    at, negative = lane_byte(r, l)
                    value = kit.select(negative, ir.Constant(I8, 0), kit.load(at, I8))
                    kit.store(value, kit.at(target, l))

                kit.each(kit.i64(0), kit.i64(shape.lanes), lane)

    def scatter(r: Record) -> None:
        off = r.base(4)[1]
        source = r.vector(0)

        def lane(l: Value) -> None:
            at, negative = lane_byte(r, l)
            with kit.b.if_then(kit.b.not_(negative)):
                kit.store(kit.load(kit.at(source, l), I8), at)

        with kit.b.if_then(kit.b.not_(off)):
            kit.each(kit.i64(0), kit.i64(shape.lanes), lane)

    for code, body in ((Code.GATHER, gather), (Code.SCATTER, scatter)):
        with handler(kit, shape, code) as each:
            each(body)


def define_sxm(kit: Kit, shape: Shape) -> None:
    """SHUFFLE, PERMUTE, MOVE, SHIFT, TRANSPOSE."""

    def permute(r: Record) -> None:
        target, source = r.vector(0), r.vector(1)
        table = r.part(Context.PERMUTES, r.field(2), 2 * shape.lanes)

        def lane(l: Value) -> None:
            b = kit.b
            entry = b.sext(kit.load(kit.item(table, l, I16), I16), I64)
            nothing = b.icmp_signed("<", entry, kit.i64(0))
            at = b.select(nothing, kit.i64(0), entry)
            value = kit.load(kit.at(source, at), I8)
            kit.store(b.select(nothing, ir.Constant(I8, 0), value), kit.at(target, l))

        kit.each(kit.i64(0), kit.i64(shape.lanes), lane)

    def move(r: Record) -> None:
        """The table is that of a permutation; the first lane of each superlane says enough."""
        target, source, zeros = r.vector(0), r.vector(1), r.zeros()
        table = r.part(Context.PERMUTES, r.field(2), 2 * shape.lanes)

        def superlane(l: Value) -> None:
            b = kit.b
            entry = b.sext(kit.load(kit.item(table, l, I16), I16), I64)
            nothing = b.icmp_signed("<", entry, kit.i64(0))
            lanes = kit.load(b.select(nothing, zeros, kit.at(source, entry)), VB)
            kit.store(lanes, kit.at(target, l))

        for first in range(0, shape.lanes, SUPERLANE):
            superlane(kit.i64(first))

    def shift(r: Record) -> None:
        middle = kit.at(r.array(Context.WINDOW), shape.padded)
        copy(kit, middle, r.vector(1), shape.lanes)
        copy(kit, r.vector(0), kit.at(middle, kit.b.neg(r.field(2))), shape.padded)

    def shuffle(r: Record) -> None:
        target, source = r.vector(0), r.vector(1)
        table = r.part(Context.SHUFFLES, r.field(2), shape.padded)

        def chunk(offset: Value) -> None:
            lanes, places = kit.at(source, offset), kit.at(table, offset)
            _shuffle_chunk(kit, kit.at(target, offset), lanes, places)

        chunks(kit, shape.padded, chunk)

    def transpose(r: Record) -> None:
        targets = [r.vector(i) for i in range(SUPERLANE)]
        sources = [r.vector(SUPERLANE + i) for i in range(SUPERLANE)]

        def superlane(offset: Value) -> None:
            rows = [kit.load(kit.at(source, offset), VB) for source in sources]
            for _ in range(4):  # four perfect shuffles turn rows into columns
                rows = [
                    _interleave(kit, rows[i], rows[i + 8], half)
                    for i in range(8)
                    for half in (0, 8)
                ]
            for row, target in zip(rows, targets, strict=True):
                kit.store(row, kit.at(target, offset))

        kit.each(kit.i64(0), kit.i64(shape.lanes), superlane, step=SUPERLANE)

    for code, body in (
        (Code.PERMUTE, permute),
        (Code.MOVE, move),
        (Code.SHIFT, shift),
        (Code.SHUFFLE, shuffle),
        (Code.TRANSPOSE, transpose),
    ):
        with handler(kit, shape, code) as each:
            each(body)


def _interleave(kit: Kit, a: Value, c: Value, first: int) -> Value:
    """Lanes first .. first + 7 of both, alternating."""
    lanes = [first + i // 2 + SUPERLANE * (i % 2) for i in range(SUPERLANE)]
    mask = ir.Constant(ir.VectorType(I32, SUPERLANE), lanes)
    return kit.b.shuffle_vector(a, c, mask)


def _shuffle_chunk(kit: Kit, target: Value, source: Value, table: Value) -> None:
    """target[i] = source[i - i % 16 + table[i]], 0 where table[i] is 128; CHUNK lanes."""
    half = ir.VectorType(I8, 32)
    name = kit.target.vectors
    if name == "avx512":
        lanes, places = kit.load(source, BLOCK), kit.load(table, BLOCK)
        kit.store(kit.intrinsic("llvm.x86.avx512.pshuf.b.512", BLOCK, [lanes, places]), target)
    elif name == "avx2":
        for offset in (0, 32):
            lanes, places = (kit.load(kit.at(p, offset), half) for p in (source, table))
            moved = kit.intrinsic("llvm.x86.avx2.pshuf.b", half, [lanes, places])
            kit.store(moved, kit.at(target, offset))
    else:

        def lane(i: Value) -> None:
            b = kit.b
            place = b.zext(kit.load(kit.at(table, i), I8), I64)
            nothing = b.icmp_unsigned(">=", place, kit.i64(128))
            first = b.and_(i, kit.i64(-SUPERLANE))
            at = b.add(first, b.and_(place, kit.i64(SUPERLANE - 1)))
            value = kit.load(kit.at(source, at), I8)
            kit.store(b.select(nothing, ir.Constant(I8, 0), value), kit.at(target, i))

        kit.each(kit.i64(0), kit.i64(CHUNK), lane)
