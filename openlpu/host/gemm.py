"""In: a Kit. Out: integer matrix kernels: microkernels, and the linears built on them.

A panel is `nr` neighbouring 16-output blocks; its weights stream once from memory. With up to
SINGLE_ROWS rows the panel is wide (four streams hide latency); with more rows, blocks of rows
share each loaded line from registers. Microkernels only add to an int32 tile; the epilogue turns
the tile into float32 and finishes the op, so that integer and float code stay apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from openlpu.host.emit import BLOCK, F32, I32, I64, LANES, PTR, VF, VI, Kit, Value
from openlpu.host.kernels import Linear
from openlpu.host.layout import TASK_ARGS, padded, quantized_bytes
from openlpu.host.rows import own_copy, row_count, split
from openlpu.numerics import GROUP

LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """Register blocking of a target: rows x panel blocks, and the wide panel for few rows."""

    rows: int
    panel: int
    single_rows: int
    single_panel: int


SHAPES = {
    "avx512": Shape(12, 2, 4, 4),
    "avx2": Shape(4, 1, 1, 4),
    "plain": Shape(2, 1, 1, 2),
}
MICRO = ir.FunctionType(ir.VoidType(), [PTR, I64, PTR, I64, PTR])  # x, ldx, w, K/4, tile


def microkernel(kit: Kit, mr: int, nr: int) -> Value:
    """tile[mr][nr*16] += x[mr][K] . w panel: x int8 rows `ldx` bytes apart."""
    name = f"micro_{mr}x{nr}"
    found = kit.defined(name)
    if found is not None:
        return found
    unroll = 4 if mr * nr <= 8 else 1
    with kit.function(name, MICRO, internal=True) as (x, ldx, w, k4, tile):
        b = kit.b
        block_bytes = b.mul(k4, kit.i64(LINE_BYTES))
        streams = [kit.at(w, b.mul(block_bytes, kit.i64(n))) for n in range(nr)]
        rows = [kit.at(x, b.mul(ldx, kit.i64(m))) for m in range(mr)]
        tiles = [kit.item(tile, i * LANES, I32) for i in range(mr * nr)]
        start = [kit.load(t, VI) for t in tiles]

        def body(k: Value, acc: list[Value]) -> list[Value]:
            for u in range(unroll):
                at = b.add(k, kit.i64(u))
                line = b.mul(at, kit.i64(LINE_BYTES))
                blocks = [kit.load(kit.at(s, line), BLOCK) for s in streams]
                for m in range(mr):
                    x4 = kit.load(kit.item(rows[m], at, I32), I32)
                    for n in range(nr):
                        acc[m * nr + n] = kit.dot4(acc[m * nr + n], blocks[n], x4)
            return acc

        for t, value in zip(tiles, kit.loop(kit.i64(0), k4, unroll, start, body), strict=True):
            kit.store(value, t)
    return kit.module.globals[name]


def micro_any(kit: Kit, nr: int, most: int) -> Value:
    """Dispatch on the number of rows: a function (m, x, ldx, w, K/4, tile) for m in 1..most."""
    name = f"micro_upto{most}x{nr}"
    found = kit.defined(name)
    if found is not None:
        return found
    kernels = [microkernel(kit, m, nr) for m in range(1, most + 1)]
    kind = ir.FunctionType(ir.VoidType(), [I64, *MICRO.args])
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


def _finish(
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


def _panels(
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
    if op.group:
        _grouped(kit, name, op)
        return
    shape = SHAPES[kit.target.name]
    variants = {
        True: (shape.single_panel, shape.single_rows),
        False: (max(shape.panel, 2 if op.epilogue == "swiglu" else 1), shape.rows),
    }
    micro = {few: micro_any(kit, nr, most) for few, (nr, most) in variants.items()}
    with kit.function(name) as (context, task, thread, threads):
        b = kit.b
        rows = row_count(kit, context, task)
        row_bytes = quantized_bytes(op.k, 0)
        x = own_copy(kit, kit.pointer(task, TASK_ARGS + 1), rows, thread, row_bytes)
        w, scales = kit.pointer(task, TASK_ARGS + 2), kit.pointer(task, TASK_ARGS + 3)
        tile = kit.scratch(VI, max(nr * most for nr, most in variants.values()))

        def emit(few: bool) -> None:
            nr, most = variants[few]

            def body(block: Value, first: Value, count: Value) -> None:
                xs = kit.at(x, b.mul(first, kit.i64(row_bytes)))

                def start(m: Value) -> None:
                    at = kit.at(xs, b.add(b.mul(m, kit.i64(row_bytes)), kit.i64(op.k + 4)))
                    value = kit.splat(kit.load(at, I32))
                    for n in range(nr):
                        kit.store(value, _tile(kit, tile, m, n, nr), align=64)

                kit.each(kit.i64(0), count, start)
                panel = kit.at(w, b.mul(block, kit.i64(op.k * LANES)))
                b.call(
                    micro[few],
                    [count, xs, kit.i64(row_bytes), panel, kit.i64(op.k // 4), tile],
                )
                at = b.mul(block, kit.i64(LANES))
                weight_scales = [
                    kit.load(kit.item(scales, b.add(at, kit.i64(n * LANES)), F32), VF)
                    for n in range(nr)
                ]

                def finish(m: Value) -> None:
                    offset = b.add(b.mul(m, kit.i64(row_bytes)), kit.i64(op.k))
                    scale = kit.splat(kit.load(kit.at(xs, offset), F32))
                    ys = [
                        b.fmul(
                            b.sitofp(kit.load(_tile(kit, tile, m, n, nr), VI, align=64), VF),
                            b.fmul(scale, weight_scales[n]),
                        )
                        for n in range(nr)
                    ]
                    _finish(kit, op, ys, block, b.add(first, m), task, nr)

                kit.each(kit.i64(0), count, finish)

            bounds = split(kit, kit.i64(op.blocks // nr), thread, threads)
            _panels(kit, nr, most, bounds, rows, body)

        few = b.icmp_signed("<=", rows, kit.i64(shape.single_rows))
        with b.if_else(few) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                emit(False)


def _tile(kit: Kit, tile: Value, m: Value, n: int, nr: int) -> Value:
    return kit.item(tile, kit.b.add(kit.b.mul(m, kit.i64(nr)), kit.i64(n)), VI)


GROUPED_ROWS, GROUPED_PANEL = 4, 2


def _grouped(kit: Kit, name: str, op: Linear) -> None:
    """Grouped weights: exact int32 inside a group, float32 across groups in order of k.

    args: out, x, weights, scales [N/16][K/32][16], bias, residual, minima (laid out as scales).
    """
    groups = op.k // GROUP
    row_bytes = quantized_bytes(op.k, GROUP)
    lines = GROUP // 4
    unroll = lines if kit.target.name == "avx512" else 1
    with kit.function(name) as (context, task, thread, threads):
        b = kit.b
        rows = row_count(kit, context, task)
        x = own_copy(kit, kit.pointer(task, TASK_ARGS + 1), rows, thread, row_bytes)
        w, scales = kit.pointer(task, TASK_ARGS + 2), kit.pointer(task, TASK_ARGS + 3)
        minima = kit.pointer(task, TASK_ARGS + 6)

        def tile(block: Value, first: Value, mr: int) -> None:
            nr = GROUPED_PANEL
            at_row = [
                kit.at(x, b.mul(b.add(first, kit.i64(m)), kit.i64(row_bytes))) for m in range(mr)
            ]
            stream = [
                kit.at(w, b.mul(b.add(block, kit.i64(n)), kit.i64(op.k * LANES))) for n in range(nr)
            ]

            def body(g: Value, ys: list[Value]) -> list[Value]:
                scale, total = [], []
                for m in range(mr):
                    at = b.add(kit.i64(op.k), b.mul(g, kit.i64(4)))
                    scale.append(kit.splat(kit.load(kit.at(at_row[m], at), F32)))
                    at = b.add(at, kit.i64(4 * groups))
                    total.append(kit.load(kit.at(at_row[m], at), I32))
                start = [b.mul(t, kit.i32(-128)) if kit.biased else kit.i32(0) for t in total]
                first_acc = [kit.splat(start[m]) for m in range(mr) for _ in range(nr)]

                def line(k: Value, acc: list[Value]) -> list[Value]:
                    for u in range(unroll):
                        at = b.add(k, kit.i64(u))
                        here = b.add(b.mul(g, kit.i64(lines)), at)
                        blocks = [
                            kit.load(kit.at(s, b.mul(here, kit.i64(LINE_BYTES))), BLOCK)
                            for s in stream
                        ]
                        for m in range(mr):
                            x4 = kit.load(kit.item(at_row[m], here, I32), I32)
                            for n in range(nr):
                                i = m * nr + n
                                acc[i] = kit.dot4(acc[i], blocks[n], x4)
                    return acc

                acc = kit.loop(kit.i64(0), kit.i64(lines), unroll, first_acc, line)
                for n in range(nr):
                    at = b.add(b.mul(b.add(block, kit.i64(n)), kit.i64(groups)), g)
                    at = b.mul(at, kit.i64(LANES))
                    ws = kit.load(kit.item(scales, at, F32), VF)
                    wm = kit.load(kit.item(minima, at, F32), VF) if op.minimum else None
                    for m in range(mr):
                        i = m * nr + n
                        dot = b.sitofp(acc[i], VF)
                        ys[i] = b.fadd(ys[i], b.fmul(dot, b.fmul(scale[m], ws)))
                        if wm is not None:
                            whole = kit.splat(b.sitofp(total[m], F32))
                            ys[i] = b.fadd(ys[i], b.fmul(whole, b.fmul(scale[m], wm)))
                return ys

            ys = kit.loop(kit.i64(0), kit.i64(groups), 1, [kit.vf(0.0)] * (mr * nr), body)
            for m in range(mr):
                row = b.add(first, kit.i64(m))
                _finish(kit, op, ys[m * nr : (m + 1) * nr], block, row, task, nr)

        def panel(p: Value) -> None:
            block = b.mul(p, kit.i64(GROUPED_PANEL))
            full = b.sub(rows, b.srem(rows, kit.i64(GROUPED_ROWS)))
            kit.each(kit.i64(0), full, lambda r: tile(block, r, GROUPED_ROWS), step=GROUPED_ROWS)
            kit.each(full, rows, lambda r: tile(block, r, 1))

        bounds = split(kit, kit.i64(op.blocks // GROUPED_PANEL), thread, threads)
        kit.each(*bounds, panel)
