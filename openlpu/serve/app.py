"""In: a Service. Out: the application with all endpoints, whose every refusal is OpenAI's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from openlpu.errors import LpuError
from openlpu.serve import chat, completions, embeddings, models, page, responses, tokens
from openlpu.serve.endpoint import GROQ, known_caller
from openlpu.serve.errors import ApiError, api_error, error_body
from openlpu.serve.schema.base import ErrorBody
from openlpu.serve.service import Service
from openlpu.serve.stream import ClientGone

__all__ = ["Service", "create_app"]

_GONE_STATUS = 499  # nobody reads it
_REFUSALS = {
    400: "The request is malformed, or asks for what is not supported; `param` names the part.",
    401: "The key is missing, wrong or revoked.",
    403: "Without keys, the service answers only under this machine's own names.",
    404: "There is no such model or endpoint.",
    405: "The endpoint has another method.",
    408: "The request did not arrive in time.",
    413: "The body is too long.",
    415: "The body is compressed.",
    429: "The key's limit is reached; Retry-After says when to come back.",
    431: "The header is too long.",
    500: "The service failed.",
    503: "Too much is asked of the service, or it ends; Retry-After says when to come back.",
}


def create_app(service: Service) -> FastAPI:
    """The endpoints; who may use them is the guard's business."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="OpenLPU",
        version=service.fingerprint,
        description="The same request with the same seed gets the same bits, whatever else is "
        "being served.",
        lifespan=lifespan,
        dependencies=[Depends(known_caller)],
        redoc_url=None,
        responses={
            status: {"model": ErrorBody, "description": what} for status, what in _REFUSALS.items()
        },
    )
    app.state.service = service
    for part in (models, chat, completions, responses, embeddings):
        _register(app, part.router, ("/v1", GROQ))
    _register(app, tokens.router, ("", GROQ))
    _register(app, page.router, ("",))
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(LpuError, _on_lpu_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientGone, _on_gone)
    app.add_exception_handler(Exception, _on_failure)
    _describe(app, service.names)
    return app


def _register(app: FastAPI, router: APIRouter, prefixes: Sequence[str]) -> None:
    """The endpoints of a router below each prefix. Each gets a route of its own, by whose whole
    path the guard counts; those of an included router have only its end."""
    for prefix in prefixes:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            app.add_api_route(
                prefix + route.path,
                route.endpoint,
                methods=sorted(route.methods or ()),
                response_model=route.response_model,
                responses={**app.router.responses, **route.responses},
                include_in_schema=route.include_in_schema,
            )


# -- refusals -----------------------------------------------------------------------------------


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error_body(error), error.status, headers=error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _refusal(error)


async def _on_lpu_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LpuError)
    return _refusal(api_error(error))


def _forget_frames(error: BaseException | None) -> None:
    """Of an error that is dealt with. They hold the body, and FastAPI's the error itself: such a
    ring would stay until the collector comes, and with it gigabytes of many bodies."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


async def _on_malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    _forget_frames(error)
    return _refusal(malformed(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    _forget_frames(error)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path[:100]}; see /docs"
    elif error.status_code == 405:
        message = f"{request.method} is not possible here; see /docs"
    elif error.status_code == 400:
        message = "the body is no JSON document that can be read"
    headers = dict(error.headers or {})
    return _refusal(ApiError(error.status_code, message, headers=headers))


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE_STATUS)


async def _on_failure(request: Request, error: Exception) -> Response:
    return _refusal(ApiError(500, "the service failed", type="server_error"))


def malformed(errors: Sequence[Any]) -> ApiError:
    """What pydantic found, as one refusal. Of the alternatives of a union, which all complain, the
    one that was followed furthest is meant."""

    def weight(found: Any) -> tuple[bool, int, int]:
        kind = found["type"]
        # Another type of thing lacks fields and has others: its type is what is wrong.
        telling = {"missing": 0, "literal_error": 1, "extra_forbidden": 2}
        if kind.startswith(("less_than", "greater_than", "string_too")):
            telling[kind] = 3
        return kind == "too_long", len(found["loc"]), telling.get(kind, 1)

    found = max(errors, key=weight)
    param = parameter(found["loc"])
    if found["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON document")
    only = found.get("ctx", {}).get("expected")
    if found["type"] in ("extra_forbidden", "none_required") or only == "False":
        return ApiError(400, f"{param} is not supported", param=param, code="unsupported_parameter")
    if found["type"] == "missing":
        what = f"{param} is missing" if param else "the body is missing"
        return ApiError(400, what, param=param, code="missing_required_parameter")
    if param is None and found["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "the body must be a JSON object, sent with content-type: application/json"
        return ApiError(400, message, code="invalid_value")
    message = f"{param or 'the body'}: {found['msg'][:1].lower()}{found['msg'][1:]}"
    return ApiError(400, message[:300], param=param, code="invalid_value")


def parameter(loc: Sequence[str | int]) -> str | None:
    """A place such as messages[0].content, without the names of our own types in it."""
    path = ""
    is_tag = False  # the name of an alternative follows those fields
    for part in loc[1:]:
        if is_tag and isinstance(part, str):
            is_tag = False
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = part
        elif part.isidentifier() and part.islower() and part not in _TYPES:
            path += f".{part}"
        is_tag = part in ("response_format", "format") or _ITEM.fullmatch(path) is not None
    return path[:100] or None


_ITEM = re.compile(r"input\[\d+\]")
_TYPES = frozenset({"str", "int", "float", "bool", "none", "constrained", "nullable"})


# -- the page -----------------------------------------------------------------------------------


def _describe(app: FastAPI, names: Sequence[str]) -> None:
    """OpenAPI with the names of the models, and without FastAPI's 422, which never appears."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = describe()
            for path in page["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            schemas = page["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for name, schema in schemas.items():
                if name.endswith("Request") and "model" in schema["properties"]:
                    model = schema["properties"]["model"]
                    model.get("anyOf", [model])[0]["enum"] = [*names]
            app.openapi_schema = page
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
