"""In: int8 rows that a linear reads. Out: their second moments X^T X, and its triangular factor.

Both have the same bits on every machine although BLAS makes the products: every operand is an
integer, and every sum of products of them, in any order, stays below 2^53, so that no float64
operation inside a product rounds. What does round is elementwise, in the order written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.numerics import GROUP

F64 = NDArray[np.float64]

ROW_BITS = 15  # |x| <= 2^15 units: sums of up to 2^23 rows stay below 2^53
FACTOR_BITS = 26  # a row of the factor has length 1, so its products sum to 2^52 at most
DAMPING = 0.01  # of the mean square of a column, added to that of each
_ROWS_AT_ONCE = 512
_PANEL = 64  # columns that are factored elementwise


@dataclass(frozen=True, slots=True)
class Factor:
    """moments + damping = S R R^T S, R upper triangular with rows of length 1.

    r: R in units of 2^-FACTOR_BITS, whole numbers [K, K]. size: S [K], the root mean squares of
    the columns times the root of the number of rows.
    """

    r: F64
    size: F64

    @property
    def pivots(self) -> F64:
        """The diagonal of R [K]: what of a column the ones before it leave unexplained."""
        diagonal: F64 = np.diagonal(self.r) * 2.0**-FACTOR_BITS
        return diagonal


def second_moments(q: NDArray[np.int8], scale: NDArray[np.float32]) -> F64:
    """X^T X of X = q * scale, rounded per column to 2^-15 of its power of two: [K, K].

    q [T, K], scale [T, K / 32].
    """
    rows, width = q.shape
    peak = np.zeros(width)
    for at in range(0, rows, _ROWS_AT_ONCE):
        np.maximum(peak, np.abs(_values(q, scale, at)).max(axis=0), out=peak)
    unit = np.exp2(np.frexp(peak)[1].astype(np.float64) - ROW_BITS)
    total = np.zeros((width, width))
    for at in range(0, rows, _ROWS_AT_ONCE):
        whole = np.rint(_values(q, scale, at) / unit)
        total += whole.T @ whole
    moments: F64 = total * unit * unit[:, None]
    return moments


def _values(q: NDArray[np.int8], scale: NDArray[np.float32], at: int) -> F64:
    part = slice(at, at + _ROWS_AT_ONCE)
    groups = q[part].reshape(-1, scale.shape[1], GROUP) * scale[part].astype(np.float64)[..., None]
    values: F64 = groups.reshape(-1, q.shape[1])
    return values


def factored(moments: F64, *, damping: float = DAMPING) -> Factor:
    """The factor of moments [K, K] with `damping` times the mean of its diagonal added to it.

    Cholesky from the last row up, in panels: a panel is reduced by the exact product of what is
    done, then factored column by column; each column is rounded to units when it is done.
    """
    squares = np.diagonal(moments)
    mean = math.fsum(squares.tolist()) / len(squares)
    size = np.sqrt(squares + damping * mean if mean > 0 else np.ones_like(squares))
    turned = (moments / size / size[:, None])[::-1, ::-1].copy()
    np.fill_diagonal(turned, 1.0)
    width, one = len(size), 2.0**FACTOR_BITS
    lower = np.zeros_like(turned)
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        done = lower[start:, :start] @ lower[start:stop, :start].T
        panel = turned[start:, start:stop] - done / (one * one)
        for k in range(stop - start):
            pivot = math.sqrt(max(float(panel[k, k]), 1 / one))
            column = np.rint(panel[k:, k] / pivot * one)
            column[0] = np.rint(pivot * one)
            lower[start + k :, start + k] = column
            column = column / one
            panel[k + 1 :, k + 1 :] -= column[1:, None] * column[None, 1 : stop - start - k]
    return Factor(np.ascontiguousarray(lower[::-1, ::-1]), size)
