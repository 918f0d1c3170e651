"""In: float64 weights. Out: the same weights turned by fixed orthogonal matrices, bit-reproducibly.

The matrix of order n is D H / sqrt(n): D holds fixed signs, H is a Kronecker product of Sylvester
(powers of two) and Paley matrices (12, 20, 28). Where n has no such product, H is block-diagonal
with the largest blocks that do. Everything is float64 additions in a fixed order: no BLAS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from openlpu.numerics import SUPERLANE

F64 = NDArray[np.float64]
Matrix = tuple[tuple[int, ...], ...]

SIGN_SEED = 1
_CACHED_VALUES = 1 << 16  # two arrays of 512 KiB


def _paley(order: int) -> Matrix:
    """Hadamard matrix of order p + 1 for a prime p = 3 mod 4 (Paley's first construction),
    or of order 2(p + 1) for a prime p = 1 mod 4 (the second), with entries +1 and -1."""
    p = order - 1
    if order == 28:
        p = 13
    squares = {x * x % p for x in range(1, p)}
    chi = [0] + [1 if x in squares else -1 for x in range(1, p)]
    core = [[chi[(i - j) % p] for j in range(p)] for i in range(p)]
    if order == p + 1:
        skew = [[1] * order] + [[-1, *row] for row in core]
        for i in range(1, order):
            skew[i][i] = 1
        return tuple(tuple(row) for row in skew)
    bordered = [[0] + [1] * p] + [[1, *row] for row in core]
    plus, zero = [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
    rows = [[0] * order for _ in range(order)]
    for i, row in enumerate(bordered):
        for j, value in enumerate(row):
            for a in range(2):
                for b in range(2):
                    rows[2 * i + a][2 * j + b] = value * plus[a][b] if value else zero[a][b]
    return tuple(tuple(row) for row in rows)


PALEY = {order: _paley(order) for order in (12, 20, 28)}
_TRANSPOSED = {order: tuple(zip(*matrix, strict=True)) for order, matrix in PALEY.items()}


@lru_cache
def factors(n: int) -> tuple[int, ...]:
    """Kronecker factors of n, Paley orders first, then one power of two; empty if there are none.

    The factorization with the fewest Paley factors wins (sums of two are the cheapest)."""
    best: tuple[int, ...] = ()
    for a in range(4):
        for b in range(4):
            for c in range(4):
                rest, remainder = divmod(n, 12**a * 20**b * 28**c)
                if remainder or rest < 1 or rest & (rest - 1):
                    continue
                found = (12,) * a + (20,) * b + (28,) * c + ((rest,) if rest > 1 else ())
                if not best or len(found) < len(best):
                    best = found
    return best or ((1,) if n == 1 else ())


@lru_cache
def block_order(n: int) -> int:
    """Largest order that divides n and has a Hadamard matrix of ours."""
    return next(n // d for d in range(1, n + 1) if n % d == 0 and factors(n // d))


def signs(n: int, *, seed: int = SIGN_SEED) -> F64:
    """n fixed signs +1.0 or -1.0: the top bit of splitmix64 of (seed << 32) + i."""
    z = (np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.where(z >> np.uint64(63), -1.0, 1.0)


def _apply_factor(
    x: F64, out: F64, factor: int, paley: Mapping[int, Matrix] = PALEY
) -> tuple[F64, F64]:
    """x [..., factor, inner] times the factor's matrix along that axis: y_i = sum_j H_ij x_j,
    j ascending; a power of two by butterflies of stride 1, 2, 4... Both arrays are used as
    scratch; returns (result, the other one)."""
    if factor in paley:
        for i, row in enumerate(paley[factor]):
            total = out[..., i, :]
            np.multiply(x[..., 0, :], float(row[0]), out=total)
            for j in range(1, factor):
                (np.add if row[j] > 0 else np.subtract)(total, x[..., j, :], out=total)
        return out, x
    shape = x.shape
    stride = 1
    while stride < factor:
        paired = (*shape[:-2], factor // (2 * stride), 2, stride * shape[-1])
        pairs, results = x.reshape(paired), out.reshape(paired)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        np.add(low, high, out=results[..., 0, :])
        np.subtract(low, high, out=results[..., 1, :])
        x, out = out, x
        stride *= 2
    return x, out


def _turn(x: F64, order_factors: tuple[int, ...], paley: Mapping[int, Matrix] = PALEY) -> F64:
    """x [parts, n, M] times the Kronecker product of the factors along n. Overwrites x."""
    shape = x.shape
    parts, inner = shape[0], shape[1] * shape[2]
    out = np.empty_like(x)
    for factor in order_factors:
        parts, inner = parts * factor, inner // factor
        split = (parts // factor, factor, inner)
        x, out = _apply_factor(x.reshape(split), out.reshape(split), factor, paley)
    return x.reshape(shape)


def _columns_at_once(n: int) -> int:
    """Columns of height n that stay in a core's cache, input and output. It never changes bits:
    every column goes through the same additions."""
    return max(8, _CACHED_VALUES // n)


def rotate_first(x: F64, *, seed: int = SIGN_SEED) -> F64:
    """x [n, M] -> R^T x with R = D H^T / sqrt(n): turns the first axis, each column alone."""
    n, columns = x.shape
    order = block_order(n)
    sign, scale = signs(n, seed=seed)[:, None], 1.0 / math.sqrt(order)
    y = np.empty((n, columns))
    step = _columns_at_once(n)
    for at in range(0, columns, step):
        part = x[:, at : at + step] * sign
        turned = _turn(part.reshape(n // order, order, -1), factors(order))
        np.multiply(turned.reshape(part.shape), scale, out=y[:, at : at + step])
    return y


def rotate_last(x: F64, *, seed: int = SIGN_SEED) -> F64:
    """x [M, n] -> x R with R = D H^T / sqrt(n): turns the last axis, each row alone."""
    rows, n = x.shape
    order = block_order(n)
    sign, scale = signs(n, seed=seed)[:, None], 1.0 / math.sqrt(order)
    y = np.empty((rows, n))
    step = _columns_at_once(n)
    for at in range(0, rows, step):
        part = np.multiply(x[at : at + step].T, sign, order="C")
        turned = _turn(part.reshape(n // order, order, -1), factors(order))
        np.multiply(turned.reshape(part.shape).T, scale, out=y[at : at + step])
    return y


def unrotate_last(x: F64, *, seed: int = SIGN_SEED) -> F64:
    """x [M, n] -> x R^T with R = D H^T / sqrt(n), the inverse of rotate_last: the transposed
    factors in the same order, then the signs, then the scale."""
    rows, n = x.shape
    order = block_order(n)
    columns = x.T.reshape(n // order, order, rows).copy()
    turned = _turn(columns, factors(order), _TRANSPOSED).reshape(n, rows)
    turned = (turned * signs(n, seed=seed)[:, None]) * (1.0 / math.sqrt(order))
    return np.ascontiguousarray(turned.T)


def rotate_heads_first(x: F64, heads: int, *, seed: int = SIGN_SEED) -> F64:
    """Turn each of the `heads` equal parts of the first axis on its own: [heads*d, M]."""
    parts = np.split(x, heads)
    return np.concatenate([rotate_first(part, seed=seed) for part in parts])


def rotate_heads_last(x: F64, heads: int, *, seed: int = SIGN_SEED) -> F64:
    """Turn each of the `heads` equal parts of the last axis on its own: [M, heads*d]."""
    rows, n = x.shape
    return rotate_last(x.reshape(rows * heads, n // heads), seed=seed).reshape(rows, n)


def hadamard16_last(x: F64) -> F64:
    """The float64 twin of numerics.functions.hadamard_blocks: no signs, blocks of 16."""
    rows, n = x.shape
    y = np.empty((rows, n))
    step = _columns_at_once(n)
    for at in range(0, rows, step):
        part = np.ascontiguousarray(x[at : at + step].T)
        turned = _turn(part.reshape(n // SUPERLANE, SUPERLANE, -1), (SUPERLANE,))
        np.multiply(turned.reshape(part.shape).T, 0.25, out=y[at : at + step])
    return y
