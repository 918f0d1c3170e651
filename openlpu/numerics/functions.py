"""In: float32 values. Out: exp2, SiLU, RMS norm, block Hadamard, each in a declared order."""

from __future__ import annotations

import numpy as np

from openlpu.numerics import SUPERLANE
from openlpu.numerics.quant import F32, NAN, reciprocal_step, rne, row_amax

LOG2E = np.float32(float.fromhex("0x1.715476p+0"))
EXP2_LIMIT = np.float32(126.0)  # keeps results normal numbers
# Minimax polynomial of 2**f on [-1/2, 1/2] with the constant term 1: relative error 2.6e-9
# before rounding; float32 arithmetic then dominates. Fitted with a Remez exchange.
EXP2_COEFFICIENTS = tuple(
    np.float32(float.fromhex(text))
    for text in (
        "0x1.62e432p-1",
        "0x1.ebfbe2p-3",
        "0x1.c6ae72p-5",
        "0x1.3b270ep-7",
        "0x1.5f7276p-10",
        "0x1.470b48p-13",
    )
)
NORM_LEVELS = 127 * 256  # 16-bit norms: the value splits into two int8 limbs


def exp2(t: F32) -> F32:
    """2**t for t in [-126, 126] (clamped; NaN gives 2**-126). Horner, separate * and +."""
    t = np.where(t > -EXP2_LIMIT, t, -EXP2_LIMIT)
    t = np.where(t < EXP2_LIMIT, t, EXP2_LIMIT)
    n = np.rint(t)
    f = t - n
    p = np.full_like(f, EXP2_COEFFICIENTS[-1])
    for c in EXP2_COEFFICIENTS[-2::-1]:
        p = p * f + c
    p = p * f + np.float32(1.0)
    power = ((n.astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    y: F32 = p * power
    return y


def silu(g: F32) -> F32:
    """g / (1 + 2**(-g * log2 e))."""
    return g / (np.float32(1.0) + exp2(-g * LOG2E))


def swiglu(gate: F32, up: F32) -> F32:
    """silu(gate) * up, elementwise."""
    return silu(gate) * up


def rms_inverse(x: F32, *, eps: float) -> F32:
    """1 / sqrt(mean(x**2) + eps) along the last axis, from exact 16-bit sums.

    v   = rne(x * (32512 / amax)) = 256 * hi + lo,   hi in [-127, 127], lo in [-128, 127]
    A, B, C = sum hi*hi, sum hi*lo, sum lo*lo        exact int32, free order
    ms  = ((A * 65536 + B * 512) + C) / K * (u * u), u = amax / 32512
    """
    amax = row_amax(x)
    step = reciprocal_step(amax, levels=NORM_LEVELS)
    finite = np.where(np.isnan(amax)[..., None], np.float32(0.0), x)
    v = rne(finite * step[..., None])
    hi = (v + 128) >> 8
    lo = v - (hi << 8)
    a = (hi * hi).sum(axis=-1, dtype=np.int32).astype(np.float32)
    b = (hi * lo).sum(axis=-1, dtype=np.int32).astype(np.float32)
    c = (lo * lo).sum(axis=-1, dtype=np.int32).astype(np.float32)
    total = (a * np.float32(65536.0) + b * np.float32(512.0)) + c
    mean = total / np.float32(x.shape[-1])
    u = amax / np.float32(NORM_LEVELS)
    inverse = np.float32(1.0) / np.sqrt(mean * (u * u) + np.float32(eps))
    return np.where(np.isnan(amax), NAN, inverse)


def rmsnorm(x: F32, gain: F32 | None, *, eps: float, heads: int = 1) -> F32:
    """(x * rms_inverse) (* gain), per head of the last axis: [R, W] -> [R, W]; gain [W/heads]."""
    rows, width = x.shape
    per_head = x.reshape(rows, heads, width // heads)
    y = per_head * rms_inverse(per_head, eps=eps)[..., None]
    if gain is not None:
        y = y * gain
    return y.reshape(rows, width)


def hadamard_blocks(x: F32) -> F32:
    """Hadamard of 16 on each block of 16 along the last axis: strides 1, 2, 4, 8, then * 1/4."""
    shape = x.shape
    for stride in (1, 2, 4, 8):
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * stride), 2, stride)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([low + high, low - high], axis=-2).reshape(shape)
    assert shape[-1] % SUPERLANE == 0
    return x * np.float32(0.25)
