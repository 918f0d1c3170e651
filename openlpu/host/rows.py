"""In: a Kit. Out: kernels that work on single rows: embedding, norms, quantizing, elementwise.

Each kernel takes its rows by static split: rows [R*t/T, R*(t+1)/T), or all of them into the
thread's own copy when the result is a quantized value and the step has few rows.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from openlpu.host.emit import F32, I16, I32, LANES, VB, VF, VI, Kit, Value
from openlpu.host.layout import (
    BIAS,
    FEW_ROWS,
    TASK_ARGS,
    TASK_WANTED,
    Context,
    padded,
    quantized_bytes,
)
from openlpu.numerics import GROUP
from openlpu.numerics.functions import NORM_LEVELS
from openlpu.numerics.quant import R127, TINY

_INF_BITS = 0x7F800000
_NAN = float("nan")


def row_count(kit: Kit, context: Value, task: Value) -> Value:
    """Rows of this task: R, or L for values over the wanted rows."""
    wanted = kit.b.icmp_signed("!=", kit.field(task, TASK_WANTED), kit.i64(0))
    return kit.select(
        wanted, kit.field(context, Context.WANTED_ROWS), kit.field(context, Context.ROWS)
    )


def split(kit: Kit, count: Value, thread: Value, threads: Value) -> tuple[Value, Value]:
    """The thread's share of `count` units: [count*t/T, count*(t+1)/T)."""
    b = kit.b
    start = b.sdiv(b.mul(count, thread), threads)
    stop = b.sdiv(b.mul(count, b.add(thread, kit.i64(1))), threads)
    return start, stop


def columns(kit: Kit, width: int, body: Callable[[Value], None]) -> None:
    """body(column) for each block of 16 columns."""
    kit.each(kit.i64(0), kit.i64(width), body, step=LANES)


def row_magnitude(kit: Kit, x: Value, width: int) -> Value:
    """Largest magnitude of a row, as bits (i32)."""

    def body(i: Value, carried: list[Value]) -> list[Value]:
        v = kit.load(kit.item(x, i, F32), VF)
        return [kit.umax(carried[0], kit.magnitude_bits(v))]

    (top,) = kit.loop(kit.i64(0), kit.i64(width), LANES, [kit.vi(0)], body)
    return kit.reduce_umax(top)


def step_and_scale(kit: Kit, amax_bits: Value, levels: int) -> tuple[Value, Value, Value]:
    """(levels / amax or 0, amax or NaN, mask that is 0 for a poisoned row else -1), scalars."""
    b = kit.b
    poisoned = b.icmp_unsigned(">=", amax_bits, kit.i32(_INF_BITS))
    amax = b.select(poisoned, kit.f32(_NAN), kit.bits(amax_bits, F32))
    usable = b.fcmp_ordered(">=", amax, kit.f32(float(TINY)))
    safe = b.select(usable, amax, kit.f32(1.0))
    step = b.select(usable, b.fdiv(kit.f32(levels), safe), kit.f32(0.0))
    return step, amax, b.select(poisoned, kit.i32(0), kit.i32(-1))


def quant_scale(kit: Kit, amax: Value) -> Value:
    """amax * fl(1/127), 0 for a tiny row, NaN for a poisoned one."""
    b = kit.b
    tiny = b.fcmp_ordered("<", amax, kit.f32(float(TINY)))
    return b.select(tiny, kit.f32(0.0), b.fmul(amax, kit.f32(float(R127))))


def quantize_span(kit: Kit, x: Value, out: Value, start: Value, width: int) -> tuple[Value, Value]:
    """Quantize columns [start, start+width) of x into int8 at out; returns (scale, sum of q)."""
    b = kit.b
    base = kit.item(x, start, F32)
    into = kit.at(out, start)

    bits = row_magnitude(kit, base, width)
    step, amax, keep = step_and_scale(kit, bits, 127)
    steps, mask = kit.splat(step), kit.splat(keep)

    def body(i: Value, carried: list[Value]) -> list[Value]:
        v = kit.load(kit.item(base, i, F32), VF)
        q = b.and_(kit.rne(b.fmul(v, steps)), mask)
        kit.store(b.trunc(q, VB), kit.at(into, i))
        return [b.add(carried[0], q)]

    (total,) = kit.loop(kit.i64(0), kit.i64(width), LANES, [kit.vi(0)], body)
    return quant_scale(kit, amax), kit.reduce_add(total)


def correction(kit: Kit, total: Value) -> Value:
    """Initial accumulator that cancels dot4's bias for a row with this sum."""
    return kit.b.mul(total, kit.i32(-128)) if kit.biased else kit.i32(0)


def quantize_row(kit: Kit, x: Value, out: Value, width: int, group: int) -> None:
    """Quantize one row into the layout of layout.quantized_bytes."""
    b = kit.b
    count = width // group if group else 1
    scales = kit.at(out, width)
    corrections = kit.at(out, width + 4 * count)

    def span(g: Value, size: int) -> None:
        start = b.mul(g, kit.i64(size))
        scale, total = quantize_span(kit, x, out, start, size)
        kit.store(scale, kit.item(scales, g, F32))
        # Formats with minima need the plain sum: blocked rows keep it, dot4 shifts it there.
        kept = total if group else correction(kit, total)
        kit.store(kept, kit.item(corrections, g, I32))

    if group:
        kit.each(kit.i64(0), kit.i64(count), lambda g: span(g, group))
    else:
        span(kit.i64(0), width)


def rms_inverse(kit: Kit, x: Value, width: int, eps: float) -> Value:
    """numerics.functions.rms_inverse of one row (or head), a scalar."""
    b = kit.b
    step, amax, keep = step_and_scale(kit, row_magnitude(kit, x, width), NORM_LEVELS)
    steps, mask = kit.splat(step), kit.splat(keep)

    def body(i: Value, sums: list[Value]) -> list[Value]:
        v = b.and_(kit.rne(b.fmul(kit.load(kit.item(x, i, F32), VF), steps)), mask)
        hi = b.ashr(b.add(v, kit.vi(128)), kit.vi(8))
        lo = b.sub(v, b.shl(hi, kit.vi(8)))
        pairs = ((hi, hi), (hi, lo), (lo, lo))
        return [b.add(s, b.mul(p, q)) for s, (p, q) in zip(sums, pairs, strict=True)]

    sums = kit.loop(kit.i64(0), kit.i64(width), LANES, [kit.vi(0)] * 3, body)
    p, q, r = (b.sitofp(kit.reduce_add(s), F32) for s in sums)
    total = b.fadd(b.fadd(b.fmul(p, kit.f32(65536.0)), b.fmul(q, kit.f32(512.0))), r)
    mean = b.fdiv(total, kit.f32(width))
    u = b.fdiv(amax, kit.f32(NORM_LEVELS))
    square = b.fadd(b.fmul(mean, b.fmul(u, u)), kit.f32(eps))
    inverse = b.fdiv(kit.f32(1.0), kit.intrinsic("llvm.sqrt.f32", F32, [square]))
    poisoned = b.fcmp_unordered("uno", amax, amax)
    return b.select(poisoned, kit.f32(_NAN), inverse)


def normalize(kit: Kit, x: Value, out: Value, gain: Value | None, width: int, eps: float) -> None:
    """out = (x * rms_inverse(x)) (* gain) for one row or head of `width`."""
    inverse = kit.splat(rms_inverse(kit, x, width, eps))

    def body(i: Value) -> None:
        y = kit.b.fmul(kit.load(kit.item(x, i, F32), VF), inverse)
        if gain is not None:
            y = kit.b.fmul(y, kit.load(kit.item(gain, i, F32), VF))
        kit.store(y, kit.item(out, i, F32))

    columns(kit, width, body)


def my_rows(kit: Kit, args: tuple[Value, ...], body: Callable[[Value], None]) -> None:
    """body(row) over the thread's share of the rows."""
    context, task, thread, threads = args
    start, stop = split(kit, row_count(kit, context, task), thread, threads)
    kit.each(start, stop, body)


def my_quantized_rows(
    kit: Kit, args: tuple[Value, ...], row_bytes: int, body: Callable[[Value, Value], None]
) -> None:
    """body(row, address of its quantized form) over the rows this thread quantizes."""
    context, task, thread, threads = args
    b = kit.b
    rows = row_count(kit, context, task)
    start, stop = split(kit, rows, thread, threads)
    few = b.icmp_signed("<=", rows, kit.i64(FEW_ROWS))
    start = b.select(few, kit.i64(0), start)
    stop = b.select(few, rows, stop)
    base = own_copy(kit, kit.pointer(task, TASK_ARGS), rows, thread, row_bytes)
    kit.each(start, stop, lambda r: body(r, kit.at(base, b.mul(r, kit.i64(row_bytes)))))


def own_copy(kit: Kit, base: Value, rows: Value, thread: Value, row_bytes: int) -> Value:
    """Start of the quantized rows this thread reads and writes."""
    few = kit.b.icmp_signed("<=", rows, kit.i64(FEW_ROWS))
    copy = kit.b.select(few, thread, kit.i64(0))
    return kit.at(base, kit.b.mul(copy, kit.i64(FEW_ROWS * row_bytes)))


def _row(kit: Kit, base: Value, row: Value, width: int) -> Value:
    return kit.item(base, kit.b.mul(row, kit.i64(padded(width))), F32)


# Kernel builders: each defines function `name` and lists its task arguments after TASK_ARGS.


def quant(kit: Kit, name: str, width: int, *, group: int, hadamard: bool) -> None:
    """args: out, x."""
    with kit.function(name) as args:
        x = kit.pointer(args[1], TASK_ARGS + 1)
        turned = kit.scratch(F32, width) if hadamard else None

        def body(r: Value, out: Value) -> None:
            row = _row(kit, x, r, width)
            if turned is not None:

                def block(i: Value) -> None:
                    y = kit.hadamard16(kit.load(kit.item(row, i, F32), VF))
                    kit.store(y, kit.item(turned, i, F32))

                columns(kit, width, block)
            quantize_row(kit, row if turned is None else turned, out, width, group)

        my_quantized_rows(kit, args, quantized_bytes(width, group), body)


def rmsnorm_quant(kit: Kit, name: str, width: int, *, group: int, eps: float, gain: bool) -> None:
    """args: out, x, gain."""
    with kit.function(name) as args:
        x = kit.pointer(args[1], TASK_ARGS + 1)
        weight = kit.pointer(args[1], TASK_ARGS + 2) if gain else None
        normal = kit.scratch(F32, width)

        def body(r: Value, out: Value) -> None:
            normalize(kit, _row(kit, x, r, width), normal, weight, width, eps)
            quantize_row(kit, normal, out, width, group)

        my_quantized_rows(kit, args, quantized_bytes(width, group), body)


def rmsnorm(kit: Kit, name: str, width: int, *, heads: int, eps: float, gain: bool) -> None:
    """args: out, x, gain."""
    with kit.function(name) as args:
        out, x = kit.pointer(args[1], TASK_ARGS), kit.pointer(args[1], TASK_ARGS + 1)
        weight = kit.pointer(args[1], TASK_ARGS + 2) if gain else None
        dim = width // heads

        def body(r: Value) -> None:
            source, into = _row(kit, x, r, width), _row(kit, out, r, width)
            kit.each(
                kit.i64(0),
                kit.i64(width),
                lambda c: normalize(
                    kit, kit.item(source, c, F32), kit.item(into, c, F32), weight, dim, eps
                ),
                step=dim,
            )

        my_rows(kit, args, body)


def elementwise(kit: Kit, name: str, width: int, kind: str) -> None:
    """add or swiglu of two matrices. args: out, a, b."""
    with kit.function(name) as args:
        out, x, y = (kit.pointer(args[1], TASK_ARGS + i) for i in range(3))

        def body(r: Value) -> None:
            rows = [_row(kit, p, r, width) for p in (out, x, y)]

            def block(i: Value) -> None:
                a, c = (kit.load(kit.item(p, i, F32), VF) for p in rows[1:])
                z = kit.b.fadd(a, c) if kind == "add" else kit.b.fmul(kit.silu(a), c)
                kit.store(z, kit.item(rows[0], i, F32))

            columns(kit, width, block)

        my_rows(kit, args, body)


def slice_columns(kit: Kit, name: str, source_width: int, start: int, width: int) -> None:
    """args: out, x."""
    with kit.function(name) as args:
        out, x = (kit.pointer(args[1], TASK_ARGS + i) for i in range(2))

        def body(r: Value) -> None:
            source, into = _row(kit, x, r, source_width), _row(kit, out, r, width)
            columns(
                kit,
                width,
                lambda i: kit.store(
                    kit.load(kit.item(source, kit.b.add(i, kit.i64(start)), F32), VF),
                    kit.item(into, i, F32),
                ),
            )

        my_rows(kit, args, body)


def gather_rows(kit: Kit, name: str, width: int) -> None:
    """The wanted rows of a matrix over R. args: out, x."""
    with kit.function(name) as args:
        out, x = (kit.pointer(args[1], TASK_ARGS + i) for i in range(2))
        wanted = kit.pointer(args[0], Context.WANTED)

        def body(r: Value) -> None:
            index = kit.b.sext(kit.load(kit.item(wanted, r, I32), I32), ir.IntType(64))
            source, into = _row(kit, x, index, width), _row(kit, out, r, width)
            columns(
                kit,
                width,
                lambda i: kit.store(kit.load(kit.item(source, i, F32), VF), kit.item(into, i, F32)),
            )

        my_rows(kit, args, body)


def embed(kit: Kit, name: str, width: int, *, block_format: str) -> None:
    """Dequantized table rows. args: out, table [V][...], scales, minima."""
    with kit.function(name) as args:
        out, table, scales, minima = (kit.pointer(args[1], TASK_ARGS + i) for i in range(4))
        tokens = kit.pointer(args[0], Context.TOKENS)
        groups = width // GROUP
        nibbles = block_format in BIAS
        b = kit.b

        def half(pointer: Value, at: Value) -> Value:
            bits = b.zext(kit.load(kit.item(pointer, at, I16), I16), I32)
            return kit.splat(kit.widened(bits))

        def values(source: Value, i: Value) -> Value:
            if not nibbles:
                return b.sext(kit.load(kit.at(source, i), VB), VI)
            line = b.zext(
                kit.load(kit.at(source, b.mul(b.sdiv(i, kit.i64(GROUP)), kit.i64(16))), VB), VI
            )
            is_high = b.icmp_signed("!=", b.srem(i, kit.i64(GROUP)), kit.i64(0))
            shift = kit.splat(b.select(is_high, kit.i32(4), kit.i32(0)))
            value = b.and_(b.lshr(line, shift), kit.vi(15))
            return b.sub(value, kit.vi(BIAS[block_format]))

        def body(r: Value) -> None:
            token = b.sext(kit.load(kit.item(tokens, r, I32), I32), ir.IntType(64))
            source = kit.at(table, b.mul(token, kit.i64(width // 2 if nibbles else width)))
            into = _row(kit, out, r, width)

            def block(i: Value) -> None:
                y = b.sitofp(values(source, i), VF)
                if block_format == "w8":
                    y = b.fmul(y, kit.splat(kit.load(kit.item(scales, token, F32), F32)))
                else:
                    at = b.add(b.mul(token, kit.i64(groups)), b.sdiv(i, kit.i64(GROUP)))
                    y = b.fmul(y, half(scales, at))
                    if block_format == "q4_1":
                        y = b.fadd(y, half(minima, at))
                kit.store(y, kit.item(into, i, F32))

            columns(kit, width, block)

        my_rows(kit, args, body)
