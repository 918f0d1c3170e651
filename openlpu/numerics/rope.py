"""In: rope frequencies as exact fractions of a turn. Out: float32 cosines and sines, the same on
every machine.

A frequency is a 64-bit fixed-point fraction of a turn per position, computed with the decimal
module at 60 digits. The angle of a position is an exact product modulo 2**64; it is reduced to
one eighth of a turn with integers, and a float64 polynomial in declared order gives sine and
cosine, rounded to float32 last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from openlpu.numerics.quant import F32

_DIGITS = 60
_TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021164194989")
TWO_PI_F64 = 6.283185307179586
# Taylor series: the next terms are below 2**-56 on an eighth of a turn.
_SIN = [(-1.0) ** i / float(math.factorial(2 * i + 1)) for i in range(8)]
_COS = [(-1.0) ** i / float(math.factorial(2 * i)) for i in range(9)]


def base_frequencies(theta: float, dim: int) -> list[Decimal]:
    """theta**(-2i/dim) radians per position for i < dim/2, to 60 digits."""
    with localcontext() as context:
        context.prec = _DIGITS
        log_theta = Decimal(theta).ln()
        return [(-log_theta * (2 * i) / dim).exp() for i in range(dim // 2)]


def turns(frequencies: Sequence[Decimal]) -> NDArray[np.uint64]:
    """Radians per position -> fraction of a turn per position in units of 2**-64."""
    with localcontext() as context:
        context.prec = _DIGITS
        scaled = [int((f / _TWO_PI * 2**64).to_integral_value()) % 2**64 for f in frequencies]
    return np.array(scaled, np.uint64)


def _polynomial(coefficients: list[float], x2: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x2, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x2 + c
    return total


def cos_sin(
    frequency: NDArray[np.uint64], positions: NDArray[np.int64], *, magnitude: float = 1.0
) -> tuple[F32, F32]:
    """Cosine and sine tables float32 [P, F] of positions [P] at frequencies [F].

    magnitude multiplies both in float64 before the last rounding (yarn's attention factor).
    """
    angle = positions.astype(np.uint64)[:, None] * frequency[None, :]  # wraps at a whole turn
    octant = ((angle + np.uint64(1 << 60)) >> np.uint64(61)).astype(np.int64)  # nearest eighth
    residue = (angle - (octant.astype(np.uint64) << np.uint64(61))).view(np.int64)
    x = residue.astype(np.float64) * (TWO_PI_F64 * 2.0**-64)
    x2 = x * x
    sine = _polynomial(_SIN, x2) * x
    cosine = _polynomial(_COS, x2)
    # Odd eighths need a rotation by 45 degrees; even ones only swaps and signs.
    root = np.sqrt(0.5)
    odd = (octant & 1) == 1
    c0 = np.where(odd, (cosine - sine) * root, cosine)
    s0 = np.where(odd, (cosine + sine) * root, sine)
    quarter = (octant >> 1) & 3
    c = np.choose(quarter, [c0, -s0, -c0, s0])
    s = np.choose(quarter, [s0, c0, -s0, -c0])
    return (c * magnitude).astype(np.float32), (s * magnitude).astype(np.float32)


def rotate(x: F32, cosine: F32, sine: F32, *, heads: int) -> F32:
    """Rope on the pairs (i, i + d/2) of each head: [R, heads*d], tables [R, d/2] -> same shape.

    Each output is the rounded sum or difference of two rounded products.
    """
    rows, width = x.shape
    half = width // heads // 2
    halves = x.reshape(rows, heads, 2, half)
    a, b = halves[:, :, 0], halves[:, :, 1]
    c, s = cosine[:, None, :], sine[:, None, :]
    return np.stack([a * c - b * s, b * c + a * s], axis=2).reshape(rows, width)
