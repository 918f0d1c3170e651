"""In: nothing, or a name. Out: which models are here; /v1/models."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from openlpu.serve.endpoint import endpoint_of, json_response
from openlpu.serve.service import Service

router = APIRouter()


class ModelCard(BaseModel):
    """A name that requests may use; the model's own and its aliases answer alike."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    active: bool
    context_window: int
    max_completion_tokens: int
    root: str
    """The model's own name."""
    system_fingerprint: str
    """Equal ones give equal bits."""


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelCard]


@router.get("/models", response_model=ModelList)
async def list_models(request: Request) -> Response:
    """The models that are served."""
    service = endpoint_of(request).service
    return json_response({"object": "list", "data": [_card(service, n) for n in service.names]})


@router.get("/models/{model:path}", response_model=ModelCard)
async def retrieve_model(model: str, request: Request) -> Response:
    """One of them."""
    service = endpoint_of(request).service
    service.check_model(model)
    return json_response(_card(service, model))


def _card(service: Service, name: str) -> dict[str, object]:
    context = service.model.context
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "openlpu",
        "active": True,
        "context_window": context,
        "max_completion_tokens": context,
        "root": service.model.name,
        "system_fingerprint": service.fingerprint,
    }
