"""In: one row of logits. Out: natural logarithms of token probabilities, the same on every machine.

    t_i = fl(fl(l_i - max l) * log2 e)             float32
    w_i = rne(exp2(t_i) * 2**44)                   integers: their sum S has no order
    logprob_i = (l_i - max l) - ln(S / 2**44)      float64, then float32

ln comes from decimal arithmetic, which rounds correctly everywhere; a C library's may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

from openlpu.numerics.functions import LOG2E, exp2

F32 = NDArray[np.float32]

MOST = 20  # likeliest tokens that may be asked for
_BITS = 44  # sums of 2**17 weights stay below 2**62
_DECIMAL = Context(prec=24)
_LN_SCALE = _DECIMAL.ln(Decimal(1 << _BITS))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability under the model alone (no temperature, penalty or constraint), and
    those of the likeliest ones, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_sum(logits: F32) -> tuple[np.float64, float]:
    """(max l, ln of the sum of exp(l - max l)) of finite logits [V]."""
    top = logits.max()
    weights = exp2((logits - top) * LOG2E).astype(np.float64) * 2.0**_BITS
    total = int(np.rint(weights).astype(np.int64).sum())
    log = _DECIMAL.subtract(_DECIMAL.ln(Decimal(total)), _LN_SCALE)
    return np.float64(top), float(log)


def token_logprob(logits: F32, token: int, count: int) -> TokenLogprob:
    """The log probability of a token and of the `count` likeliest ones; equal ones by id."""
    top, log = log_sum(logits)

    def of(i: int) -> float:
        return float(np.float32(np.float64(logits[i]) - top - log))

    ids: list[int] = []
    if count:
        edge = np.partition(logits, len(logits) - count)[len(logits) - count]
        kept = np.flatnonzero(logits >= edge)
        ids = [int(i) for i in kept[np.argsort(-logits[kept], kind="stable")][:count]]
    return TokenLogprob(token, of(token), tuple((i, of(i)) for i in ids))
