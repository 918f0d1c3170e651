"""In: a prompt's tokens and a Sampling. Out: Sequence, one conversation's tokens, K/V and state.

A sequence is longer lived than an answer: a chat appends its next turn to the same one, and only
the tokens that have no K/V yet are computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal

from openlpu.engine.sampling import Sampling
from openlpu.errors import LpuError

FinishReason = Literal["stop", "length"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One row of the page table. tokens[:cached] have their K/V in `pages`."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    answer: Answer | None = None

    @property
    def pending(self) -> int:
        """Tokens that the next steps must compute."""
        return len(self.tokens) - self.cached

    def shared_prefix(self, tokens: Items[int]) -> int:
        """How many leading tokens are cached and equal to those given."""
        count = 0
        for mine, other in zip(self.tokens[: self.cached], tokens, strict=False):
            if mine != other:
                break
            count += 1
        return count


@dataclass(slots=True, eq=False)
class Answer:
    """The tokens being sampled for one request, and the clock that ran meanwhile."""

    sampling: Sampling
    prompt_length: int
    limit: int
    """Total length in tokens at which the answer ends."""
    end_ids: frozenset[int]
    reused: int
    """Prompt tokens whose K/V was there already."""
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: LpuError | None = None
    """Why no further token can come, if something went wrong with this sequence alone."""
    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    """Time of the first token on the clock of `started_s`."""
    last_token_s: float | None = None

    @property
    def done(self) -> bool:
        """Whether no further token comes."""
        return self.finish_reason is not None or self.error is not None

    def append(self, token: int) -> None:
        """Take the next token; a token that ends the answer is not part of it."""
        self.last_token_s = time.perf_counter()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        if token in self.end_ids:
            self.finish_reason = "stop"
            return
        self.generated.append(token)
        if self.prompt_length + len(self.generated) >= self.limit:
            self.finish_reason = "length"
