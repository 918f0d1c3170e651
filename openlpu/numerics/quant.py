"""In: float32 rows. Out: int8 rows with one scale each (or one per group), and back.

    amax  = largest magnitude of the row, found as an integer maximum of the bit patterns
    q     = rne(x * (127 / amax))                                      int8 in [-127, 127]
    scale = amax * fl(1/127)

A row whose amax is below TINY is a row of zeros with scale 0. A row that holds an infinity or a
NaN is poisoned: q = 0 and scale = NaN, so that the logits say so and no other row is touched.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]

TINY = np.float32(2.0**-100)  # smaller rows are zero: keeps 127 / amax finite
R127 = np.float32(1.0) / np.float32(127.0)
NAN = np.float32(np.nan)
_INF_BITS = np.uint32(0x7F800000)


def rne(x: F32) -> I32:
    """Round float32 to int32, nearest even. Callers keep |x| below 2**22."""
    return np.rint(x).astype(np.int32)


def row_amax(x: F32) -> F32:
    """Largest magnitude along the last axis; NaN when the row holds an infinity or a NaN."""
    bits = (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0x7FFFFFFF)).max(axis=-1)
    amax = bits.view(np.float32)
    return np.where(bits < _INF_BITS, amax, NAN)


def reciprocal_step(amax: F32, *, levels: int) -> F32:
    """levels / amax where the row is finite and not tiny, else 0. Same shape as amax."""
    usable = amax >= TINY  # False for NaN
    safe = np.where(usable, amax, np.float32(1.0))
    return np.where(usable, np.float32(levels) / safe, np.float32(0.0))


def quantize(x: F32) -> tuple[I8, F32]:
    """Quantize along the last axis: [..., K] -> int8 [..., K], scale [...]."""
    amax = row_amax(x)
    step = reciprocal_step(amax, levels=127)
    finite = np.where(np.isnan(amax)[..., None], np.float32(0.0), x)
    q = rne(finite * step[..., None]).astype(np.int8)
    scale = np.where(amax < TINY, np.float32(0.0), amax * R127)
    return q, scale


def quantize_weight(w: NDArray[np.float64]) -> tuple[I8, F32]:
    """Quantize weight rows offline: float64 [N, K] -> int8 [N, K], scale float32 [N].

    The scale is rounded to float32 first, and the quotient is taken in float64, so that the
    stored pair is the best one for the scale that the engines will use.
    """
    amax = np.abs(w).max(axis=-1) if w.shape[-1] else np.zeros(w.shape[:-1])
    scale = (amax / 127.0).astype(np.float32)
    scale = np.where(scale < TINY, np.float32(0.0), scale)
    divisor = np.where(scale > 0, scale, np.float32(1.0)).astype(np.float64)
    q = np.rint(w / divisor[..., None])
    q = np.where(scale[..., None] > 0, q, 0.0)
    return np.clip(q, -127, 127).astype(np.int8), scale


def exact_dot(x: I8, w: I8) -> I32:
    """int8 [R, K] times int8 [N, K] transposed, exactly: int32 [R, N].

    float32 products of int8 values stay below 2**24 for blocks of 1,040 along K, so a float32
    matrix product is exact there in any order of summation; the blocks add as integers.
    """
    block = 1024
    total = np.zeros((x.shape[0], w.shape[0]), np.int32)
    for k in range(0, x.shape[1], block):
        part = x[:, k : k + block].astype(np.float32) @ w[:, k : k + block].astype(np.float32).T
        total += part.astype(np.int32)
    return total


def linear(q: I8, scale: F32, w: I8, w_scale: F32, *, bias: F32 | None = None) -> F32:
    """y = fl(float(q . w) * fl(scale * w_scale)) (+ bias): [R, K], [N, K] -> float32 [R, N]."""
    y = exact_dot(q, w).astype(np.float32) * (scale[:, None] * w_scale[None, :])
    return y if bias is None else y + bias[None, :]


def quantize_groups(x: F32, *, group: int) -> tuple[I8, F32]:
    """Quantize [R, K] with one scale per group along K: int8 [R, K], scale [R, K/group]."""
    rows, width = x.shape
    q, scale = quantize(x.reshape(rows, width // group, group))
    return q.reshape(rows, width), scale


def grouped_linear(
    q: I8,
    scale: F32,
    w: I8,
    w_scale: F32,
    w_min: F32 | None,
    *,
    group: int,
    bias: F32 | None = None,
) -> F32:
    """Linear with grouped weights, w ~ w_scale * int + w_min per group: float32 [R, N].

    Inside a group the sum is an exact integer; groups add in float32 in order of k:
        y += fl(float(dot_g) * fl(scale_g * w_scale_g))
        y += fl(float(sum_g q) * fl(scale_g * w_min_g))      only when the format has minima
    q [R, K], scale [R, K/group], w [N, K], w_scale and w_min [N, K/group].
    """
    rows, width = q.shape
    y = np.zeros((rows, w.shape[0]), np.float32)
    for g in range(width // group):
        at = slice(g * group, (g + 1) * group)
        dot = exact_dot(q[:, at], w[:, at]).astype(np.float32)
        y = y + dot * (scale[:, g, None] * w_scale[None, :, g])
        if w_min is not None:
            total = q[:, at].astype(np.int32).sum(axis=1).astype(np.float32)
            y = y + total[:, None] * (scale[:, g, None] * w_min[None, :, g])
    return y if bias is None else y + bias[None, :]
