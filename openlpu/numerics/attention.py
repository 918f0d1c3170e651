"""In: one sequence's quantized queries, keys, values. Out: attention rows, chunk by chunk.

For a query row at position p and one head, over the chunks of CHUNK absolute positions that hold
a visible position (p - window < j <= p), in order:

    t_j = fl(float(q . k_j) * fl(s * sk_j))          s = fl(sq * log2(e)/sqrt(d))
    m   = max t_j;   e_j = exp2(t_j - m)
    L   = sum rne(e_j * 2**22)                        exact int32
    w_j = e_j * sv_j;  a = max w_j
    P_j = rne(w_j * (127 / a))                        0..127
    O_d = float(sum P_j * v_j[d]) * (a * fl(1/127))   the sum is an exact int32
    l   = float(L) * 2**-22

Chunks merge in order: M = max(m, m'), x = exp2(m - M), y = exp2(m' - M), l = l*x + l'*y,
o = o*x + o'*y. The row is o * (1 / l).
"""

from __future__ import annotations

import math

import numpy as np

from openlpu.numerics import CHUNK
from openlpu.numerics.functions import exp2
from openlpu.numerics.quant import F32, I8, R127, exact_dot, reciprocal_step, rne

DENOMINATOR_BITS = 22  # CHUNK * 2**22 stays below 2**31
_LOG2E_F64 = float.fromhex("0x1.71547652b82fep+0")


def softmax_factor(head_dim: int) -> float:
    """log2(e) / sqrt(head_dim): quotient and root in float64, then rounded to float32."""
    return float(np.float32(_LOG2E_F64 / math.sqrt(head_dim)))


def attend(
    q: I8,
    q_scale: F32,
    k: I8,
    k_scale: F32,
    v: I8,
    v_scale: F32,
    positions: np.ndarray,
    *,
    factor: float,
    window: int,
    chunk: int = CHUNK,
) -> F32:
    """One head, one sequence: q int8 [R, d], k and v int8 [T, d], scales [R] and [T] -> [R, d].

    positions [R] are absolute; row r sees j with positions[r] - window < j <= positions[r]
    (window 0 means all). factor is log2(e)/sqrt(d) as float32.
    """
    rows, dim = q.shape
    s = q_scale * np.float32(factor)
    merged = np.zeros(rows, bool)
    m_all = np.zeros(rows, np.float32)
    l_all = np.zeros(rows, np.float32)
    o_all = np.zeros((rows, dim), np.float32)
    first = positions - window + 1 if window else np.zeros_like(positions)
    for start in range(0, int(positions.max()) + 1, chunk):
        stop = min(start + chunk, k.shape[0])
        j = np.arange(start, stop)[None, :]
        visible = (j <= positions[:, None]) & (j >= first[:, None])
        active = visible.any(axis=1)
        if not active.any():
            continue
        t = exact_dot(q, k[start:stop]).astype(np.float32) * (
            s[:, None] * k_scale[None, start:stop]
        )
        m = np.where(visible, t, np.float32(-np.inf)).max(axis=1)
        m = np.where(active, m, np.float32(0.0))
        e = np.where(visible, exp2(t - m[:, None]), np.float32(0.0))
        total = rne(e * np.float32(2.0**DENOMINATOR_BITS)).sum(axis=1, dtype=np.int32)
        w = np.where(visible, e * v_scale[None, start:stop], np.float32(0.0))
        a = w.max(axis=1)
        p = rne(w * reciprocal_step(a, levels=127)[:, None])
        o = exact_dot(p.astype(np.int8), np.ascontiguousarray(v[start:stop].T)).astype(np.float32)
        o = o * (a * R127)[:, None]
        l = total.astype(np.float32) * np.float32(2.0**-DENOMINATOR_BITS)
        top = np.where(merged, np.maximum(m_all, m), m)
        x = np.where(merged, exp2(m_all - top), np.float32(0.0))
        y = exp2(m - top)
        both = active & merged
        fresh = active & ~merged
        l_all = np.where(both, l_all * x + l * y, np.where(fresh, l, l_all))
        o_all = np.where(
            both[:, None],
            o_all * x[:, None] + o * y[:, None],
            np.where(fresh[:, None], o, o_all),
        )
        m_all = np.where(active, top, m_all)
        merged |= active
    return o_all * (np.float32(1.0) / l_all)[:, None]
