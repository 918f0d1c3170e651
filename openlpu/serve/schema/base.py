"""In: what requests have in common. Out: checked bodies, controls of the sampler, error bodies.

Whatever is not named here or in a subclass is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from openlpu.engine.sampling import STOP_LETTERS, Sampling
from openlpu.serve.errors import ApiError

MOST_CHOICES = 128
MOST_STOPS = 16
_MOST_FIELDS = 4096
_PENALTY = Field(ge=-2.0, le=2.0)
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_LETTERS)]


Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list, refused at its first bad element: a body holds a million of them, and pydantic would make
an error of each."""


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise PydanticCustomError("too_long", f"at most {_MOST_FIELDS:,} fields are possible")
    return value


Table = Annotated[dict[str, Item], BeforeValidator(_few)]
"""An object of any fields, but not of a million bad ones."""


class Body(BaseModel):
    """A request or a part of one. Numbers are not read out of strings."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: Any) -> Any:
        return _few(data)


class Controls(Body):
    """What steers the sampler in every endpoint. Those that OpenAI lacks stand below the line."""

    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    """1 if not given; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, _PENALTY] | None = None
    frequency_penalty: Annotated[float, _PENALTY] | None = None
    logit_bias: Table[Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    """By token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """Choice i of a prompt has seed + i. One is drawn if none is given; a receipt tells it."""
    stop: _Stop | Annotated[Many[_Stop], Field(max_length=MOST_STOPS)] | None = None
    user: str | None = None
    metadata: Table[str] | None = None
    service_tier: Literal["auto", "default", "on_demand"] | None = None
    # -----
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    ignore_eos: bool | None = None
    """Go on after the tokens that end an answer; for measurements."""
    regex: str | None = None
    """Of the whole answer."""
    grammar: str | None = None
    """In llguidance's dialect of Lark."""
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    """Greater ones go first."""

    def sampling(self, max_tokens: int, vocab_size: int) -> Sampling:
        """Raises ApiError."""
        stop = self.stop if self.stop is not None else []
        return Sampling(
            temperature=_or(self.temperature, 1.0),
            top_k=max(0, _or(self.top_k, 0)),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias=_biases(self.logit_bias or {}, vocab_size),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            max_tokens=max_tokens,
            ignore_eos=bool(self.ignore_eos),
        )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _biases(given: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    found = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab_size):
            message = f"logit_bias names {name[:40]!r}, which is no token of this model"
            raise ApiError(400, message, param="logit_bias")
        found[int(name)] = bias
    return tuple(sorted(found.items()))


class StreamOptions(Body):
    """include_usage: one more chunk with the usage comes last."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Shown(BaseModel):
    """An answer, as the OpenAPI page describes it."""


class PromptDetails(Shown):
    """cached_tokens: those of the prompt whose K/V were there already."""

    cached_tokens: int


class Usage(Shown):
    """Tokens. The times, in seconds, are told under /openai/v1."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    queue_time: float | None = None
    prompt_time: float | None = None
    completion_time: float | None = None
    total_time: float | None = None


class XGroq(Shown):
    """What Groq's clients read."""

    id: str
    usage: Usage | None = None


class ErrorDetail(Shown):
    """What is wrong, with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shown):
    """Every refusal."""

    error: ErrorDetail
