"""In: values of an expression. Out: the functions of the numerics contract on them."""

from __future__ import annotations

import numpy as np

from openlpu.numerics.functions import EXP2_COEFFICIENTS, EXP2_LIMIT, LOG2E, NORM_LEVELS
from openlpu.numerics.quant import R127, TINY
from openlpu.schedule.expression import Accumulator, Expression, Leaf, Node, Operand

MAGNITUDE = 0x7FFFFFFF  # mask of a float32 without its sign
_INF, _NAN = 0x7F800000, 0x7FC00000


def inverse_root(
    e: Expression, sums: list[Accumulator], amax: Leaf, width: int, eps: float
) -> Node:
    """1 / sqrt(mean + eps) from limb sums."""
    parts = [
        e.op("itof", e.op("add", e.op("shl", Leaf(sums[i]), 8), Leaf(sums[i + 1])))
        for i in (0, 2, 4)
    ]
    total = e.op("fadd", e.op("fmul", parts[0], 65536.0), e.op("fmul", parts[1], 512.0))
    mean = e.op("fdiv", e.op("fadd", total, parts[2]), float(width))
    unit = e.op("fdiv", amax, float(NORM_LEVELS))
    square = e.op("fmul", mean, e.op("fmul", unit, unit))
    root = e.op("fsqrt", e.op("fadd", square, float(np.float32(eps))))
    return e.op("fdiv", 1.0, root)


def as_node(e: Expression, value: Operand) -> Node:
    return value if isinstance(value, Node) else e.op("mov", value)


def joined(e: Expression, op: str, values: list[Node]) -> Node:
    """All values by one operation, two by two."""
    while len(values) > 1:
        rest = values[len(values) // 2 * 2 :]
        values = [e.op(op, a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + rest
    return values[0]


def poisoned(e: Expression, amax_bits: Operand) -> Node:
    """A magnitude's bits as float32, NaN where the row holds an infinity or a NaN."""
    return e.op("sel", e.op("le", _INF, amax_bits), _NAN, amax_bits)


def quantization_step(
    e: Expression, amax_bits: Operand, levels: float = 127.0
) -> tuple[Node, Node]:
    """(amax, levels / amax or 0): numerics section 2. The quotient, which takes longest, waits for
    nothing else."""
    usable = e.op("and", e.op("fle", float(TINY), amax_bits), e.op("lt", amax_bits, _INF))
    step = e.op("sel", usable, e.op("fdiv", levels, amax_bits), 0)
    return poisoned(e, amax_bits), step


def quantization_scale(e: Expression, amax: Operand) -> Node:
    return e.op("sel", e.op("flt", amax, float(TINY)), 0, e.op("fmul", amax, float(R127)))


def exp2(e: Expression, t: Operand, *, below_zero: bool = False) -> Node:
    """numerics section 4. below_zero: t is at most 0 or a NaN, so one of the limits is enough."""
    low, high = -float(EXP2_LIMIT), float(EXP2_LIMIT)
    t = e.op("sel", e.op("flt", low, t), t, low)
    if not below_zero:
        t = e.op("sel", e.op("flt", t, high), t, high)
    n = e.op("frint", t)
    f = e.op("fsub", t, n)
    p: Operand = e.op("mov", bits_of(EXP2_COEFFICIENTS[-1]))
    for c in (*(float(c) for c in EXP2_COEFFICIENTS[-2::-1]), 1.0):
        p = e.op("fadd", e.op("fmul", p, f), c)
    power = e.op("shl", e.op("add", e.op("ftoi", n), 127), 23)
    return e.op("fmul", p, power)


def bits_of(value: np.float32) -> int:
    return int(np.float32(value).view(np.int32))


def silu(e: Expression, g: Operand) -> Node:
    """g / (1 + 2^(-g log2 e)); the negation is exact."""
    negative = e.op("xor", g, -(1 << 31))
    below = e.op("fadd", exp2(e, e.op("fmul", negative, float(LOG2E))), 1.0)
    return e.op("fdiv", g, below)
