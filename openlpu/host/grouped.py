"""In: a Kit. Out: linears over grouped weights, bytes or nibbles, with their scales as halves.

Exact int32 inside a group of 32, float32 across groups in order of k: a row's sums of one block of
16 outputs stay in registers from the first group to the last. Weights stream once; a line of
nibbles is taken apart in registers, its low halves being the group's first 16 values of k.
"""

from __future__ import annotations

from llvmlite import ir

from openlpu.host import tiles
from openlpu.host.emit import BLOCK, F32, I8, I32, I64, LANES, PTR, VF, VI, Kit, Value
from openlpu.host.gemm import SHAPES, ahead, dispatch, finish, panels
from openlpu.host.kernels import Linear
from openlpu.host.layout import BIAS, TASK_ARGS, group_bytes, quantized_bytes
from openlpu.host.rows import own_copy, row_count, split
from openlpu.numerics import GROUP

QUADS = GROUP // 4  # lines of a group in bytes; nibbles are half as many
LINE_BYTES = 64
ROWS = {"avx512": 12, "avx2": 4, "neon": 4, "rvv": 2, "plain": 2}
FEW = 16  # rows up to which vectors are as fast as tiles
CHAINS_ROWS = 4  # up to so many rows, a row's sum is split in two, which do not wait for each other
# x, ldx, weights, scales, minima, groups, tile float32 [rows][16]
MICRO = ir.FunctionType(ir.VoidType(), [PTR, I64, PTR, PTR, PTR, I64, PTR])


def _bytes(kit: Kit, weights: Value, block_format: str) -> list[Value]:
    """The group's QUADS lines in order of k: bytes of value + 128, or of value + BIAS."""
    if block_format == "q8_0":
        return [kit.load(kit.at(weights, j * LINE_BYTES), BLOCK) for j in range(QUADS)]
    b = kit.b
    low, high = [], []
    for j in range(QUADS // 2):
        line = kit.load(kit.at(weights, j * LINE_BYTES), BLOCK)
        words = ir.VectorType(ir.IntType(16), 32)
        four = ir.Constant(words, [4] * 32)
        shifted = kit.bits(b.lshr(kit.bits(line, words), four), BLOCK)
        low.append(b.and_(line, ir.Constant(BLOCK, [15] * 64)))
        high.append(b.and_(shifted, ir.Constant(BLOCK, [15] * 64)))
    return low + high


def _lines(kit: Kit, weights: Value, block_format: str) -> list[Value]:
    """The group's lines for dot4: as they are, where it takes any bias, or of value + 128."""
    lines = _bytes(kit, weights, block_format)
    if kit.biased or block_format == "q8_0":
        return lines
    return [kit.b.add(line, _all(-128 - BIAS[block_format])) for line in lines]


def _all(byte: int) -> Value:
    return ir.Constant(BLOCK, [byte] * 64)


def microkernel(kit: Kit, mr: int, block_format: str) -> Value:
    """tile[mr][16] = x[mr][K] . one block of weights."""
    name = f"grouped_{mr}_{block_format}"
    found = kit.defined(name)
    if found is not None:
        return found
    size = group_bytes(block_format)
    bias = 128 if block_format == "q8_0" else BIAS[block_format]
    with kit.function(name, MICRO, internal=True) as (x, ldx, w, scales, minima, groups, tile):
        b = kit.b
        rows = [kit.at(x, b.mul(ldx, kit.i64(m))) for m in range(mr)]
        row_scales = [kit.at(row, b.mul(groups, kit.i64(GROUP))) for row in rows]
        row_totals = [kit.at(row, b.mul(groups, kit.i64(4))) for row in row_scales]
        further = ahead(kit, mr, b.mul(groups, kit.i64(size)))

        def body(g: Value, ys: list[Value]) -> list[Value]:
            here = kit.at(w, b.mul(g, kit.i64(size)))
            for at in range(0, size if further is not None else 0, LINE_BYTES):
                kit.prefetch(kit.at(here, b.add(further, kit.i64(at))))
            lines = _lines(kit, here, block_format)
            totals = [kit.load(kit.item(t, g, I32), I32) for t in row_totals]
            sums = []
            split_k = 2 * mr <= SHAPES[kit.target.vectors].sums and mr <= CHAINS_ROWS
            for m in range(mr):
                start = b.mul(totals[m], kit.i32(-bias)) if kit.biased and bias else kit.i32(0)
                chains = [kit.splat(start), *([kit.vi(0)] if split_k else [])]
                sums.append(chains)
            for j, line in enumerate(lines):
                for m in range(mr):
                    x4 = kit.load(
                        kit.item(rows[m], b.add(b.mul(g, kit.i64(QUADS)), kit.i64(j)), I32), I32
                    )
                    chains = sums[m]
                    chain = j % len(chains)
                    chains[chain] = kit.dot4(chains[chain], line, x4)
            at = b.mul(g, kit.i64(2 * LANES))
            scale = kit.halves(kit.at(scales, at))
            minimum = kit.halves(kit.at(minima, at)) if block_format == "q4_1" else None
            found = []
            for m in range(mr):
                dot = sums[m][0] if len(sums[m]) == 1 else b.add(*sums[m])
                row_scale = kit.splat(kit.load(kit.item(row_scales[m], g, F32), F32))
                y = b.fadd(ys[m], b.fmul(b.sitofp(dot, VF), b.fmul(row_scale, scale)))
                if minimum is not None:
                    total = kit.splat(b.sitofp(totals[m], F32))
                    y = b.fadd(y, b.fmul(total, b.fmul(row_scale, minimum)))
                found.append(y)
            return found

        ys = kit.loop(kit.i64(0), groups, 1, [kit.vf(0.0)] * mr, body)
        for m, y in enumerate(ys):
            kit.store(y, kit.item(tile, m * LANES, F32), align=LINE_BYTES)
    return kit.module.globals[name]


def linear(kit: Kit, name: str, op: Linear) -> None:
    """args: out, x, weights, scales half [N/16][K/32][16], bias, residual, minima as scales."""
    most = ROWS[kit.target.vectors]
    groups = op.k // GROUP
    row_bytes = quantized_bytes(op.k, GROUP)
    nr = 2 if op.epilogue == "swiglu" else 1  # gate and up stand in neighbouring blocks
    micro = dispatch(
        kit, f"grouped_any_{op.format}", [microkernel(kit, m + 1, op.format) for m in range(most)]
    )
    with kit.function(name) as args:
        context, task, thread, threads = args
        b = kit.b
        rows = row_count(kit, context, task)
        x = own_copy(kit, kit.pointer(task, TASK_ARGS + 1), rows, thread, row_bytes)
        w, scales, minima = (kit.pointer(task, TASK_ARGS + i) for i in (2, 3, 6))

        def on_vectors() -> None:
            tile = kit.scratch(VF, nr * most)

            def body(block: Value, first: Value, count: Value) -> None:
                xs = kit.at(x, b.mul(first, kit.i64(row_bytes)))
                for n in range(nr):
                    at = b.mul(b.add(block, kit.i64(n)), kit.i64(groups))
                    weights = kit.at(w, b.mul(at, kit.i64(group_bytes(op.format))))
                    halves = [kit.at(p, b.mul(at, kit.i64(2 * LANES))) for p in (scales, minima)]
                    into = kit.item(tile, n * most, VF)
                    b.call(
                        micro,
                        [count, xs, kit.i64(row_bytes), weights, *halves, kit.i64(groups), into],
                    )

                def done(m: Value) -> None:
                    ys = [
                        kit.load(
                            kit.item(tile, b.add(m, kit.i64(n * most)), VF), VF, align=LINE_BYTES
                        )
                        for n in range(nr)
                    ]
                    finish(kit, op, ys, block, b.add(first, m), task, nr)

                kit.each(kit.i64(0), count, done)

            bounds = split(kit, kit.i64(op.blocks // nr), thread, threads)
            panels(kit, nr, most, bounds, rows, body)

        if not kit.target.tiles:
            on_vectors()
            return
        with b.if_else(b.icmp_signed(">", rows, kit.i64(FEW))) as (many, few):
            with many:
                tiles.configure(kit, GROUP)
                _linear_in_tiles(kit, op, args, x, (w, scales, minima))
                tiles.release(kit)
            with few:
                on_vectors()


def _linear_in_tiles(
    kit: Kit, op: Linear, args: tuple[Value, ...], x: Value, parts: tuple[Value, ...]
) -> None:
    """A block's weights are taken apart once for all rows; then a tile makes a group's sums of 16
    rows at once, which vectors scale and add. Rows of a tile beyond the last one hold what memory
    holds there, and are computed for nothing."""
    context, task, thread, threads = args
    w, scales, minima = parts
    b = kit.b
    rows = row_count(kit, context, task)
    groups, most = op.k // GROUP, tiles.TILE_ROWS
    row_bytes = quantized_bytes(op.k, GROUP)
    nr = 2 if op.epilogue == "swiglu" else 1  # gate and up stand in neighbouring blocks
    size, unpacked_bytes = group_bytes(op.format), QUADS * LINE_BYTES
    unpacked = kit.scratch(I8, nr * groups * unpacked_bytes)
    dots = kit.scratch(VI, most)
    tile = kit.scratch(VF, nr * most)

    def signed(lines: list[Value]) -> list[Value]:
        bias = 128 if op.format == "q8_0" else BIAS[op.format]
        return [b.sub(line, _all(bias)) for line in lines]

    def group_sums(x: Value, lines: Value, halves: list[Value]) -> list[Value]:
        """The tile's rows of one block, float32, over all groups."""

        def body(g: Value, ys: list[Value]) -> list[Value]:
            group = kit.at(lines, b.mul(g, kit.i64(unpacked_bytes)))
            tiles.multiply_group(kit, kit.at(x, b.mul(g, kit.i64(GROUP))), row_bytes, group, dots)
            at = b.mul(g, kit.i64(2 * LANES))
            scale = kit.halves(kit.at(halves[0], at))
            minimum = kit.halves(kit.at(halves[1], at)) if op.format == "q4_1" else None
            found = []
            for m, y in enumerate(ys):
                row = kit.item(kit.at(x, m * row_bytes + op.k), g, F32)
                row_scale = kit.splat(kit.load(row, F32))
                dot = b.sitofp(kit.load(kit.item(dots, m, VI), VI, align=LINE_BYTES), VF)
                y = b.fadd(y, b.fmul(dot, b.fmul(row_scale, scale)))
                if minimum is not None:
                    total = b.sitofp(kit.splat(kit.load(kit.at(row, 4 * groups), I32)), VF)
                    y = b.fadd(y, b.fmul(total, b.fmul(row_scale, minimum)))
                found.append(y)
            return found

        return kit.loop(kit.i64(0), kit.i64(groups), 1, [kit.vf(0.0)] * most, body)

    def panel(p: Value) -> None:
        block = b.mul(p, kit.i64(nr))
        first_group = b.mul(block, kit.i64(groups))
        here = kit.at(w, b.mul(first_group, kit.i64(size)))

        def unpack(g: Value) -> None:
            lines = _bytes(kit, kit.at(here, b.mul(g, kit.i64(size))), op.format)
            into = kit.at(unpacked, b.mul(g, kit.i64(unpacked_bytes)))
            for j, line in enumerate(signed(lines)):
                kit.store(line, kit.at(into, j * LINE_BYTES), align=LINE_BYTES)

        kit.each(kit.i64(0), kit.i64(nr * groups), unpack)

        def some(first: Value) -> None:
            xs = kit.at(x, b.mul(first, kit.i64(row_bytes)))
            for n in range(nr):
                at = b.mul(b.add(first_group, kit.i64(n * groups)), kit.i64(2 * LANES))
                halves = [kit.at(pointer, at) for pointer in (scales, minima)]
                lines = kit.at(unpacked, n * groups * unpacked_bytes)
                for m, y in enumerate(group_sums(xs, lines, halves)):
                    kit.store(y, kit.item(tile, n * most + m, VF), align=LINE_BYTES)
            left = b.sub(rows, first)
            count = b.select(b.icmp_signed("<", left, kit.i64(most)), left, kit.i64(most))

            def done(m: Value) -> None:
                ys = [
                    kit.load(kit.item(tile, b.add(m, kit.i64(n * most)), VF), VF, align=LINE_BYTES)
                    for n in range(nr)
                ]
                finish(kit, op, ys, block, b.add(first, m), task, nr)

            kit.each(kit.i64(0), count, done)

        kit.each(kit.i64(0), rows, some, step=most)

    kit.each(*split(kit, kit.i64(op.blocks // nr), thread, threads), panel)
