"""In: a matrix, the factor of its inputs' second moments. Out: blocks of 4 bits, errors fed back.

Rounding a weight makes an error in the output. Part of it, the part that later inputs predict, is
taken back by moving the later weights of its row before they are rounded in turn. With moments
S R R^T S the error of a row, (w - v) S R R^T S (w - v)^T, is a sum of squares, one per column:
what is left there after the move, times the column's pivot. So columns are rounded from first to
last, and the scale of each group of 32 is chosen by trying: of all candidates the one whose
rounded group leaves the smallest sum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from openlpu.calibrate.moments import FACTOR_BITS, Factor
from openlpu.graph.tensors import GroupedTensor
from openlpu.numerics import GROUP

F64 = NDArray[np.float64]

ERROR_BITS = 18  # an error is fed on in units of 2^-18 of the row's largest value
_MOST_ERROR = 2.0**21  # units; 32 products of 2^21 and 2^26 stay below 2^53
_ROWS_AT_ONCE = 128  # of a trial; never changes bits
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74)


def round_blocks(w: F64, factor: Factor, block_format: str) -> GroupedTensor:
    """w [N, K] to q4_0 or q4_1, the error under the factor's moments kept small."""
    rows, width = w.shape
    moved = w.copy()
    weight = factor.size * factor.pivots  # of what is left in a column
    unit = np.exp2(np.frexp(np.abs(w * factor.size).max(axis=1))[1] - float(ERROR_BITS))[:, None]
    q = np.empty((rows, width), np.int8)
    scale, minimum = np.empty((2, rows, width // GROUP))
    for g in range(width // GROUP):
        at, rest = slice(g * GROUP, (g + 1) * GROUP), slice((g + 1) * GROUP, width)
        size = factor.size[at]
        inside = factor.r[at, at] * 2.0**-FACTOR_BITS * size[:, None] / weight[at]
        for first in range(0, rows, _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            found = _best(w[part, at], moved[part, at], inside, weight[at], block_format)
            q[part, at], scale[part, g], minimum[part, g] = found
        error = w[:, at] - (q[:, at] * scale[:, g, None] + minimum[:, g, None])
        whole = np.clip(np.rint(error * size / unit), -_MOST_ERROR, _MOST_ERROR)
        moved[:, rest] += (whole @ factor.r[at, rest]) * (unit * 2.0**-FACTOR_BITS) / weight[rest]
    low = minimum.astype(np.float32) if block_format == "q4_1" else None
    return GroupedTensor(q, scale.astype(np.float32), low)


def _candidates(w: F64, block_format: str) -> tuple[F64, F64]:
    """Scales and minima [C, n] to try for groups w [n, 32], as halves."""
    low, high = w.min(axis=1), w.max(axis=1)
    scales, minima = [], []
    if block_format == "q4_0":
        peak = np.maximum(-low, high)
        sign = np.where(high > -low, -1.0, 1.0)
        for shrink in SHRINKS:
            for levels in (8.0, -8.0):
                scales.append(peak * sign * shrink / levels)
                minima.append(np.zeros_like(peak))
    else:
        for a in SHRINKS:
            for b in SHRINKS:
                if abs(SHRINKS.index(a) - SHRINKS.index(b)) > 2:
                    continue
                bottom, top = low * a, high * b
                scales.append((top - bottom) / 15.0)
                minima.append(bottom)
    halves = np.array([scales, minima]).astype(np.float16).astype(np.float64)
    return halves[0], halves[1]


def _best(w: F64, moved: F64, inside: F64, weight: F64, block_format: str) -> tuple[F64, F64, F64]:
    """Groups w [n, 32], moved by the errors of earlier ones: q [n, 32], scale [n], minimum [n]."""
    scale, minimum = _candidates(moved, block_format)
    lowest, highest = (-8.0, 7.0) if block_format == "q4_0" else (0.0, 15.0)
    divisor = np.where(scale != 0, scale, np.inf)
    left = np.repeat(moved.T[:, None, :], len(scale), axis=1)  # [32, C, n]
    q = np.empty_like(left)
    loss = np.zeros_like(scale)
    for j in range(GROUP):
        q[j] = np.clip(np.rint((left[j] - minimum) / divisor), lowest, highest)
        value = q[j] * scale + minimum
        loss += ((left[j] - value) * weight[j]) ** 2
        error = w.T[j] - value
        for k in range(j + 1, GROUP):
            left[k] += inside[j, k] * error
    best = loss.argmin(axis=0)
    n = np.arange(len(best))
    return q[:, best, n].T, scale[best, n], minimum[best, n]
