"""In: a Kit. Out: attention of one unit over one chunk of positions, and how chunks merge.

Four passes over the chunk's pages: scores and their maximum, weights with their sum and maximum,
weights to bytes, and the weighted sums of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from openlpu.graph.step import PAGE
from openlpu.host.emit import F32, I8, I32, LANES, VB, VF, Kit, Value
from openlpu.host.gemm import SHAPES, summed
from openlpu.host.kernels import Attention
from openlpu.host.rows import columns, correction
from openlpu.numerics.attention import DENOMINATOR_BITS
from openlpu.numerics.quant import R127, TINY

_LOWEST = float("-inf")


class State:
    """A unit's m and l [group], o [group][dim], float32: of one chunk, or of several merged."""

    def __init__(self, kit: Kit, op: Attention, base: Value) -> None:
        self.base = self.m = base
        self.l, self.o = kit.item(base, op.group, F32), kit.item(base, 2 * op.group, F32)

    @classmethod
    def scratch(cls, kit: Kit, op: Attention) -> State:
        return cls(kit, op, kit.scratch(F32, op.part_bytes // 4))


@dataclass(frozen=True, slots=True)
class Span:
    """Of a chunk: its first position, the first and last visible one, the sequence's last page; and
    whether the pages come from memory, so that they should be fetched before."""

    base: Value
    low: Value
    high: Value
    last_page: Value
    far: Value


class _Scratch:
    """Stack memory of one chunk."""

    def __init__(self, kit: Kit, op: Attention) -> None:
        group, chunk = op.group, op.chunk
        self.scores = kit.scratch(F32, group * chunk)
        self.weights = kit.scratch(I8, group * chunk)


def _tiles(kit: Kit, rows: int, blocks: int) -> Iterator[tuple[range, range]]:
    """(rows, blocks) whose sums fit the registers together; K and V are in near caches, so that
    nothing else decides. All tiles of some rows have as many blocks."""
    shape = SHAPES[kit.target.vectors]
    for first in range(0, rows, shape.rows):
        some = range(first, min(first + shape.rows, rows))
        most = max(1, min(4, shape.rows * shape.width // len(some)))
        wide = next(n for n in range(most, 0, -1) if blocks % n == 0)
        for block in range(0, blocks, wide):
            yield some, range(block, block + wide)


def attend_chunk(
    kit: Kit,
    op: Attention,
    state: State,
    queries: Value,
    page: Callable[[Value], Value],
    span: Span,
) -> None:
    """m, l and o of one chunk."""
    b = kit.b
    s = _Scratch(kit, op)
    base, low, high = span.base, span.low, span.high
    dim, group, chunk = op.head_dim, op.group, op.chunk
    first_page = b.sdiv(low, kit.i64(PAGE))
    end_page = b.add(b.sdiv(high, kit.i64(PAGE)), kit.i64(1))
    lanes = kit.vi(0)
    for i in range(1, LANES):
        lanes = b.insert_element(lanes, kit.i32(i), kit.i32(i))
    low32, high32 = kit.splat(b.trunc(low, I32)), kit.splat(b.trunc(high, I32))

    def visible(j: Value) -> Value:
        at = b.add(kit.splat(b.trunc(j, I32)), lanes)
        return b.and_(b.icmp_signed(">=", at, low32), b.icmp_signed("<=", at, high32))

    rows = [kit.at(queries, g * op.query_bytes) for g in range(group)]
    query_scale, start = [], []
    for row in rows:
        scale = kit.load(kit.at(row, dim), F32)
        query_scale.append(kit.splat(b.fmul(scale, kit.f32(op.factor))))
        start.append(kit.splat(kit.load(kit.at(row, dim + 4), I32)))

    # Pages that come from memory are asked for in good time, some lines in each pass: the values
    # while the keys are scored, the next chunk's keys while the values are summed.
    size, scales = PAGE * dim, 4 * PAGE
    keys = [*range(0, size, 64), *range(2 * size, 2 * size + scales, 64)]
    values = [*range(size, 2 * size, 64), *range(2 * size + scales, 2 * size + 2 * scales, 64)]

    def fetch(at: Value, lines: list[int], half: int) -> None:
        with b.if_then(span.far):
            for line in lines[half::2]:
                kit.prefetch(kit.at(at, line))

    def following(i: Value) -> Value:
        other = b.add(i, kit.i64(chunk // PAGE))
        return page(b.select(b.icmp_signed("<", other, span.last_page), other, span.last_page))

    def column(g: int, j: Value) -> Value:
        return b.add(b.sub(j, base), kit.i64(g * chunk))

    def score_page(i: Value, tops: list[Value], whole: bool) -> list[Value]:
        at = page(i)
        fetch(at, values, 0)
        first = b.mul(i, kit.i64(PAGE))
        for some, blocks in _tiles(kit, group, PAGE // LANES):
            streams = [kit.at(at, n * LANES * dim) for n in blocks]
            starts = [start[g] for g in some for _ in blocks]
            dots = summed(kit, [rows[g] for g in some], streams, kit.i64(dim // 4), starts)
            for n in blocks:
                j = b.add(first, kit.i64(n * LANES))
                key_scale = kit.load(kit.item(kit.at(at, 2 * PAGE * dim), n * LANES, F32), VF)
                seen = None if whole else visible(j)
                for g in some:
                    dot = dots[(g - some.start) * len(blocks) + n - blocks.start]
                    t = b.fmul(b.sitofp(dot, VF), b.fmul(query_scale[g], key_scale))
                    t = t if seen is None else b.select(seen, t, kit.vf(_LOWEST))
                    kit.store(t, kit.item(s.scores, column(g, j), F32))
                    tops[g] = kit.maximum(t, tops[g])
        return tops

    tops = _over_pages(kit, span, [kit.vf(_LOWEST)] * group, score_page)
    maxima = [kit.reduce_max(top) for top in tops]

    def weigh_page(i: Value, carried: list[Value], whole: bool) -> list[Value]:
        at = page(i)
        fetch(at, values, 1)
        first = b.mul(i, kit.i64(PAGE))
        for n in range(PAGE // LANES):
            j = b.add(first, kit.i64(n * LANES))
            value_scale = kit.load(
                kit.item(kit.at(at, 2 * PAGE * dim + 4 * PAGE), n * LANES, F32), VF
            )
            seen = None if whole else visible(j)
            for g in range(group):
                into = kit.item(s.scores, column(g, j), F32)
                e = kit.exp2_below_1(b.fsub(kit.load(into, VF), kit.splat(maxima[g])))
                e = e if seen is None else b.select(seen, e, kit.vf(0.0))
                fixed = kit.rne(b.fmul(e, kit.vf(2.0**DENOMINATOR_BITS)))
                w = b.fmul(e, value_scale)
                w = w if seen is None else b.select(seen, w, kit.vf(0.0))
                kit.store(w, into)
                carried[g] = b.add(carried[g], fixed)
                carried[group + g] = kit.maximum(w, carried[group + g])
        return carried

    zeros = [kit.vi(0)] * group + [kit.vf(0.0)] * group
    sums = _over_pages(kit, span, zeros, weigh_page)
    tops_w = [kit.reduce_max(sums[group + g]) for g in range(group)]
    steps = []
    for top in tops_w:
        usable = b.fcmp_ordered(">=", top, kit.f32(float(TINY)))
        safe = b.select(usable, top, kit.f32(1.0))
        step = b.select(usable, b.fdiv(kit.f32(127.0), safe), kit.f32(0.0))
        steps.append(kit.splat(step))

    def quantize_page(i: Value, totals: list[Value]) -> list[Value]:
        fetch(following(i), keys, 0)
        first = b.mul(i, kit.i64(PAGE))
        for n in range(PAGE // LANES):
            for g in range(group):
                at = column(g, b.add(first, kit.i64(n * LANES)))
                p = kit.rne(b.fmul(kit.load(kit.item(s.scores, at, F32), VF), steps[g]))
                kit.store(b.trunc(p, VB), kit.at(s.weights, at))
                totals[g] = b.add(totals[g], p)
        return totals

    totals = kit.loop(first_page, end_page, 1, [kit.vi(0)] * group, quantize_page)
    for g in range(group):
        kit.store(maxima[g], kit.item(state.m, g, F32))
        total = b.sitofp(kit.reduce_add(sums[g]), F32)
        kit.store(b.fmul(total, kit.f32(2.0**-DENOMINATOR_BITS)), kit.item(state.l, g, F32))
    corrections = [kit.splat(correction(kit, kit.reduce_add(total))) for total in totals]

    def values_of(some: range, blocks: range) -> list[Value]:
        """The weighted sums of some heads' and blocks' values, over all pages."""

        def value_page(i: Value, acc: list[Value]) -> list[Value]:
            if not (some.start or blocks.start):
                fetch(following(i), keys, 1)
            first = b.sub(b.mul(i, kit.i64(PAGE)), base)
            p = [kit.at(s.weights, b.add(first, kit.i64(g * chunk))) for g in some]
            at = kit.at(page(i), PAGE * dim)
            streams = [kit.at(at, n * LANES * PAGE) for n in blocks]
            return summed(kit, p, streams, kit.i64(PAGE // 4), acc)

        starts = [corrections[g] for g in some for _ in blocks]
        return kit.loop(first_page, end_page, 1, starts, value_page)

    for some, blocks in _tiles(kit, group, dim // LANES):
        dots = iter(values_of(some, blocks))
        for g in some:
            scale = kit.splat(b.fmul(tops_w[g], kit.f32(float(R127))))
            for n in blocks:
                o = b.fmul(b.sitofp(next(dots), VF), scale)
                kit.store(o, kit.item(state.o, g * dim + n * LANES, F32))


def _over_pages(
    kit: Kit,
    span: Span,
    carried: list[Value],
    body: Callable[[Value, list[Value], bool], list[Value]],
) -> list[Value]:
    """body(page, carried, whole) over the chunk's pages, first those that are visible as a whole,
    then those at its edges: what is carried must not depend on the order."""
    b = kit.b
    first, end = (
        b.sdiv(span.low, kit.i64(PAGE)),
        b.add(b.sdiv(span.high, kit.i64(PAGE)), kit.i64(1)),
    )
    whole = b.sdiv(b.add(span.low, kit.i64(PAGE - 1)), kit.i64(PAGE))
    whole_end = b.sdiv(b.add(span.high, kit.i64(1)), kit.i64(PAGE))
    whole_end = b.select(b.icmp_signed(">", whole_end, whole), whole_end, whole)
    carried = kit.loop(whole, whole_end, 1, carried, lambda i, old: body(i, old, True))
    before = b.sub(whole, first)
    count = b.add(before, b.sub(end, whole_end))

    def edge(x: Value, old: list[Value]) -> list[Value]:
        after = b.add(whole_end, b.sub(x, before))
        is_before = b.icmp_signed("<", x, before)
        return body(b.select(is_before, b.add(first, x), after), old, False)

    return kit.loop(kit.i64(0), count, 1, carried, edge)


def merge_chunk(kit: Kit, op: Attention, total: State, part: State) -> None:
    """Fold a later chunk's m, l, o into the totals."""
    b = kit.b
    dim = op.head_dim

    def head(g: Value) -> None:
        m, l = (kit.load(kit.item(p, g, F32), F32) for p in (part.m, part.l))
        old_m, old_l = (kit.load(kit.item(p, g, F32), F32) for p in (total.m, total.l))
        top = kit.select(b.fcmp_ordered(">", m, old_m), m, old_m)
        x, y = (kit.exp2(kit.splat(b.fsub(v, top))) for v in (old_m, m))
        x0, y0 = (b.extract_element(v, kit.i32(0)) for v in (x, y))
        kit.store(top, kit.item(total.m, g, F32))
        merged = b.fadd(b.fmul(old_l, x0), b.fmul(l, y0))
        kit.store(merged, kit.item(total.l, g, F32))

        def block(d: Value) -> None:
            i = b.add(b.mul(g, kit.i64(dim)), d)
            o = kit.load(kit.item(part.o, i, F32), VF)
            old = kit.load(kit.item(total.o, i, F32), VF)
            kit.store(b.fadd(b.fmul(old, x), b.fmul(o, y)), kit.item(total.o, i, F32))

        columns(kit, dim, block)

    kit.each(kit.i64(0), kit.i64(op.group), head)
