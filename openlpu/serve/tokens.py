"""In: text, a conversation, or tokens. Out: its tokens, or their text; /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from openlpu.errors import LpuError
from openlpu.serve.endpoint import endpoint_of, json_response
from openlpu.serve.errors import ApiError, api_error
from openlpu.serve.schema.base import Body, Many
from openlpu.serve.schema.chat import FunctionTool, Message
from openlpu.serve.tools import read_tools

router = APIRouter()


class TokenizeRequest(Body):
    """Either a prompt of /v1/completions, or messages (and tools) of /v1/chat/completions."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    tools: Annotated[Many[FunctionTool], Field(max_length=128)] | None = None


class Tokens(BaseModel):
    """What the model reads; max_model_len is its context."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Body):
    """Ids of tokens."""

    model: str | None = None
    tokens: Many[Annotated[int, Field(ge=0, lt=2**31)]]


class Text(BaseModel):
    """What the tokens say; control tokens say nothing."""

    prompt: str


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens that an answer to this would be charged for."""
    service = endpoint_of(request).service
    if body.model is not None:
        service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.tools is not None and body.messages is None:
        raise ApiError(400, "tools need messages", param="tools")

    def found() -> list[int]:
        if body.prompt is not None:
            return service.encode(body.prompt, special=False)
        messages = [message.plain() for message in body.messages or ()]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        use = read_tools(tools or None)
        return service.encode(service.prompts.render(messages, use), special=True)

    try:
        tokens = await asyncio.to_thread(found)
    except LpuError as error:
        raise api_error(error, "messages" if body.prompt is None else "prompt") from None
    context = service.model.context
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": context})


@router.post("/detokenize", response_model=Text)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    service = endpoint_of(request).service
    if body.model is not None:
        service.check_model(body.model)
    try:
        text = await asyncio.to_thread(service.model.detokenize, body.tokens)
    except LpuError as error:
        raise api_error(error, "tokens") from None
    return json_response({"prompt": text})
