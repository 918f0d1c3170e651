"""In: an engine and a token list. Out: perplexity, in windows that score all but the first token.

The tokens are cut into consecutive windows. A window begins with nothing in K/V; row i predicts
token i + 1, and its last row predicts the first token of the next window. So each of the T - 1
tokens after the first is scored once, with between 1 and `window` tokens of context. Losses are
natural logs, taken in float64 from the float32 logits and summed exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.batcher import Engine
from openlpu.errors import NumericOverflow, RequestError

DEFAULT_WINDOW = 1024  # tokens
_ROWS = 256  # of one step
_ROWS_WIDE = 32  # held in float64 at once


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean loss over `scored_tokens`."""

    mean_loss_nats: float
    scored_tokens: int
    window_tokens: int
    seconds: float

    @property
    def value(self) -> float:
        """The perplexity itself."""
        return math.exp(self.mean_loss_nats)


def perplexity(
    engine: Engine,
    tokens: Sequence[int],
    *,
    window: int = DEFAULT_WINDOW,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `tokens`; the window is at most the engine's context.

    Raises RequestError for fewer than two tokens, NumericOverflow for logits that are not finite.
    """
    if len(tokens) < 2:
        raise RequestError("perplexity needs a text of at least two tokens")
    if window < 1:
        raise RequestError(f"window is {window}; give 1 or more tokens")
    window = min(window, engine.context)
    started_s = time.perf_counter()
    losses: list[float] = []
    for start in range(0, len(tokens) - 1, window):
        inputs = tokens[start : min(start + window, len(tokens) - 1)]
        sequence = engine.open()
        try:
            for logits in engine.score(sequence, inputs, piece=_ROWS):
                at = len(losses) + 1
                losses += row_losses(logits, tokens[at : at + len(logits)])
                if progress:
                    progress("score", len(losses), len(tokens) - 1)
        finally:
            engine.close(sequence)
    return Perplexity(
        math.fsum(losses) / len(losses), len(losses), window, time.perf_counter() - started_s
    )


def row_losses(logits: NDArray[np.float32], targets: Sequence[int]) -> list[float]:
    """-ln softmax(logits)[target] of each row: logits [R, V], R targets."""
    losses: list[float] = []
    for start in range(0, len(targets), _ROWS_WIDE):
        wide = logits[start : start + _ROWS_WIDE].astype(np.float64)
        top = wide.max(axis=1)
        if not np.isfinite(top).all():
            raise NumericOverflow("logits are not finite; the checkpoint is damaged")
        total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
        at = np.asarray(targets[start : start + _ROWS_WIDE])
        losses += (total - wide[np.arange(len(at)), at]).tolist()
    return losses
