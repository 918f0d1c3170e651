"""In: what is wrong with a request. Out: ApiError, and the body in which OpenAI's clients read it.

The types and codes are OpenAI's where it has one for the case.
"""

from __future__ import annotations

from typing import Any

from openlpu.errors import CheckpointError, DoesNotFit, LpuError, RequestError, TemplateError


class ApiError(Exception):
    """A request that gets no answer. str(error) is one line for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - the name that the body has
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}


def api_error(error: LpuError, param: str | None = None) -> ApiError:
    """What a client is told of an error of the layers below. param: what it is about, unless the
    error itself knows better."""
    if isinstance(error, DoesNotFit):
        return ApiError(400, str(error), code="context_length_exceeded")
    # A model's own tokenizer or template may fail on a text: CheckpointError, TemplateError.
    if isinstance(error, (RequestError, TemplateError, CheckpointError)):
        return ApiError(400, str(error), param=getattr(error, "param", param))
    return ApiError(500, str(error), type="server_error")


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON document that tells it."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
