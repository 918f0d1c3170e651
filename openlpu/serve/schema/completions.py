"""In: /v1/completions' documents. Out: their shapes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from openlpu.engine.logprobs import MOST
from openlpu.serve.schema.base import (
    MOST_CHOICES,
    Controls,
    Many,
    Shown,
    StreamOptions,
    Usage,
    XGroq,
)
from openlpu.serve.schema.chat import ResponseFormat

MOST_PROMPTS = 2048
_Token = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(Controls):
    """What OpenAI's clients send."""

    model: str
    prompt: (
        str
        | Annotated[Many[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[Many[_Token], Field(min_length=1)]
        | Annotated[
            Many[Annotated[Many[_Token], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_PROMPTS),
        ]
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """16 if not given, as OpenAI has it."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """So many are made, and the n with the greatest mean log probability are told."""
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST)] | None = None
    response_format: ResponseFormat | None = None
    suffix: None = None
    store: Literal[False] | None = None


class OldLogprobs(Shown):
    """Lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Shown):
    """One of n answers."""

    index: int
    text: str
    logprobs: OldLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Shown):
    """The whole answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: str | None = None
    choices: list[CompletionChoice]
    usage: Usage
    x_groq: XGroq | None = None
    lpu_receipt: dict[str, Any] | None = None
