"""In: a browser. Out: the page at `/` to chat with the model and to watch the service.

The page is the files in web/, as they are. It asks this service alone for anything, and its policy
lets nothing else run: what models and people write comes from strangers, and its scripts write it
as text only. Nothing is computed for it but /stats, counters that it asks for while it is seen.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response

from openlpu.graph.step import PAGE
from openlpu.host import HostModel
from openlpu.serve.endpoint import endpoint_of, json_response
from openlpu.serve.errors import ApiError
from openlpu.serve.service import Service

router = APIRouter(include_in_schema=False)

RECENT_S = 10.0
"""Medians are over so many seconds."""
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@functools.cache
def _files() -> dict[str, bytes]:
    """The files by name; nothing else in the world has a name here."""
    folder = resources.files("openlpu.serve") / "web"
    return {file.name: file.read_bytes() for file in folder.iterdir() if _type(file.name)}


def _type(name: str) -> str | None:
    return next((kind for end, kind in _TYPES.items() if name.endswith(end)), None)


@router.get("/")
async def page() -> Response:
    """The page itself."""
    return _file("index.html")


@router.get("/web/{name}")
async def asset(name: str) -> Response:
    """What it is made of."""
    if name not in _files():
        raise ApiError(404, "the page has no such file")
    return _file(name)


def _file(name: str) -> Response:
    return Response(_files()[name], headers=_HEADERS, media_type=_type(name))


@router.get("/stats")
async def stats(request: Request) -> Response:
    """How the service fares, for the page."""
    answer = json_response(snapshot(endpoint_of(request).service))
    answer.headers["cache-control"] = "no-store"
    return answer


def snapshot(service: Service) -> dict[str, Any]:
    """Counters since the start, of which two make a rate, and what is the case now."""
    worker, metrics, engine = service.worker, service.metrics, service.model.engine
    pages, runner, now_s = engine.pages, engine.runner, engine.clock()
    since_s = now_s - RECENT_S
    return {
        "time_s": now_s,
        "running": worker.running,
        "waiting": worker.waiting,
        "steps": worker.steps,
        "read_tokens": engine.prompt_tokens,
        **metrics.totals(),
        "first_token_s": metrics.recent_first_token.median_s(since_s),
        "token_s": metrics.recent_token.median_s(since_s),
        "kv": {
            "held": pages.held,
            "kept": pages.kept,
            "limit": pages.limit,
            "page_tokens": PAGE,
            "page_bytes": runner.page_bytes if isinstance(runner, HostModel) else None,
        },
    }
