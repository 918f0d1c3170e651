"""In: work that waits for tokens. Out: it ends with its client; its events, as they are sent.

Server-sent events are written by hand: text made into JSON between parts that are made once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openlpu.errors import LpuError
from openlpu.serve.errors import ApiError, api_error, error_body

DONE = "data: [DONE]\n\n"


class ClientGone(Exception):
    """Nobody reads the answer any more."""


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel what is done inside when the client goes away. Raises ClientGone then."""
    try:
        async with asyncio.timeout(None) as limit:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                limit.reschedule(asyncio.get_running_loop().time())

            watching = asyncio.create_task(watch())
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError:
        if not limit.expired():
            raise
        raise ClientGone from None


class EventStream(Response):
    """Sends events as they are made, several of them in one part if they come together."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        *,
        close: Callable[[], None],
        failed: Callable[[ApiError], str] | None = None,
    ) -> None:
        """close: called at the end, however it comes. failed: the event that tells of an error."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._failed = failed or error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, unless the client goes away."""
        try:
            async with while_connected(receive):
                start = {"type": "http.response.start", "status": self.status_code}
                await send({**start, "headers": self.raw_headers})
                async for text in self._safe():
                    await send(_part(text, more=True))
                await send(_part("", more=False))
        except ClientGone:
            pass
        finally:
            self._close()

    async def _safe(self) -> AsyncIterator[str]:
        """The events; an error becomes the last one."""
        try:
            async for text in self._events:
                yield text
        except LpuError as error:
            yield self._failed(api_error(error))
        except ApiError as error:
            yield self._failed(error)


def _part(text: str, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def event(data: object) -> str:
    """One event."""
    return f"data: {json.dumps(data)}\n\n"


def error_event(error: ApiError) -> str:
    """OpenAI's clients raise it as an APIError."""
    return event(error_body(error))
