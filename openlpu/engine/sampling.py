"""In: what a caller asks of the sampler. Out: Sampling, one frozen and checked request.

Every field is checked by name when the request is made, so that nothing fails half-way through an
answer. The arithmetic that the fields steer is in openlpu.engine.sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from openlpu.errors import RequestError

MOST_STOPS = 64
STOP_LETTERS = 1000
GREEDY_BELOW = 2.0**-20  # a lower temperature could not be told from greedy in float32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The defaults are greedy: the likeliest token, the lowest id on a tie.

    Logits are changed in this order: bias, repetition penalty, frequency and presence penalty,
    temperature; then top_k, top_p (of what top_k left) and min_p choose among the tokens.
    """

    temperature: float = 0.0
    """Divides the logits, 0 to 100; below 2**-20 is greedy."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the likeliest one's probability, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or answer."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds, -100 to 100."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the answer holds the token, -100 to 100."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens before all else, -100 to 100."""
    seed: int | None = None
    """0 to 2**64 - 1; the same seed gives the same answer, in any batch, on any machine. None draws
    one, which the statistics of the answer report."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings, up to 64 of 1,000 letters."""
    max_tokens: int = 512
    """Longest answer in tokens, 1 or more."""
    ignore_eos: bool = False
    """Go on after the tokens that end an answer; for measurements."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", _texts(self.stop))
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p is 0, which keeps no token; give a value in (0, 1]")
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if not isinstance(self.logit_bias, tuple):
            object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for token, bias in self.logit_bias:
            _check_integer("a token of logit_bias", token, 0, 2**31 - 1)
            _check_number("logit_bias", bias, -100.0, 100.0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**64 - 1)
        _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if len(self.stop) > MOST_STOPS:
            raise RequestError(f"stop holds {len(self.stop)} strings; at most {MOST_STOPS} fit")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= STOP_LETTERS:
                raise RequestError(
                    f"stop holds {text!r:.100}; give strings of 1 to {STOP_LETTERS:,} letters"
                )

    @property
    def greedy(self) -> bool:
        """Whether the choice needs no random number."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def seeded(self, seed: int) -> Sampling:
        """This request with a seed, if it has none."""
        return replace(self, seed=seed) if self.seed is None else self


FIELDS = tuple(field.name for field in fields(Sampling))


def sampling_from(options: Mapping[str, Any]) -> Sampling:
    """Keyword arguments as a Sampling; an unknown name is a RequestError that lists the known."""
    unknown = sorted(set(options) - set(FIELDS))
    if unknown:
        raise RequestError(f"unknown option {unknown[0]!r}; known: {', '.join(FIELDS)}")
    return Sampling(**options)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, Iterable):
        raise RequestError(f"stop is {value!r}; give a string, or several")
    return tuple(value)


def _pairs(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias is {value!r}; give a table of token ids and biases")
    return tuple(sorted(value.items()))


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; give a number from {low:g} to {high:g}")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value:g}; give a number from {low:g} to {high:g}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; give a whole number from {low} to {high}")
