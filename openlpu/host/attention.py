"""In: a Kit. Out: the two attention kernels: install (rope, quantize, append K/V) and attend.

A unit of work is (row, kv head): the query heads of the group share every loaded line of K and V.
While each sequence has one row in the step, the thread that installs a unit also attends it, so
no barrier stands between. Few rows over long contexts are too few units for the threads, which
then share the units' chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from openlpu.graph.step import PAGE
from openlpu.host.emit import F32, I8, I32, I64, LANES, PTR, VB, VF, Kit, Value
from openlpu.host.gemm import SHAPES, summed
from openlpu.host.kernels import Attention
from openlpu.host.layout import APART_ROWS, TASK_ARGS, Context, head_bytes, padded
from openlpu.host.rows import columns, correction, my_rows, normalize, quantize_span, split
from openlpu.numerics.attention import DENOMINATOR_BITS
from openlpu.numerics.quant import R127, TINY

_LOWEST = float("-inf")


# Task arguments after TASK_ARGS: out, q, k, v, quantized queries, layer, q gain, k gain.
_OUT, _Q, _K, _V, _QUERIES, _LAYER, _Q_GAIN, _K_GAIN = (TASK_ARGS + i for i in range(8))


def _units(
    kit: Kit, op: Attention, args: tuple[Value, ...], body: Callable[[Value, Value], None]
) -> None:
    """body(row, kv head) for the thread's units: unit u goes to thread u mod T, because later
    rows cost more."""
    context, _, thread, threads = args
    b = kit.b
    rows = kit.field(context, Context.ROWS)
    total = b.mul(rows, kit.i64(op.kv_heads))

    def unit(u: Value) -> None:
        body(b.sdiv(u, kit.i64(op.kv_heads)), b.srem(u, kit.i64(op.kv_heads)))

    kit.each(thread, total, unit, step=threads)


def _page(
    kit: Kit, op: Attention, args: tuple[Value, ...], row: Value, head: Value
) -> Callable[[Value], Value]:
    """Address of the (layer, head) part of the page that holds positions [PAGE*i, PAGE*(i+1))."""
    context, task = args[0], args[1]
    b = kit.b
    slot = b.sext(kit.load(kit.item(kit.pointer(context, Context.SLOTS), row, I32), I32), I64)
    stride = kit.field(context, Context.PAGE_STRIDE)
    table = kit.item(kit.pointer(context, Context.PAGE_TABLE), b.mul(slot, stride), I32)
    layer = kit.field(task, _LAYER)
    part = b.add(b.mul(layer, kit.i64(op.kv_heads)), head)
    base = kit.at(kit.pointer(context, Context.KV), b.mul(part, kit.i64(head_bytes(op.head_dim))))
    page_bytes = kit.field(context, Context.PAGE_BYTES)

    def address(i: Value) -> Value:
        page = b.sext(kit.load(kit.item(table, i, I32), I32), I64)
        return kit.at(base, b.mul(page, page_bytes))

    return address


def _position(kit: Kit, context: Value, row: Value) -> Value:
    positions = kit.pointer(context, Context.POSITIONS)
    return kit.b.sext(kit.load(kit.item(positions, row, I32), I32), I64)


def install(kit: Kit, name: str, op: Attention) -> None:
    """Rope and quantize the unit's queries into scratch, its key and value into the page."""
    dim, half = op.head_dim, op.head_dim // 2
    fused_width = padded((op.heads + 2 * op.kv_heads) * dim)
    with kit.function(name) as args:
        context, task = args[0], args[1]
        b = kit.b
        normal = kit.scratch(F32, dim)
        turned = kit.scratch(F32, dim)
        values = kit.scratch(I8, dim)
        # While no sequence has several rows, each unit has a page of its own, which this thread
        # reads when all its units are installed.
        alone = b.icmp_signed("==", kit.field(context, Context.SHARED_KV), kit.i64(0))

        def source(field: int, width: int, row: Value, head: Value) -> Value:
            ld = fused_width if op.fused else padded(width)
            at = b.add(b.mul(row, kit.i64(ld)), b.mul(head, kit.i64(dim)))
            return kit.item(kit.pointer(task, field), at, F32)

        def prepared(x: Value, gain: int, position: Value) -> Value:
            """Head norm and rope, when this op still has them to do."""
            if not op.fused:
                return x
            if op.norm_eps is not None:
                normalize(kit, x, normal, kit.pointer(task, gain), dim, op.norm_eps)
                x = normal
            at = b.mul(position, kit.i64(half))
            cosines = kit.item(kit.pointer(context, Context.COSINES), at, F32)
            sines = kit.item(kit.pointer(context, Context.SINES), at, F32)
            rotate(kit, x, turned, cosines, sines, half)
            return turned

        def unit(row: Value, head: Value) -> None:
            position = _position(kit, context, row)
            page = _page(kit, op, args, row, head)(b.sdiv(position, kit.i64(PAGE)))
            j = b.srem(position, kit.i64(PAGE))
            queries = query_base(kit, op, task, row, head)
            with b.if_then(alone):
                for line in range(0, head_bytes(dim), 64):
                    kit.prefetch(kit.at(page, line))

            def query(g: Value) -> None:
                which = b.add(b.mul(head, kit.i64(op.group)), g)
                x = prepared(source(_Q, op.heads * dim, row, which), _Q_GAIN, position)
                into = kit.at(queries, b.mul(g, kit.i64(op.query_bytes)))
                scale, total = quantize_span(kit, x, into, kit.i64(0), dim)
                kit.store(scale, kit.at(into, dim))
                kit.store(correction(kit, total), kit.at(into, dim + 4))

            kit.each(kit.i64(0), kit.i64(op.group), query)
            x = prepared(source(_K, op.kv_heads * dim, row, head), _K_GAIN, position)
            scale, _ = quantize_span(kit, x, values, kit.i64(0), dim)
            store_key(kit, values, page, j, dim)
            kit.store(scale, kit.item(kit.at(page, 2 * PAGE * dim), j, F32))
            x = source(_V, op.kv_heads * dim, row, head)
            scale, _ = quantize_span(kit, x, values, kit.i64(0), dim)
            store_value(kit, values, page, j, dim)
            kit.store(scale, kit.item(kit.at(page, 2 * PAGE * dim + 4 * PAGE), j, F32))

        _units(kit, op, args, unit)


def query_base(kit: Kit, op: Attention, task: Value, row: Value, head: Value) -> Value:
    """Quantized queries of one unit: `group` heads, query_bytes apart."""
    b = kit.b
    index = b.add(b.mul(row, kit.i64(op.kv_heads)), head)
    size = kit.i64(op.group * op.query_bytes)
    return kit.at(kit.pointer(task, _QUERIES), b.mul(index, size))


def rotate(kit: Kit, x: Value, out: Value, cosines: Value, sines: Value, half: int) -> None:
    """numerics.rope.rotate of one head. Head dims that are no multiple of 32 go by scalars."""
    b = kit.b
    kind, step = (VF, LANES) if half % LANES == 0 else (F32, 1)

    def block(i: Value) -> None:
        upper = b.add(i, kit.i64(half))
        low, high = kit.load(kit.item(x, i, F32), kind), kit.load(kit.item(x, upper, F32), kind)
        c, s = kit.load(kit.item(cosines, i, F32), kind), kit.load(kit.item(sines, i, F32), kind)
        kit.store(b.fsub(b.fmul(low, c), b.fmul(high, s)), kit.item(out, i, F32))
        kit.store(b.fadd(b.fmul(high, c), b.fmul(low, s)), kit.item(out, upper, F32))

    kit.each(kit.i64(0), kit.i64(half), block, step=step)


def rope(kit: Kit, name: str, width: int, *, heads: int) -> None:
    """Rope as an op of its own. args: out, x."""
    half = width // heads // 2
    with kit.function(name) as args:
        context, task = args[0], args[1]
        b = kit.b
        out, x = kit.pointer(task, TASK_ARGS), kit.pointer(task, TASK_ARGS + 1)

        def body(row: Value) -> None:
            at = b.mul(_position(kit, context, row), kit.i64(half))
            cosines = kit.item(kit.pointer(context, Context.COSINES), at, F32)
            sines = kit.item(kit.pointer(context, Context.SINES), at, F32)
            start = b.mul(row, kit.i64(padded(width)))

            def head(c: Value) -> None:
                here = b.add(start, c)
                rotate(kit, kit.item(x, here, F32), kit.item(out, here, F32), cosines, sines, half)

            kit.each(kit.i64(0), kit.i64(width), head, step=2 * half)

        my_rows(kit, args, body)


def store_key(kit: Kit, q: Value, page: Value, j: Value, dim: int) -> None:
    """K block layout: four dims of one position are neighbours."""
    b = kit.b
    block = b.mul(b.sdiv(j, kit.i64(LANES)), kit.i64(dim * LANES))
    lane = b.mul(b.srem(j, kit.i64(LANES)), kit.i64(4))
    base = kit.at(page, b.add(block, lane))
    flip = kit.i32(0x80808080 - (1 << 32))

    def four(d: Value) -> None:
        word = b.xor(kit.load(kit.item(q, d, I32), I32, align=1), flip)
        kit.store(word, kit.at(base, b.mul(d, kit.i64(4 * LANES))))

    kit.each(kit.i64(0), kit.i64(dim // 4), four)


def store_value(kit: Kit, q: Value, page: Value, j: Value, dim: int) -> None:
    """V block layout: four positions of one dim are neighbours."""
    b = kit.b
    base = kit.at(page, PAGE * dim)
    lane = b.add(b.mul(b.sdiv(j, kit.i64(4)), kit.i64(4 * LANES)), b.srem(j, kit.i64(4)))

    def block(d: Value) -> None:
        start = kit.at(base, b.add(b.mul(d, kit.i64(PAGE)), lane))
        for i in range(LANES):
            byte = b.xor(kit.load(kit.at(q, b.add(d, kit.i64(i))), I8), I8(-128))
            kit.store(byte, kit.at(start, 4 * i))

    kit.each(kit.i64(0), kit.i64(dim), block, step=LANES)


def attend(kit: Kit, name: str, op: Attention) -> None:
    """numerics.attention.attend for each unit; writes the heads of the group side by side."""
    part = _define_part(kit, name, op)
    with kit.function(name) as args:
        b = kit.b
        parts = kit.pointer(args[0], Context.PARTS)
        apart = b.icmp_unsigned("!=", b.ptrtoint(parts, I64), kit.i64(0))
        with b.if_else(apart) as (then, otherwise):
            with then:
                _attend_apart(kit, op, args, part, parts)
            with otherwise:
                _attend_whole(kit, op, args, part)


def _attend_whole(kit: Kit, op: Attention, args: tuple[Value, ...], part: Value) -> None:
    """A unit's chunks one after the other, merged at once."""
    context, task = args[0], args[1]
    b = kit.b
    total, later = _State.scratch(kit, op), _State.scratch(kit, op)

    def unit(row: Value, head: Value) -> None:
        first, chunks = _chunks(kit, op, context, row)

        def one(i: Value) -> None:
            b.call(part, [context, task, row, head, b.add(first, i), later.base])
            _merge(kit, op, total, later)

        b.call(part, [context, task, row, head, first, total.base])
        kit.each(kit.i64(1), chunks, one)
        _finish(kit, op, task, row, head, total)

    _units(kit, op, args, unit)


def _attend_apart(
    kit: Kit, op: Attention, args: tuple[Value, ...], part: Value, parts: Value
) -> None:
    """Few rows over long contexts: every thread takes an equal share of all units' chunks; when all
    have met, the parts are merged in the order of the contract."""
    context, task, thread, threads = args
    b = kit.b
    rows, heads = kit.field(context, Context.ROWS), kit.i64(op.kv_heads)

    def count(row: Value, before: list[Value]) -> list[Value]:
        return [b.add(before[0], b.mul(heads, _chunks(kit, op, context, row)[1]))]

    (all_parts,) = kit.loop(kit.i64(0), rows, 1, [kit.i64(0)], count)
    start, stop = split(kit, all_parts, thread, threads)

    def at(index: Value) -> Value:
        return kit.at(parts, b.mul(index, kit.i64(op.part_bytes)))

    def compute(row: Value, before: list[Value]) -> list[Value]:
        first, chunks = _chunks(kit, op, context, row)
        after = b.add(before[0], b.mul(heads, chunks))
        low = b.select(b.icmp_signed(">", start, before[0]), start, before[0])
        high = b.select(b.icmp_signed("<", stop, after), stop, after)

        def one(i: Value) -> None:
            within = b.sub(i, before[0])
            chunk = b.add(first, b.srem(within, chunks))
            b.call(part, [context, task, row, b.sdiv(within, chunks), chunk, at(i)])

        kit.each(low, high, one)
        return [after]

    kit.loop(kit.i64(0), rows, 1, [kit.i64(0)], compute)
    b.call(kit.module.globals["barrier"], [context, threads])

    def merge(row: Value, before: list[Value]) -> list[Value]:
        chunks = _chunks(kit, op, context, row)[1]

        def unit(head: Value) -> None:
            mine = b.srem(b.add(b.mul(row, heads), head), threads)
            with b.if_then(b.icmp_signed("==", mine, thread)):
                here = b.add(before[0], b.mul(head, chunks))
                total = _State(kit, op, at(here))

                def one(i: Value) -> None:
                    _merge(kit, op, total, _State(kit, op, at(b.add(here, i))))

                kit.each(kit.i64(1), chunks, one)
                _finish(kit, op, task, row, head, total)

        kit.each(kit.i64(0), heads, unit)
        return [b.add(before[0], b.mul(heads, chunks))]

    kit.loop(kit.i64(0), rows, 1, [kit.i64(0)], merge)


def _chunks(kit: Kit, op: Attention, context: Value, row: Value) -> tuple[Value, Value]:
    """The first chunk that a row sees, and how many."""
    b = kit.b
    position, chunk = _position(kit, context, row), kit.i64(op.chunk)
    first = b.sdiv(_first_seen(kit, op, position), chunk)
    return first, b.sub(b.add(b.sdiv(position, chunk), kit.i64(1)), first)


def _first_seen(kit: Kit, op: Attention, position: Value) -> Value:
    """The first position that a row sees."""
    if not op.window:
        return kit.i64(0)
    behind = kit.b.sub(position, kit.i64(op.window - 1))
    return kit.b.select(kit.b.icmp_signed(">", behind, kit.i64(0)), behind, kit.i64(0))


def _finish(kit: Kit, op: Attention, task: Value, row: Value, head: Value, total: _State) -> None:
    """Divide by the sums of weights, and write the unit's heads."""
    b = kit.b
    dim, group = op.head_dim, op.group
    ld = padded(op.heads * dim)
    at = b.add(b.mul(row, kit.i64(ld)), b.mul(head, kit.i64(group * dim)))
    out = kit.item(kit.pointer(task, _OUT), at, F32)

    def finish(g: Value) -> None:
        share = b.fdiv(kit.f32(1.0), kit.load(kit.item(total.l, g, F32), F32))
        from_ = b.mul(g, kit.i64(dim))

        def block(d: Value) -> None:
            i = b.add(from_, d)
            o = kit.load(kit.item(total.o, i, F32), VF)
            kit.store(b.fmul(o, kit.splat(share)), kit.item(out, i, F32))

        columns(kit, dim, block)

    kit.each(kit.i64(0), kit.i64(group), finish)


class _State:
    """A unit's m and l [group], o [group][dim], float32: of one chunk, or of several merged."""

    def __init__(self, kit: Kit, op: Attention, base: Value) -> None:
        self.base = self.m = base
        self.l, self.o = kit.item(base, op.group, F32), kit.item(base, 2 * op.group, F32)

    @classmethod
    def scratch(cls, kit: Kit, op: Attention) -> _State:
        return cls(kit, op, kit.scratch(F32, op.part_bytes // 4))


PART = ir.FunctionType(ir.VoidType(), [PTR, PTR, I64, I64, I64, PTR])


def _define_part(kit: Kit, name: str, op: Attention) -> Value:
    """part(context, task, row, kv head, chunk, state): what one unit sees in one chunk."""
    name = f"part_of_{name}"
    with kit.function(name, PART, internal=True) as args:
        context, task, row, head, index, base = args
        b = kit.b
        position = _position(kit, context, row)
        start = _first_seen(kit, op, position)
        first = b.mul(index, kit.i64(op.chunk))
        low = b.select(b.icmp_signed(">", start, first), start, first)
        end = b.add(first, kit.i64(op.chunk - 1))
        high = b.select(b.icmp_signed("<", position, end), position, end)
        few = b.icmp_signed("<=", kit.field(context, Context.ROWS), kit.i64(APART_ROWS))
        span = _Span(first, low, high, b.sdiv(position, kit.i64(PAGE)), few)
        queries = query_base(kit, op, task, row, head)
        _chunk(kit, op, _State(kit, op, base), queries, _page(kit, op, args, row, head), span)
    return kit.module.globals[name]


@dataclass(frozen=True, slots=True)
class _Span:
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
    shape = SHAPES[kit.target.name]
    for first in range(0, rows, shape.rows):
        some = range(first, min(first + shape.rows, rows))
        most = max(1, min(4, shape.rows * shape.width // len(some)))
        wide = next(n for n in range(most, 0, -1) if blocks % n == 0)
        for block in range(0, blocks, wide):
            yield some, range(block, block + wide)


def _chunk(
    kit: Kit,
    op: Attention,
    state: _State,
    queries: Value,
    page: Callable[[Value], Value],
    span: _Span,
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
    span: _Span,
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


def _merge(kit: Kit, op: Attention, total: _State, part: _State) -> None:
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
