"""In: a Kit. Out: integer matrix kernels: microkernels, and the linears built on them.

A panel is `nr` neighbouring 16-output blocks; its weights stream once from memory. With few rows
the blocks go one after the other, so that memory is read as one stream, which the processor's own
prefetching follows best; with more rows, blocks of rows share
each loaded line from registers. Microkernels only add to an int32 tile; the epilogue turns
the tile into float32 and finishes the op, so that integer and float code stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from openlpu.host import tiles
from openlpu.host.emit import BLOCK, F32, I8, I32, I64, LANES, PTR, VF, VI, Kit, Value
from openlpu.host.kernels import Linear
from openlpu.host.layout import TASK_ARGS, padded, quantized_bytes
from openlpu.host.rows import own_copy, row_count, split

LINE_BYTES = 64
# From so many rows on, the next panel is fetched while this one is used: the sums of a line then
# fill the processor's window, and it no longer runs ahead to the next lines by itself.
FETCH_ROWS = 3
# With fewer, processors that have tiles (Intel's) want to be asked: their own prefetching ends with
# each page of 4 KiB. Others are faster when left alone.
AHEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """Register blocking: up to `rows` rows by `width` blocks; up to `few_rows` rows by one.
    `sums`: most sums of 16 lanes at once where k is split over several."""

    rows: int
    width: int
    few_rows: int
    sums: int


SHAPES = {
    "avx512": Shape(12, 2, 8, 12),
    "avx2": Shape(4, 1, 2, 8),
    "neon": Shape(6, 1, 2, 4),
    "rvv": Shape(4, 1, 2, 1),
    "plain": Shape(2, 1, 1, 8),
}
MICRO = ir.FunctionType(ir.VoidType(), [PTR, I64, PTR, I64, PTR])  # x, ldx, w, K/4, tile


def summed(
    kit: Kit,
    rows: list[Value],
    streams: list[Value],
    k4: Value,
    start: list[Value],
    ahead: Value | None = None,
) -> list[Value]:
    """start[m * nr + n] + row m . block n, over k4 lines: all in registers.

    rows: addresses of int8 rows; streams: of `nr` blocks. ahead: how many bytes further to fetch.
    """
    b = kit.b
    mr, nr = len(rows), len(streams)
    # A short chain of dependent sums would wait for itself: split k over several accumulators.
    sums = SHAPES[kit.target.vectors].sums
    ways = min(4 if mr * nr <= 2 else 2 if mr * nr <= 6 else 1, max(1, sums // (mr * nr)))
    unroll = max(ways, min(4, sums) if mr * nr <= 4 else 1)

    def body(k: Value, acc: list[Value]) -> list[Value]:
        for u in range(unroll):
            at = b.add(k, kit.i64(u))
            lines = [kit.at(s, b.mul(at, kit.i64(LINE_BYTES))) for s in streams]
            blocks = [kit.load(line, BLOCK) for line in lines]
            for line in lines if ahead is not None else []:
                kit.prefetch(b.gep(line, [ahead], source_etype=I8))
            for m in range(mr):
                x4 = kit.load(kit.item(rows[m], at, I32), I32)
                for n in range(nr):
                    i = (u % ways * mr + m) * nr + n
                    acc[i] = kit.dot4(acc[i], blocks[n], x4)
        return acc

    acc = kit.loop(kit.i64(0), k4, unroll, start + [kit.vi(0)] * ((ways - 1) * mr * nr), body)
    totals = acc[: mr * nr]
    for way in range(1, ways):
        totals = [b.add(total, acc[way * mr * nr + i]) for i, total in enumerate(totals)]
    return totals


def ahead(kit: Kit, rows: int, panel_bytes: Value) -> Value | None:
    """How many bytes further weights are asked for, if at all."""
    if rows >= FETCH_ROWS:
        return panel_bytes
    return kit.i64(AHEAD_BYTES) if kit.target.tiles else None


def microkernel(kit: Kit, mr: int, nr: int) -> Value:
    """tile[mr][nr*16] += x[mr][K] . w panel: x int8 rows `ldx` bytes apart."""
    name = f"micro_{mr}x{nr}"
    found = kit.defined(name)
    if found is not None:
        return found
    with kit.function(name, MICRO, internal=True) as (x, ldx, w, k4, tile):
        b = kit.b
        block_bytes = b.mul(k4, kit.i64(LINE_BYTES))
        streams = [kit.at(w, b.mul(block_bytes, kit.i64(n))) for n in range(nr)]
        rows = [kit.at(x, b.mul(ldx, kit.i64(m))) for m in range(mr)]
        places = [kit.item(tile, i * LANES, I32) for i in range(mr * nr)]
        start = [kit.load(place, VI) for place in places]
        further = ahead(kit, mr, b.mul(block_bytes, kit.i64(nr)))
        totals = summed(kit, rows, streams, k4, start, further)
        for total, place in zip(totals, places, strict=True):
            kit.store(total, place)
    return kit.module.globals[name]


def micro_any(kit: Kit, nr: int, most: int) -> Value:
    """Dispatch on the number of rows: a function (m, x, ldx, w, K/4, tile) for m in 1..most."""
    name = f"micro_upto{most}x{nr}"
    return dispatch(kit, name, [microkernel(kit, m, nr) for m in range(1, most + 1)])


def dispatch(kit: Kit, name: str, kernels: list[Value]) -> Value:
    """A function (m, *args) that calls the m-th kernel, counted from 1."""
    found = kit.defined(name)
    if found is not None:
        return found
    kind = ir.FunctionType(ir.VoidType(), [I64, *kernels[0].function_type.args])
    with kit.function(name, kind, internal=True) as (m, *args):
        b = kit.b
        done = b.append_basic_block("done")
        switch = b.switch(m, done)
        for count, kernel in enumerate(kernels, 1):
            block = b.append_basic_block(f"rows{count}")
            switch.add_case(kit.i64(count), block)
            b.position_at_end(block)
            b.call(kernel, args)
            b.branch(done)
        b.position_at_end(done)
    return kit.module.globals[name]


def _place(kit: Kit, op: Linear, pointer: int, block: Value, row: Value, task: Value) -> Value:
    """Where the first of neighbouring blocks goes, or where its residual lies."""
    b = kit.b
    lane = b.mul(block, kit.i64(LANES))
    lane = b.sdiv(lane, kit.i64(2)) if op.epilogue == "swiglu" else lane
    at = b.add(b.mul(row, kit.i64(padded(op.out_width))), lane)
    return kit.item(kit.pointer(task, pointer), at, F32)


def expect(kit: Kit, op: Linear, block: Value, row: Value, task: Value, nr: int) -> None:
    """Ask for the lines that `finish` will write and read."""
    for n in range(nr // 2 if op.epilogue == "swiglu" else nr):
        out = _place(kit, op, TASK_ARGS, block, row, task)
        kit.prefetch(kit.at(out, n * LINE_BYTES), write=True)
        if op.epilogue == "add":
            residual = _place(kit, op, TASK_ARGS + 5, block, row, task)
            kit.prefetch(kit.at(residual, n * LINE_BYTES))


def finish(
    kit: Kit, op: Linear, ys: list[Value], block: Value, row: Value, task: Value, nr: int
) -> None:
    """Bias, residual or swiglu, and the store, for nr neighbouring blocks of one row."""
    b = kit.b
    lane = b.mul(block, kit.i64(LANES))
    if op.bias:
        bias = kit.pointer(task, TASK_ARGS + 4)
        ys = [
            b.fadd(y, kit.load(kit.item(bias, b.add(lane, kit.i64(n * LANES)), F32), VF))
            for n, y in enumerate(ys)
        ]
    if op.epilogue == "swiglu":
        ys = [b.fmul(kit.silu(ys[n]), ys[n + 1]) for n in range(0, nr, 2)]
        lane = b.sdiv(lane, kit.i64(2))
    at = b.add(b.mul(row, kit.i64(padded(op.out_width))), lane)
    out = kit.item(kit.pointer(task, TASK_ARGS), at, F32)
    if op.epilogue == "add":
        residual = kit.item(kit.pointer(task, TASK_ARGS + 5), at, F32)
        ys = [b.fadd(kit.load(kit.item(residual, n * LANES, F32), VF), y) for n, y in enumerate(ys)]
    for n, y in enumerate(ys):
        kit.store(y, kit.item(out, n * LANES, F32))


def panels(
    kit: Kit,
    nr: int,
    most: int,
    bounds: tuple[Value, Value],
    rows: Value,
    body: Callable[[Value, Value, Value], None],
) -> None:
    """body(first block, first row, row count) for each panel and each block of `most` rows."""
    b = kit.b

    def panel(p: Value) -> None:
        def some(r: Value) -> None:
            left = b.sub(rows, r)
            full = b.icmp_signed(">", left, kit.i64(most))
            body(b.mul(p, kit.i64(nr)), r, b.select(full, kit.i64(most), left))

        kit.each(kit.i64(0), rows, some, step=most)

    kit.each(*bounds, panel)


def linear(kit: Kit, name: str, op: Linear) -> None:
    """args: out, x (quantized), weights, scales, bias, residual."""
    shape = SHAPES[kit.target.vectors]
    # Gate and up stand in neighbouring blocks, so a swiglu panel has two.
    nr = max(shape.width, 2 if op.epilogue == "swiglu" else 1)
    micro = {
        True: micro_any(kit, 1, shape.few_rows),
        False: micro_any(kit, shape.width, shape.rows),
    }
    with kit.function(name) as args:
        context, task, thread, threads = args
        b = kit.b
        rows = row_count(kit, context, task)
        row_bytes = quantized_bytes(op.k, 0)
        x = own_copy(kit, kit.pointer(task, TASK_ARGS + 1), rows, thread, row_bytes)
        w, scales = kit.pointer(task, TASK_ARGS + 2), kit.pointer(task, TASK_ARGS + 3)
        tile = kit.scratch(VI, nr * shape.rows)

        def emit(few: bool) -> None:
            most, width = (shape.few_rows, 1) if few else (shape.rows, shape.width)

            def at_tile(m: Value, n: int) -> Value:
                """The tile is [block / width][row][width]."""
                within = b.add(b.mul(m, kit.i64(width)), kit.i64(n % width))
                return kit.item(tile, b.add(within, kit.i64(n // width * most * width)), VI)

            def body(block: Value, first: Value, count: Value) -> None:
                xs = kit.at(x, b.mul(first, kit.i64(row_bytes)))

                def start(m: Value) -> None:
                    at = kit.at(xs, b.add(b.mul(m, kit.i64(row_bytes)), kit.i64(op.k + 4)))
                    value = kit.splat(kit.load(at, I32))
                    for n in range(nr):
                        kit.store(value, at_tile(m, n), align=64)
                    if not few:
                        expect(kit, op, block, b.add(first, m), task, nr)

                kit.each(kit.i64(0), count, start)
                panel = kit.at(w, b.mul(block, kit.i64(op.k * LANES)))
                for n in range(0, nr, width):
                    weights = kit.at(panel, n * op.k * LANES)
                    into = at_tile(kit.i64(0), n)
                    sizes = kit.i64(row_bytes), kit.i64(op.k // 4)
                    b.call(micro[few], [count, xs, sizes[0], weights, sizes[1], into])
                at = b.mul(block, kit.i64(LANES))
                weight_scales = [
                    kit.load(kit.item(scales, b.add(at, kit.i64(n * LANES)), F32), VF)
                    for n in range(nr)
                ]

                def done(m: Value) -> None:
                    offset = b.add(b.mul(m, kit.i64(row_bytes)), kit.i64(op.k))
                    scale = kit.splat(kit.load(kit.at(xs, offset), F32))
                    ys = [
                        b.fmul(
                            b.sitofp(kit.load(at_tile(m, n), VI, align=64), VF),
                            b.fmul(scale, weight_scales[n]),
                        )
                        for n in range(nr)
                    ]
                    finish(kit, op, ys, block, b.add(first, m), task, nr)

                kit.each(kit.i64(0), count, done)

            bounds = split(kit, kit.i64(op.blocks // nr), thread, threads)
            panels(kit, nr, most, bounds, rows, body)

        in_tiles = kit.target.tiles and tiles.fits(op)
        few = b.icmp_signed("<=", rows, kit.i64(tiles.FEW_ROWS if in_tiles else shape.few_rows))
        with b.if_else(few) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                if in_tiles:
                    tiles.configure(kit)
                    _linear_in_tiles(kit, op, args, x)
                    tiles.release(kit)
                else:
                    emit(False)


def _linear_in_tiles(kit: Kit, op: Linear, args: tuple[Value, ...], x: Value) -> None:
    """Panels of two blocks. Sums are finished while the next tiles are multiplied: those
    instructions are few, so the processor sees beyond them. Rows of a tile beyond the last one hold
    what memory holds there, and are computed for nothing."""
    context, task, thread, threads = args
    b = kit.b
    rows = row_count(kit, context, task)
    row_bytes = quantized_bytes(op.k, 0)
    w, scales = kit.pointer(task, TASK_ARGS + 2), kit.pointer(task, TASK_ARGS + 3)
    most, nr = tiles.ROWS, tiles.BLOCKS
    tile = kit.scratch(VI, 2 * nr * most)
    steps = op.k // tiles.TILE_BYTES
    # The next panel is asked for while this one is used, a part with each block of rows.
    lines = nr * tiles.STEP // LINE_BYTES  # of each step
    turns = b.sdiv(b.add(rows, kit.i64(most - 1)), kit.i64(most))

    def row_of(first: Value, m: Value) -> Value:
        return kit.at(x, b.mul(b.add(first, m), kit.i64(row_bytes)))

    def side_of(side: Value) -> Value:
        return kit.item(tile, b.mul(side, kit.i64(nr * most)), VI)

    def finish_rows(block: Value, first: Value, bounds: tuple[Value, Value], kept: Value) -> None:
        at = b.mul(block, kit.i64(LANES))
        weight_scales = [
            kit.load(kit.item(scales, b.add(at, kit.i64(n * LANES)), F32), VF) for n in range(nr)
        ]

        def done(m: Value) -> None:
            row = row_of(first, m)
            scale = kit.splat(kit.load(kit.at(row, op.k), F32))
            start = kit.splat(kit.load(kit.at(row, op.k + 4), I32))
            ys = []
            for n in range(nr):
                sums = kit.load(kit.item(kept, b.add(m, kit.i64(n * most)), VI), VI, align=64)
                y = b.sitofp(b.add(sums, start), VF)
                ys.append(b.fmul(y, b.fmul(scale, weight_scales[n])))
            finish(kit, op, ys, block, b.add(first, m), task, nr)

        kit.each(*bounds, done)

    def panel(p: Value, before: list[Value]) -> list[Value]:
        block = b.mul(p, kit.i64(nr))
        weights = kit.at(w, b.mul(block, kit.i64(op.k * LANES)))

        def some(first: Value, before: list[Value]) -> list[Value]:
            earlier_block, earlier, done, side = before
            left = b.sub(rows, first)
            count = b.select(b.icmp_signed("<", left, kit.i64(most)), left, kit.i64(most))
            kit.each(kit.i64(0), count, lambda m: expect(kit, op, block, b.add(first, m), task, nr))
            of_a_step = split(kit, kit.i64(lines), b.sdiv(first, kit.i64(most)), turns)
            other = b.sub(kit.i64(1), side)

            def between(s: Value) -> None:
                following = b.mul(b.add(s, kit.i64(steps)), kit.i64(lines))

                def fetch(line: Value) -> None:
                    at = b.mul(b.add(following, line), kit.i64(LINE_BYTES))
                    kit.prefetch(kit.at(weights, at))

                kit.each(*of_a_step, fetch)
                share = split(kit, done, s, kit.i64(steps))
                finish_rows(earlier_block, earlier, share, side_of(other))

            def product(size: int) -> None:
                xs = row_of(first, kit.i64(0))
                tiles.multiply(kit, size, xs, kit.i64(row_bytes), weights, steps, between)
                tiles.keep(kit, size, side_of(side))

            with b.if_else(b.icmp_signed(">", count, kit.i64(tiles.TILE_ROWS))) as (two, one):
                with two:
                    product(2 * tiles.TILE_ROWS)
                with one:
                    product(tiles.TILE_ROWS)
            return [block, first, count, other]

        return kit.loop(kit.i64(0), rows, most, before, some)

    bounds = split(kit, kit.i64(op.blocks // nr), thread, threads)
    block, first, count, side = kit.loop(*bounds, 1, [kit.i64(0)] * 4, panel)
    finish_rows(block, first, (kit.i64(0), count), side_of(b.sub(kit.i64(1), side)))
