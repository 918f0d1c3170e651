"""In: a prompt's tokens and a Sampling. Out: Sequence, one conversation's tokens, K/V and state.

A sequence is longer lived than an answer: a chat appends its next turn to the same one, and only
the tokens that have no K/V yet are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.clock import Clock
from openlpu.engine.logprobs import TokenLogprob
from openlpu.engine.sampling import Sampling
from openlpu.engine.speculation import PromptLookup
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


class Constraint(Protocol):
    """What an answer may say, token by token."""

    def allowed(self) -> NDArray[np.bool_]:
        """[V]: which tokens may come next; at least one."""
        ...

    def advance(self, token: int) -> None:
        """The token came."""
        ...

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        ...


class Reader(Protocol):
    """Reads a prompt's states; no token is sampled."""

    def take(self, first: int, states: NDArray[np.float32]) -> None:
        """The residual stream [rows, D] before the last norm, of the positions from `first` on.
        Positions may come again, if the sequence gave its memory up; the bits are the same."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """A conversation. tokens[:cached] have their K/V in `pages`; slot is its row of the page table,
    -1 until it is first computed."""

    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    answer: Answer | None = None
    submitted: bool = False
    """Whether the engine closes it when its answer ends."""
    lookup: PromptLookup = field(default_factory=PromptLookup)
    found: int = 0
    """How many of the last cached tokens this step found in known pages, and nobody computed."""

    @property
    def pending(self) -> int:
        """Tokens that the next steps must compute."""
        return len(self.tokens) - self.cached

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""
        return self.answer is not None and not self.answer.done

    @property
    def reads(self) -> bool:
        """Whether its states are wanted, and not tokens."""
        return self.answer is not None and self.answer.request.reader is not None

    @property
    def idle(self) -> bool:
        """Whether it only keeps K/V for a next turn, and could compute them again."""
        return self.answer is not None and self.answer.done

    @property
    def priority(self) -> int:
        return self.answer.request.priority if self.answer is not None else 0

    def shared_prefix(self, tokens: Items[int]) -> int:
        """How many leading tokens are cached and equal to those given."""
        count = 0
        for mine, other in zip(self.tokens[: self.cached], tokens, strict=False):
            if mine != other:
                break
            count += 1
        return count


@dataclass(frozen=True, slots=True)
class Request:
    """An answer that is wanted, beyond its prompt and its sampling."""

    end_ids: frozenset[int] = frozenset()
    """Tokens that end it."""
    priority: int = 0
    """Greater ones go first; equal ones by age."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report with each token; None: no log probabilities."""
    constraint: Constraint | None = None
    speculate: bool = True
    """Whether prompt lookup may propose tokens; it never changes one."""
    reader: Reader | None = None
    """Takes the states of all tokens of a submitted prompt in place of an answer, which ends once
    it has them all."""


@dataclass(slots=True, eq=False)
class Answer:
    """The tokens being sampled for one request, and the clock that ran meanwhile."""

    sampling: Sampling
    prompt_length: int
    limit: int
    """Total length in tokens at which the answer ends."""
    request: Request
    reused: int
    """Prompt tokens whose K/V was there already."""
    clock: Clock
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each generated token, if they were asked for."""
    finish_reason: FinishReason | None = None
    error: LpuError | None = None
    """Why no further token can come, if something went wrong with this sequence alone."""
    started_s: float = 0.0
    first_token_s: float | None = None
    """Time of the first token on the clock of `started_s`."""
    last_token_s: float | None = None
    first_step_s: float | None = None
    """When its prompt was first worked on; until then it waited."""
    preempted: int = 0
    """How often its K/V were given up for others."""
    proposed: int = 0
    accepted: int = 0
    """Tokens that prompt lookup proposed, and those of them that were right."""

    def __post_init__(self) -> None:
        self.started_s = self.clock()

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
        self.last_token_s = self.clock()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        if token in self.request.end_ids:
            self.finish_reason = "stop"
            return
        self.generated.append(token)
        constraint = self.request.constraint
        if constraint is not None:
            constraint.advance(token)
            if constraint.done:
                self.finish_reason = "stop"
                return
        if self.prompt_length + len(self.generated) >= self.limit:
            self.finish_reason = "length"
