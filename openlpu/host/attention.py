"""In: a Kit. Out: the two attention kernels: install (rope, quantize, append K/V) and attend.

A unit of work is (row, kv head), or several neighbouring rows with one kv head: the query heads of
the group share every loaded line of K and V. While each sequence has one row in the step, the
thread that installs a unit also attends it, so no barrier stands between. Few rows over long
contexts are too few units for the threads, which then share the units' chunks.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from openlpu.graph.step import PAGE
from openlpu.host.chunk import Span, State, attend_chunk, merge_chunk
from openlpu.host.emit import F32, I8, I32, I64, LANES, PTR, VF, Kit, Value
from openlpu.host.kernels import Attention
from openlpu.host.layout import APART_ROWS, TASK_ARGS, Context, head_bytes, padded
from openlpu.host.rows import columns, correction, my_rows, normalize, quantize_span, split

NEIGHBOURS = 16  # rows that go through the chunks together, at most
UNITS = 16  # of such rows and one head, at least, for each thread
# Task arguments after TASK_ARGS: out, q, k, v, quantized queries, layer, q gain, k gain.
_OUT, _Q, _K, _V, _QUERIES, _LAYER, _Q_GAIN, _K_GAIN = (TASK_ARGS + i for i in range(8))


def _units(
    kit: Kit, op: Attention, args: tuple[Value, ...], body: Callable[[Value, Value], None]
) -> None:
    """body(row, kv head) for the thread's units: unit u goes to thread u mod T, as in
    `_attend_whole`, before which there may be no barrier."""
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
    """Neighbouring rows go through the chunks side by side, so that a chunk that one row has read
    is in a near cache for the others; each row's chunks are merged at once, in order."""
    context, task, thread, threads = args
    b = kit.b
    rows, heads = kit.field(context, Context.ROWS), kit.i64(op.kv_heads)
    totals, later = kit.scratch(I8, NEIGHBOURS * op.part_bytes), State.scratch(kit, op)

    # Enough units for all threads; where no barrier stands after `install`, its own units.
    size = b.sdiv(b.mul(rows, heads), b.mul(threads, kit.i64(UNITS)))
    size = b.select(b.icmp_signed("<", size, kit.i64(NEIGHBOURS)), size, kit.i64(NEIGHBOURS))
    shared = b.icmp_signed("!=", kit.field(context, Context.SHARED_KV), kit.i64(0))
    several = b.and_(shared, b.icmp_signed(">", size, kit.i64(1)))
    size = b.select(several, size, kit.i64(1))

    def total(i: Value) -> State:
        return State(kit, op, kit.at(totals, b.mul(i, kit.i64(op.part_bytes))))

    def unit(u: Value) -> None:
        start, head = b.mul(b.sdiv(u, heads), size), b.srem(u, heads)
        left = b.sub(rows, start)
        count = b.select(b.icmp_signed("<", left, size), left, size)

        def reach(i: Value, ends: list[Value]) -> list[Value]:
            first, chunks = _chunks(kit, op, context, b.add(start, i))
            end = b.add(first, chunks)
            return [
                b.select(b.icmp_signed("<", first, ends[0]), first, ends[0]),
                b.select(b.icmp_signed(">", end, ends[1]), end, ends[1]),
            ]

        nothing = [kit.i64(1 << 32), kit.i64(0)]
        low, high = kit.loop(kit.i64(0), count, 1, nothing, reach)

        def chunk(index: Value) -> None:
            def one(i: Value) -> None:
                row = b.add(start, i)
                first, chunks = _chunks(kit, op, context, row)
                within = b.icmp_unsigned("<", b.sub(index, first), chunks)
                is_first = b.icmp_signed("==", index, first)
                into = b.select(is_first, total(i).base, later.base)
                with b.if_then(within):
                    b.call(part, [context, task, row, head, index, into])
                    with b.if_then(b.not_(is_first)):
                        merge_chunk(kit, op, total(i), later)

            kit.each(kit.i64(0), count, one)

        kit.each(low, high, chunk)
        kit.each(
            kit.i64(0),
            count,
            lambda i: _finish(kit, op, task, b.add(start, i), head, total(i)),
        )

    groups = b.sdiv(b.add(rows, b.sub(size, kit.i64(1))), size)
    kit.each(thread, b.mul(groups, heads), unit, step=threads)


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
                total = State(kit, op, at(here))

                def one(i: Value) -> None:
                    merge_chunk(kit, op, total, State(kit, op, at(b.add(here, i))))

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


def _finish(kit: Kit, op: Attention, task: Value, row: Value, head: Value, total: State) -> None:
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
        span = Span(first, low, high, b.sdiv(position, kit.i64(PAGE)), few)
        queries = query_base(kit, op, task, row, head)
        attend_chunk(kit, op, State(kit, op, base), queries, _page(kit, op, args, row, head), span)
    return kit.module.globals[name]
