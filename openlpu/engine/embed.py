"""In: a model and prompts' tokens. Out: embeddings float32 [n, D] of length 1, the same bits in any
batch and on any machine.

The mean over a prompt's tokens of what the last norm gives, with its gain, in the checkpoint's own
basis. docs/numerics.md, section 12, declares every step:

    y = rmsnorm(x)                                     float32, without a gain: section 4
    S = sum over rows of rne(y * 2**32)                int64, exact: rows may come in any pieces
    m = (float64(S) / (2**32 * rows)) R**T * gain      float64; R of the residual stream
    e = float32(m / sqrt(sum m * m))                   the sum is rounded once
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import Compiled
from openlpu.engine.model import Model
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request
from openlpu.errors import NumericOverflow
from openlpu.numerics.functions import rmsnorm
from openlpu.numerics.rotation import unrotate_last

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_SCALE = 2.0**32
"""|y| <= sqrt(D) < 2**9, so that 2**21 rows stay below 2**62."""
_AT_ONCE = 64  # prompts of one call that are under way together


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A model's last norm and the basis its input stands in. seed: of R, None if not rotated."""

    gain: F64
    eps: float
    seed: int | None

    @property
    def dimensions(self) -> int:
        return len(self.gain)


def final_norm(compiled: Compiled) -> FinalNorm:
    """The norm that reads the states of a compiled model; its gain comes from the checkpoint."""
    states = compiled.float_graph.states
    norm = next(op for op in compiled.float_graph.ops if op.src == (states,))
    table = next(op.params[0] for op in compiled.graph.ops if op.kind == "embed")
    turns = [step for step in table.recipe if step.kind == "rotate_in"]
    gain: F64 = compiled.weights.rows(norm.params[0].source).astype(np.float64)
    return FinalNorm(gain, norm.number("eps"), int(turns[0].args[0]) if turns else None)


class Mean:
    """A Reader: the mean of one prompt's normed states."""

    def __init__(self, norm: FinalNorm) -> None:
        self._norm = norm
        self._total = np.zeros(norm.dimensions, np.int64)
        self._rows = 0

    def take(self, first: int, states: F32) -> None:
        """The next states [rows, D]; those that came before are skipped. Raises NumericOverflow for
        a row that left the finite range."""
        assert first <= self._rows, "rows are missing"
        new = states[self._rows - first :]
        normed = rmsnorm(new, None, eps=self._norm.eps).astype(np.float64)
        if not np.isfinite(normed).all():
            raise NumericOverflow("a state is not finite, so the prompt has no embedding")
        self._total += np.rint(normed * _SCALE).astype(np.int64).sum(axis=0)
        self._rows += new.shape[0]

    def embedding(self) -> F32:
        """Float32 [D] of length 1, or zeros where the mean is zero."""
        norm = self._norm
        mean = self._total.astype(np.float64) / (_SCALE * max(1, self._rows))
        if norm.seed is not None:
            mean = unrotate_last(mean[None], seed=norm.seed)[0]
        mean = mean * norm.gain
        length = math.sqrt(math.fsum(mean * mean))
        unit: F32 = (mean / (length or 1.0)).astype(np.float32)
        return unit


def reading(mean: Mean) -> tuple[Sampling, Request]:
    """What to submit to an engine beside the prompt's tokens, so that `mean` reads them."""
    return Sampling(max_tokens=1), Request(reader=mean)


def embed(model: Model, prompts: Items[Items[int]]) -> F32:
    """Embeddings float32 [n, D] of prompts of tokens, each as long as the model's context allows.

    Raises RequestError for prompts without tokens or too long, NumericOverflow.
    """
    return embeddings(model.engine, final_norm(model.compiled), prompts)


def embeddings(engine: Engine, norm: FinalNorm, prompts: Items[Items[int]]) -> F32:
    """Like `embed`, on any engine that can read states. Prompts share steps with each other, and
    take turns with answers that are under way."""
    rows = [np.zeros((0, norm.dimensions), np.float32)]
    for at in range(0, len(prompts), _AT_ONCE):
        some = [(tokens, Mean(norm)) for tokens in prompts[at : at + _AT_ONCE]]
        answers: list[Answer] = []
        try:
            answers += [engine.submit(tokens, *reading(mean)) for tokens, mean in some]
            while not all(answer.done for answer in answers):
                engine.step()
        finally:
            for answer in answers:
                answer.cancel()
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        rows.append(np.stack([mean.embedding() for _, mean in some]))
    return np.concatenate(rows)
