"""In: a prompt's tokens and a Sampling. Out: Sequence, one conversation's tokens, K/V and state.

A sequence is longer lived than an answer: a chat appends its next turn to the same one, and only
the tokens that have no K/V yet are computed.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal

from openlpu.engine.sampling import Sampling
from openlpu.errors import LpuError, RequestError

FinishReason = Literal["stop", "length", "cancelled"]


def token_ids(tokens: Iterable[int], *, vocab_size: int) -> list[int]:
    """Tokens of any integer kind (an array's, too) as a list of int.

    Raises RequestError for what is no integer or lies outside the vocabulary.
    """
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError:
        raise RequestError("tokens must be a list of whole numbers, the ids of tokens") from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RequestError(f"a token id lies outside 0 to {vocab_size - 1}, the model's vocabulary")
    return ids


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

    def cancel(self) -> None:
        """Let no further token come. It touches nothing else, so any thread may call it, and so may
        the garbage collector in the middle of a step."""
        if not self.done:
            self.finish_reason = "cancelled"

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
