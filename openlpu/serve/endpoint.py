"""In: an HTTP request. Out: Endpoint: what every endpoint knows of it; answers in JSON."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Header, Request, Response

from openlpu.serve.service import Service

if TYPE_CHECKING:
    from openlpu.serve.guard import Caller

GROQ = "/openai/v1"
"""Where Groq's clients look; answers there have Groq's fields."""

Receipt = Annotated[Literal["true", "false"], Header()]
"""The header x-lpu-receipt."""


STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""For the OpenAPI page: an endpoint that can answer by events, too."""


class Anybody:
    """Who asks where no guard stands before the application."""

    def charge(self, model: str, prompt_tokens: int, cached_tokens: int, tokens: int) -> None:
        """Nobody counts."""


async def known_caller(request: Request) -> None:
    """A dependency of all endpoints: there is a caller."""
    if not hasattr(request.state, "caller"):
        request.state.caller = Anybody()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The service, who asks, and in which words it is answered."""

    service: Service
    caller: Caller | Anybody
    request_id: str
    groq: bool
    receipt: bool


def endpoint_of(request: Request, *, receipt: bool = False) -> Endpoint:
    """Where the request came in."""
    return Endpoint(
        service=request.app.state.service,
        caller=request.state.caller,
        request_id=getattr(request.state, "request_id", None) or f"req_{secrets.token_hex(12)}",
        groq=request.scope["path"].startswith(GROQ),
        receipt=receipt,
    )


def json_response(document: Any) -> Response:
    """A document as it is, without checking our own words again."""
    return Response(json.dumps(document), media_type="application/json")
