"""In: a Rope and a head size. Out: RopeTable: exact fractions of a turn per position, one per pair.

Everything is Decimal at 60 digits, so that the table is the same on every machine. The formulas
are those of the papers; where an implementation's detail decides (yarn's blend runs over pairs,
with bounds clipped to [0, head_dim - 1]), transformers' is followed.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

from openlpu.errors import UnsupportedModel
from openlpu.graph import RopeTable
from openlpu.load.config import Rope
from openlpu.numerics.rope import base_frequencies, turns

_DIGITS = 60
_TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021164194989")


def rope_table(rope: Rope, head_dim: int) -> RopeTable:
    """The frequencies of head_dim / 2 pairs, scaled as `rope` says.

    Raises UnsupportedModel for yarn over equal frequencies, where its blend has no meaning.
    """
    if rope.kind == "yarn" and rope.theta <= 1.0:
        raise UnsupportedModel(
            f"yarn with rope theta {rope.theta} is not supported; it must be > 1"
        )
    with localcontext() as context:
        context.prec = _DIGITS
        base = base_frequencies(rope.theta, head_dim)
        match rope.kind:
            case "none":
                scaled = base
            case "linear":
                scaled = [frequency / Decimal(rope.factor) for frequency in base]
            case "llama3":
                scaled = [_llama3(frequency, rope) for frequency in base]
            case "yarn":
                scaled = _yarn(base, rope, head_dim)
        if rope.freq_divisors is not None:
            scaled = [
                frequency / Decimal(divisor)
                for frequency, divisor in zip(scaled, rope.freq_divisors, strict=True)
            ]
        exact = tuple(int(turn) for turn in turns(scaled))
    return RopeTable(exact, _magnitude(rope))


def _llama3(frequency: Decimal, rope: Rope) -> Decimal:
    """Short waves are kept, long ones divided by `factor`, those between blend linearly."""
    low, high = Decimal(rope.low_freq_factor), Decimal(rope.high_freq_factor)
    waves = rope.original_context * frequency / _TWO_PI  # within the original context
    divided = frequency / Decimal(rope.factor)
    if waves > high:
        return frequency
    if waves < low:
        return divided
    kept_share = (waves - low) / (high - low)
    return (1 - kept_share) * divided + kept_share * frequency


def _yarn(base: list[Decimal], rope: Rope, head_dim: int) -> list[Decimal]:
    """Pairs before `low` are kept, those after `high` divided, a linear blend between."""

    def pair_that_turns(times: float) -> Decimal:
        longest = Decimal(rope.original_context) / (Decimal(times) * _TWO_PI)
        return head_dim * longest.ln() / (2 * Decimal(rope.theta).ln())

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = Decimal(math.floor(low)), Decimal(math.ceil(high))
    low, high = max(low, Decimal(0)), min(high, Decimal(head_dim - 1))
    if low == high:
        high += Decimal("0.001")
    blended = []
    for i, frequency in enumerate(base):
        divided_share = min(max((i - low) / (high - low), Decimal(0)), Decimal(1))
        divided = frequency / Decimal(rope.factor)
        blended.append(divided * divided_share + frequency * (1 - divided_share))
    return blended


def _magnitude(rope: Rope) -> float:
    """What multiplies cosines and sines, rounded once to float64."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    with localcontext() as context:
        context.prec = _DIGITS
        return float(Decimal(rope.factor).ln() / 10 + 1)
