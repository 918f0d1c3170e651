"""In: one row of logits and a Sampling. Out: one token id, the same on every machine.

Greedy is an argmax. Otherwise probabilities are integers, so their sums have no order:

    t_i = fl(l_i - max l) * fl(log2 e / T)             float32
    w_i = rne(exp2(t_i) * 2**28)                       integer; tokens below 2**-29 drop out
    u   = 64 random bits of (seed, position)           Philox4x32-10
    the token is the first, by id, whose running sum of w exceeds u * (sum of w) / 2**64

top_k keeps the largest logits (the lowest ids on a tie); top_p the shortest prefix, by weight
descending, then id ascending, whose integer sum reaches ceil(p * sum); min_p the weights that reach
ceil(p * largest). p is taken as the exact fraction that its float64 is.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.sampling import Sampling
from openlpu.errors import NumericOverflow
from openlpu.numerics.functions import EXP2_COEFFICIENTS, EXP2_LIMIT, LOG2E

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

WEIGHT_BITS = 28  # sums of 2**24 weights stay below 2**53: float64 adds them exactly
_BLOCK = 256  # weights

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al. (2011): 128 random bits as four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_bits(seed: int, position: int) -> int:
    """64 bits for the token at an absolute position: a number in [0, 2**64)."""
    low, high, _, _ = philox((position & _WORD, position >> 32, 0, 0), (seed & _WORD, seed >> 32))
    return high << 32 | low


def choose(
    logits: F32,
    sampling: Sampling,
    *,
    tokens: Sequence[int],
    prompt_length: int,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The token that follows `tokens`, of which the first `prompt_length` are the prompt.

    logits [V] are not changed. allowed [V]: the tokens to choose among; None: all. The token's
    position is len(tokens); sampling.seed must be set unless greedy. Raises NumericOverflow if a
    logit is infinite or NaN.
    """
    if sampling.logit_bias:
        logits = logits.copy()
        for token, bias in sampling.logit_bias:
            logits[token] += np.float32(bias)
    if sampling.penalized:
        logits = penalize(logits, sampling, tokens=tokens, prompt_length=prompt_length)
    best = int(np.argmax(logits))
    # argmax finds a NaN or +inf; the minimum finds -inf.
    if not np.isfinite(logits[best]) or not np.isfinite(logits.min()):
        raise NumericOverflow(
            f"the logits at position {len(tokens) - 1} are not finite; "
            "the checkpoint is damaged or needs another precision"
        )
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
        best = int(np.argmax(logits))
    if sampling.greedy:
        return best
    assert sampling.seed is not None
    return draw(logits, sampling, random_bits(sampling.seed, len(tokens)))


def penalize(logits: F32, sampling: Sampling, *, tokens: Sequence[int], prompt_length: int) -> F32:
    """A copy of logits [V] with the penalties taken off: repetition first, then the other two."""
    out = logits.copy()
    seen = np.unique(np.asarray(tokens, np.int64))
    penalty = np.float32(sampling.repetition_penalty)
    at = out[seen]
    out[seen] = np.where(at > 0, at / penalty, at * penalty)
    ids, counts = np.unique(np.asarray(tokens[prompt_length:], np.int64), return_counts=True)
    frequency = np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
    out[ids] = (out[ids] - frequency) - np.float32(sampling.presence_penalty)
    return out


def draw(logits: F32, sampling: Sampling, bits: int) -> int:
    """The token that 64 random bits choose among finite logits [V]."""
    ids, weights = candidates(logits, sampling)
    # Two levels find the place faster than one running sum over the vocabulary.
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = bits * int(blocks[-1]) >> 64
    block = int(np.searchsorted(blocks, target, side="right"))
    start = block * _BLOCK
    before = blocks[block - 1] if block else 0.0
    running = before + np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return int(ids[start + np.searchsorted(running, target, side="right")])


def candidates(logits: F32, sampling: Sampling) -> tuple[I64, F32]:
    """Ids in ascending order and their integer weights, after temperature, top_k, top_p, min_p."""
    ids = np.arange(len(logits))
    top = logits.max()
    if 0 < sampling.top_k < len(logits):
        ids = _largest(logits, sampling.top_k)
        logits = logits[ids]
    with np.errstate(over="ignore"):  # an overflow to -inf is a weight of zero
        weights = weigh((logits - top) * (LOG2E / np.float32(sampling.temperature)))
    if sampling.top_p < 1.0:
        kept = _prefix(weights, Fraction(sampling.top_p))
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0.0:
        # The likeliest token has t = 0 and is always kept, so its weight is 2**28.
        least = np.float64(_share(Fraction(sampling.min_p), 1 << WEIGHT_BITS))
        kept = np.flatnonzero(weights >= least)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def weigh(t: F32) -> F32:
    """rne(exp2(t) * 2**28) of t [N] <= 0, which is overwritten; integers, held as float32.

    The same bits as numerics.functions.exp2, in place: a vocabulary is long.
    """
    np.maximum(t, -EXP2_LIMIT, out=t)
    n = np.rint(t)
    t -= n
    p = t * EXP2_COEFFICIENTS[-1]
    for c in EXP2_COEFFICIENTS[-2::-1]:
        p += c
        p *= t
    p += np.float32(1.0)
    exponent = n.astype(np.int32)
    exponent += np.int32(127)
    exponent <<= np.int32(23)
    p *= exponent.view(np.float32)
    p *= np.float32(2.0**WEIGHT_BITS)
    np.rint(p, out=p)
    return p


def _largest(values: F32, count: int) -> I64:
    """Ascending indices of the `count` largest values; equal values go to the lowest indices."""
    edge = np.partition(values, len(values) - count)[len(values) - count]
    kept = np.flatnonzero(values >= edge)
    surplus = len(kept) - count
    if surplus:
        kept = np.delete(kept, np.flatnonzero(values[kept] == edge)[-surplus:])
    return kept


def _prefix(weights: F32, fraction: Fraction) -> I64:
    """Ascending indices of the shortest prefix, by weight descending, then index, that reaches
    ceil(fraction * sum)."""
    need = _share(fraction, int(weights.sum(dtype=np.float64)))
    # The weights above a power of two often reach it, and are few: then only they are sorted.
    for halvings in (8, 16, WEIGHT_BITS):
        head = np.flatnonzero(weights >= np.float32(2.0 ** (WEIGHT_BITS - halvings)))
        if int(weights[head].sum(dtype=np.float64)) >= need:
            break
    order = head[np.argsort(-weights[head], kind="stable")]
    running = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(running, need)) + 1])


def _share(fraction: Fraction, total: int) -> int:
    """ceil(fraction * total), exactly."""
    return -(-fraction.numerator * total // fraction.denominator)
