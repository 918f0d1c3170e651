"""In: texts or tokens. Out: their embeddings, as OpenAI's clients read them; /v1/embeddings.

Each input is a request of its own in the engine's queue, a few at a time, so that a long list
neither holds the others up nor fills the queue. Its bits are the same in any list, beside anything.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Header, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from openlpu.engine.embed import FinalNorm, Mean, final_norm, reading
from openlpu.engine.model import Model
from openlpu.errors import LpuError
from openlpu.serve.errors import ApiError
from openlpu.serve.receipt import embedded, receipt_of
from openlpu.serve.schema.base import Body, Many

if TYPE_CHECKING:
    from openlpu.serve.service import Service

F32 = NDArray[np.float32]

MOST_INPUTS = 2048
_AT_ONCE = 16  # of one request

router = APIRouter()

_Token = Annotated[int, Field(ge=0)]


class EmbeddingRequest(Body):
    """What OpenAI's clients send."""

    input: (
        str
        | Annotated[Many[str], Field(min_length=1, max_length=MOST_INPUTS)]
        | Annotated[Many[_Token], Field(min_length=1)]
        | Annotated[Many[Many[_Token]], Field(min_length=1, max_length=MOST_INPUTS)]
    )
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: str | None = None


class Embedding(BaseModel):
    """One embedding, of length 1. In base64: float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer; with a receipt where the header x-lpu-receipt asks for one."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    lpu_receipt: dict[str, Any] | None = None


@router.post("/embeddings", response_model=EmbeddingList)
async def create_embeddings(
    body: EmbeddingRequest,
    request: Request,
    x_lpu_receipt: Annotated[Literal["true", "false"], Header()] = "false",
) -> Response:
    """Mean of the final states over the tokens of each input, scaled to length 1."""
    service: Service = request.app.state.service
    if body.model not in (service.model.name, *service.settings.aliases):
        message = f"the model {body.model[:100]!r} does not exist here; see /v1/models"
        raise ApiError(404, message, param="model", code="model_not_found")
    norm = await asyncio.to_thread(final_norm, service.model.compiled)
    if body.dimensions not in (None, norm.dimensions):
        message = f"dimensions is {body.dimensions}; this model has {norm.dimensions}, and no other"
        raise ApiError(400, message, param="dimensions", code="unsupported_value")
    begun: list[int] = []
    try:
        prompts = await asyncio.to_thread(_prompts, service, body)
        vectors = await _vectors(service, norm, prompts, begun)
    except LpuError as error:
        raise ApiError(400, str(error), param="input") from None
    finally:
        if begun:  # to leave early does not make them cheaper
            request.state.caller.charge(service.model.name, sum(begun), 0, 0)
    told = service.model if x_lpu_receipt == "true" else None
    text = await asyncio.to_thread(_answer, body, prompts, vectors, told)
    return Response(text, media_type="application/json")


def _prompts(service: Service, body: EmbeddingRequest) -> list[list[int]]:
    """The tokens of each input; texts begin with the model's first token where it wants one."""
    given = body.input
    if isinstance(given, str):
        return [service.model.prompt_tokens(given, raw=True)]
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    model = service.model
    return [
        model.prompt_tokens(one, raw=True) if isinstance(one, str) else one
        for one in given
        if not isinstance(one, int)
    ]


async def _vectors(
    service: Service, norm: FinalNorm, prompts: Items[list[int]], begun: list[int]
) -> list[F32]:
    """In the order of the prompts; begun: gets the length of each one that the engine takes. Raises
    LpuError, and ApiError when the queue is full."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(tokens: list[int]) -> F32:
        async with room:
            mean = Mean(norm)
            feed = await service.worker.submit(tokens, *reading(mean))
            begun.append(len(tokens))
            try:
                async for _ in feed:
                    pass
            finally:
                feed.cancel()
                service.metrics.observe_answer(feed.answer)
            if feed.answer.error is not None:
                raise feed.answer.error
            if feed.answer.finish_reason != "stop":
                raise ApiError(503, "the service is shutting down", type="server_error")
            return mean.embedding()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(tokens)) for tokens in prompts]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _answer(
    body: EmbeddingRequest,
    prompts: Items[list[int]],
    vectors: Items[F32],
    receipt_for: Model | None,
) -> str:
    """An EmbeddingList as JSON."""
    tokens = sum(len(prompt) for prompt in prompts)
    told = _in_base64 if body.encoding_format == "base64" else _in_floats
    data = [
        {"object": "embedding", "index": index, "embedding": told(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": body.model, "usage": usage}
    if receipt_for is not None:
        records = map(embedded, prompts, vectors)
        answer["lpu_receipt"] = receipt_of(receipt_for, embeddings=records)
    return json.dumps(answer)


def _in_floats(vector: F32) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats


def _in_base64(vector: F32) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
